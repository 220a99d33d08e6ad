"""The ``medtut`` command. Each sub-command imports its own room when it is called."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

from typer import Argument, Context, Exit, Option, Typer, echo

from medtut.errors import MedtutError

app = Typer(
    name="medtut",
    help="Parameter-efficient fine-tuning for medical imaging: run, measure, check.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
assets_app = Typer(help="Weights and data sets, hashes pinned.", no_args_is_help=True)
app.add_typer(assets_app, name="assets")
predict_app = Typer(help="Ask a model about your own file.", no_args_is_help=True)
app.add_typer(predict_app, name="predict")


Profile = StrEnum("Profile", ["smoke", "quick", "full"])
Level = Annotated[Profile, Option(envvar="MEDTUT_PROFILE", help="How much to compute.")]
Names, Folder = list[str] | None, Path | None
NOTEBOOKS = Option(envvar="MEDTUT_NOTEBOOKS", help="Their folder, if another.")
AGAINST = Option(metavar="SENTENCE", help="The opposite of each prompt, in order.")
PROMPT = Option(metavar="SENTENCE", help="As often as you like; else 18 findings.")
FORCE = Option("--force", help="Overwrite runs made with other settings.")
DECODE = Option("--decode", help="Read a collected result code.")
Which = Annotated[Names, Argument(help="Numbers or names, as 01 or bonus/01_name.")]
Sets = Annotated[Names, Option("--set", metavar="NAME=VALUE", help="Change a setting.")]


@app.command()
def run(
    lessons: Which = None,
    every: Annotated[bool, Option("--all", help="Run every lesson.")] = False,
    profile: Level = Profile.quick,
    sets: Sets = None,
    data: Annotated[Folder, Option(help="Folder with your own data set.")] = None,
    solve: Annotated[bool, Option("--solve", help="Solve the exercises.")] = False,
    out: Annotated[Folder, Option(help="Write here, not in build/.")] = None,
    timeout: Annotated[float | None, Option(min=1, help="Seconds per cell.")] = None,
    notebooks: Annotated[Folder, NOTEBOOKS] = None,
) -> None:
    """Run lessons headlessly; pages, figures and numbers go to build/<profile>/."""
    from medtut.course.profiles import SettingsError, parse_sets
    from medtut.course.runner import run_lessons

    if every and lessons:
        raise SettingsError("give lessons or --all, not both")
    if not every and not lessons:
        raise SettingsError("which lesson? Give its number (medtut run 01), or --all")
    rest = (profile.value, parse_sets(sets), data, out, solve, timeout)
    runs = run_lessons(None if every else lessons, *rest, notebooks=notebooks)
    if not all(one.ok for one in runs):
        raise Exit(1)


@app.command()
def sweep(
    lesson: Annotated[str, Argument(help="Number or name of the lesson.")],
    arms: Annotated[str | None, Option(help="Comma-separated; default all.")] = None,
    seeds: Annotated[str, Option(help="As 0-4 or 0,2,5.")] = "0-4",
    profile: Level = Profile.quick,
    sets: Sets = None,
    out: Annotated[Folder, Option(help="Default: benchmarks/sweeps/<lesson>.")] = None,
    force: Annotated[bool, FORCE] = False,
) -> None:
    """Train arms times seeds and keep one JSON per run; restartable run by run."""
    from medtut.course.profiles import parse_sets
    from medtut.course.sweep import parse_seeds, run_sweep

    names = [name.strip() for name in arms.split(",")] if arms else None
    which, given = parse_seeds(seeds), parse_sets(sets)
    runs = run_sweep(lesson, names, which, profile.value, given, out, force)
    if any("error" in one for one in runs):
        raise Exit(1)


@app.command()
def doctor(
    code: Annotated[str | None, DECODE] = None,
) -> None:
    """Check Python, packages, device, memory, disk, network and cache."""
    from medtut.course.doctor import decode, run_doctor

    if code is not None:
        echo(decode(code).to_text())
        return
    report = run_doctor()
    report.render()
    raise Exit(report.exit_code)


@app.command()
def audit(target: Annotated[str, Argument(metavar="FILE.py:FACTORY")]) -> None:
    """Look for known defects in a model that a function of yours returns."""
    from medtut.audit.cli import run_audit

    raise Exit(run_audit(target))


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True}
)
def bench(
    more: Context,
    name: Annotated[str, Argument(help="What to measure: lora, ctclip.")] = "lora",
    out: Annotated[str, Option(help="Folder for the files.")] = "benchmarks/results",
) -> None:
    """Measure speed and memory, side by side; its other options go to the benchmark."""
    if name not in ("lora", "ctclip"):
        raise MedtutError(f"there is no benchmark {name!r}; there are: lora, ctclip")
    import runpy

    from medtut.course.files import repository_root

    script = repository_root() / "benchmarks" / f"{name}.py"
    if not script.is_file():
        cure = f"clone it and call medtut bench {name} there"
        raise MedtutError(f"benchmarks come with the repository alone: {cure}")
    sys.argv[1:] = ["--out", out, *more.args]
    runpy.run_path(str(script), run_name="__main__")


@predict_app.command("ct")
def predict_ct(
    volume: Annotated[Path, Argument(help="One CT, NIfTI or NRRD.")],
    prompt: Annotated[Names, PROMPT] = None,
    against: Annotated[Names, AGAINST] = None,
    weights: Annotated[Folder, Option(help="A CT-CLIP, if not the course's.")] = None,
    text: Annotated[str, Option(help="asset, folder, Hugging Face name.")] = "asset",
    slope: Annotated[float | None, Option(help="To HU, if it is not in HU.")] = None,
    intercept: Annotated[float | None, Option(help="With --slope.")] = None,
    as_json: Annotated[bool, Option("--json", help="For machines.")] = False,
) -> None:
    """Compare one CT with sentences; a teaching model, not for patients."""
    from medtut.models.ct_predict import predict_ct as ask

    found = ask(volume, prompt, against, weights, text, (slope, intercept))
    if as_json:
        import json

        echo(json.dumps(found))
        return
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    right = (Column(title, justify="right", no_wrap=True) for title in ("P", "cosine"))
    table = Table("sentence", "against", *right, box=None)
    for one in found["answers"]:
        numbers = ("-" if x is None else f"{x:.3f}" for x in (one["p"], one["cosine"]))
        words = (Text(one["sentence"]), Text(one["against"] or "-"))  # "[/]" is text
        table.add_row(*words, *numbers)
    Console().print(table)
    if any(one["p"] is None for one in found["answers"]):
        echo("Without a sentence --against it there is only a cosine similarity, no P.")
    known = "" if found["spacing_known"] else ", the course's: the weights name none"
    echo(f"Read as {found['size']} voxels of {found['spacing']} mm{known}.")
    echo(f"P: softmax over the pair. This is {found['note']}.")


@assets_app.command("list")
def assets_list() -> None:
    """Show what there is and what is in the cache."""
    from rich.console import Console
    from rich.table import Column, Table

    from medtut.data.assets import list_assets

    titles = ("name", "here", "MB", "what it is", "licence")
    table = Table(*(Column(title, overflow="fold") for title in titles), box=None)
    for one in list_assets():
        here = "embedded" if one["embedded"] else "yes" if one["cached"] else "no"
        size = f"{one['bytes'] / 1e6:.1f}"
        table.add_row(one["name"], here, size, one["title"], one["licence"])
    Console().print(table)


@assets_app.command("fetch")
def assets_fetch(names: Annotated[list[str], Argument(help="Names, or all.")]) -> None:
    """Download into the cache, checking every byte."""
    from medtut.data.assets import ASSETS, AssetError, fetch

    bad = False
    for name in list(ASSETS) if names == ["all"] else names:
        try:
            for label, path in fetch(name).items():
                echo(f"{name}  {label}  {path}")
        except AssetError as error:  # the others may be had all the same
            echo(f"medtut: {error}", err=True)
            bad = True
    raise Exit(2 if bad else 0)


@assets_app.command("verify")
def assets_verify(
    names: Annotated[Names, Argument(help="Names; by default what is here.")] = None,
) -> None:
    """Compute the hashes again; exit code 1 when a file is missing or wrong."""
    from medtut.data.assets import list_assets, verify

    here = [one["name"] for one in list_assets() if one["cached"]]
    bad = False
    for name in names or here:
        for label, state in verify(name).items():
            bad |= state != "ok"
            echo(f"{name}  {label}  {state}")
    raise Exit(int(bad))


@assets_app.command("card")
def assets_card(name: str) -> None:
    """Show source, licence, hash and contents of one asset."""
    from medtut.data.assets import describe

    echo(describe(name))


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
    except (KeyboardInterrupt, SystemExit) as left:
        # typer turns Ctrl-C into this code without a word.
        if (code := getattr(left, "code", 130)) == 130:
            print("medtut: stopped", file=sys.stderr)
        raise SystemExit(code) from None
