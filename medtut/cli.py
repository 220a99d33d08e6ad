"""The ``medtut`` command. Each sub-command imports its own room when it is called."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from medtut.errors import MedtutError

app = typer.Typer(
    name="medtut",
    help="Parameter-efficient fine-tuning for medical imaging: run, measure, check.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
assets_app = typer.Typer(
    help="Weights and data sets with a pinned hash.", no_args_is_help=True
)
app.add_typer(assets_app, name="assets")


class Profile(StrEnum):
    """The three profiles, for the help text."""

    smoke = "smoke"
    quick = "quick"
    full = "full"


ProfileOption = Annotated[
    Profile,
    typer.Option(envvar="MEDTUT_PROFILE", help="How much to compute."),
]


@app.command()
def run(
    lessons: Annotated[
        list[str] | None,
        typer.Argument(help="Numbers or names, as 01 or bonus/01_name."),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Run every lesson.")] = False,
    profile: ProfileOption = Profile.quick,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Change a setting."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder with your own data set.")
    ] = None,
    solve: Annotated[
        bool, typer.Option("--solve", help="Put the solutions into the exercises.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Write here in the place of build/.")
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(min=1, help="Seconds one cell may take.")
    ] = None,
    record_costs: Annotated[
        bool,
        typer.Option("--record-costs", help="Note time and memory in benchmarks/."),
    ] = False,
    notebooks: Annotated[
        Path | None,
        typer.Option(envvar="MEDTUT_NOTEBOOKS", help="Another folder of notebooks."),
    ] = None,
) -> None:
    """Run lessons headlessly; pages, figures and numbers go to build/<profile>/."""
    from medtut.course.profiles import SettingsError, parse_sets
    from medtut.course.runner import run_lessons

    if every and lessons:
        raise SettingsError("give lessons or --all, not both")
    if not every and not lessons:
        raise SettingsError("which lesson? Give its number (medtut run 01), or --all")
    runs = run_lessons(
        None if every else lessons,
        profile.value,
        parse_sets(sets),
        data,
        out,
        solve,
        timeout,
        notebooks=notebooks,
        record_costs=record_costs,
    )
    if not all(one.ok for one in runs):
        raise typer.Exit(1)


@app.command()
def sweep(
    lesson: Annotated[str, typer.Argument(help="Number or name of the lesson.")],
    arms: Annotated[
        str | None, typer.Option(help="Comma-separated names; all by default.")
    ] = None,
    seeds: Annotated[str, typer.Option(help="As 0-4 or 0,2,5.")] = "0-4",
    profile: ProfileOption = Profile.quick,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Change a setting."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Default: benchmarks/sweeps/<lesson>.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Overwrite runs made with other settings.")
    ] = False,
) -> None:
    """Train arms times seeds and keep one JSON per run; restartable run by run."""
    from medtut.course.profiles import parse_sets
    from medtut.course.sweep import parse_seeds, run_sweep

    runs = run_sweep(
        lesson,
        arms=[name.strip() for name in arms.split(",")] if arms else None,
        seeds=parse_seeds(seeds),
        profile=profile.value,
        overrides=parse_sets(sets),
        out=out,
        force=force,
    )
    if any("error" in one for one in runs):
        raise typer.Exit(1)


@app.command()
def doctor(
    code: Annotated[
        str | None, typer.Option("--decode", help="Read a collected result code.")
    ] = None,
) -> None:
    """Check Python, packages, device, memory, disk, network and cache."""
    from rich.console import Console

    from medtut.course.doctor import decode, run_doctor

    if code is not None:
        typer.echo(decode(code).to_text())
        return

    report = run_doctor()
    report.render(Console())
    raise typer.Exit(report.exit_code)


@app.command()
def audit(
    target: Annotated[str, typer.Argument(metavar="FILE.py:FACTORY")],
) -> None:
    """Look for known defects in a model that a function of yours returns."""
    from medtut.audit.cli import run_audit

    raise typer.Exit(run_audit(target))


@app.command()
def bench(
    name: Annotated[str, typer.Argument(help="What to measure: lora.")] = "lora",
    out: Annotated[Path, typer.Option(help="Folder for JSON and table.")] = Path(
        "benchmarks/results"
    ),
) -> None:
    """Measure speed and memory, side by side in one run."""
    if name != "lora":
        raise MedtutError(f"there is no benchmark {name!r}; there is: lora")
    import runpy

    from medtut.course.files import repository_root

    script = repository_root() / "benchmarks" / f"{name}.py"
    if not script.is_file():
        raise MedtutError(
            "benchmarks come with the repository, not with the package: clone it and "
            f"call medtut bench {name} there"
        )
    sys.argv[1:] = ["--out", str(out)]
    runpy.run_path(str(script), run_name="__main__")


@assets_app.command("list")
def assets_list() -> None:
    """Show what there is and what is in the cache."""
    from rich.console import Console
    from rich.table import Table

    from medtut.data.assets import list_assets

    table = Table(box=None)
    for title in ("name", "here", "MB", "what it is", "licence"):
        table.add_column(title, overflow="fold")
    for one in list_assets():
        here = "embedded" if one["embedded"] else "yes" if one["cached"] else "no"
        size = f"{one['bytes'] / 1e6:.1f}"
        table.add_row(one["name"], here, size, one["title"], one["licence"])
    Console().print(table)


@assets_app.command("fetch")
def assets_fetch(
    names: Annotated[list[str], typer.Argument(help="Names, or all.")],
) -> None:
    """Download into the cache, checking every byte."""
    from medtut.data.assets import ASSETS, AssetError, fetch

    bad = False
    for name in list(ASSETS) if names == ["all"] else names:
        try:
            for label, path in fetch(name).items():
                typer.echo(f"{name}  {label}  {path}")
        except AssetError as error:  # the others may be had all the same
            typer.echo(f"medtut: {error}", err=True)
            bad = True
    if bad:
        raise typer.Exit(2)


@assets_app.command("verify")
def assets_verify(
    names: Annotated[
        list[str] | None, typer.Argument(help="Names; by default what is here.")
    ] = None,
) -> None:
    """Compute the hashes again; exit code 1 when a file is missing or wrong."""
    from medtut.data.assets import list_assets, verify

    here = [one["name"] for one in list_assets() if one["cached"]]
    bad = False
    for name in names or here:
        for label, state in verify(name).items():
            bad |= state != "ok"
            typer.echo(f"{name}  {label}  {state}")
    if bad:
        raise typer.Exit(1)


@assets_app.command("card")
def assets_card(name: Annotated[str, typer.Argument()]) -> None:
    """Show source, licence, hash and contents of one asset."""
    from medtut.data.assets import describe

    typer.echo(describe(name))


def main() -> None:
    """Run the command; errors meant for people are printed without a traceback."""
    # A terminal or file that is not UTF-8 must not turn an arrow into a crash.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        app()
    except MedtutError as error:
        print(f"medtut: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(_stopped()) from None
    except SystemExit as left:
        # typer turns Ctrl-C into this code without a word.
        if left.code == 130:
            _stopped()
        raise


def _stopped() -> int:
    print("medtut: stopped", file=sys.stderr)
    return 130
