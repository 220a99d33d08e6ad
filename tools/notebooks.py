"""``make notebooks``: the stored notebooks, built from their text and executed.

``python -m tools.notebooks build [SLUG...]`` and ``... check``.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from medtut.course import nbfile
from medtut.course.catalog import notebooks_dir
from medtut.course.files import repository_root
from medtut.course.profiles import SettingsError, _did_you_mean
from medtut.errors import MedtutError
from medtut.files import read_json, write_json
from tools import percent


def sources(folder: Path | str | None = None) -> dict[str, Path]:
    """Return slug to text form, lessons first, then bonus notebooks."""
    base = notebooks_dir(folder) / "source"
    found = {path.stem: path for path in sorted(base.glob("[0-9]*.py"))}
    for path in sorted((base / "bonus").glob("[0-9]*.py")):
        found[f"bonus/{path.stem}"] = path
    return found


def build_notebook(
    slug: str,
    folder: Path | str | None = None,
    execute: bool = True,
    profile: str = "quick",
) -> Path:
    """Build one notebook from its text and store its outputs.

    Without `execute`, the outputs of cells whose source did not change are kept, so
    that correcting a sentence costs no run.

    Raises
    ------
    MedtutError
        When a cell fails; the stored notebook is left as it was.
    """
    base = notebooks_dir(folder)
    text = sources(base)[slug]
    path = base / f"{slug}.ipynb"
    nb = percent.build(text, slug)
    if not execute:
        old = nbfile.read_notebook(path).cells if path.is_file() else []
        by_id = {cell.get("id"): cell for cell in old}
        for cell in nb.cells:
            if cell.cell_type == "code" and (before := by_id.get(cell["id"])):
                cell.outputs = before.outputs
                cell.execution_count = before.execution_count
        return nbfile.write_notebook(nb, path)
    before = path.read_bytes() if path.is_file() else None
    nbfile.write_notebook(nb, path)
    try:
        executed = _execute(slug, base, profile)
    except BaseException:
        # A failed build must not leave the notebook without its outputs.
        if before is not None:
            path.write_bytes(before)
        raise
    _only_what_lasts(executed)
    percent.set_ids(executed, slug)
    # The run may have recorded what the first screen says it costs.
    percent.stamp(executed, slug)
    return nbfile.write_notebook(executed, path)


def check_step(slug: str, folder: Path | str | None = None) -> list[str]:
    """Return where the text form and the notebook of a lesson are not in step."""
    base = notebooks_dir(folder)
    text, path = sources(base).get(slug), base / f"{slug}.ipynb"
    if text is None:
        return [f"{slug} has no text form in {base.name}/source"]
    if not path.is_file():
        return [f"{slug} has no notebook; run make notebooks"]
    return percent.differences(percent.read_text_form(text), nbfile.read_notebook(path))


def _only_what_lasts(nb: Any) -> None:
    """Remove the cell papermill put in, and live views of widgets, in place.

    Without its state a view is a line of plain text; a cell that drew its default
    with ``lesson.show`` keeps the picture only.
    """
    nb.cells = [c for c in nb.cells if "injected-parameters" not in nbfile.tags(c)]
    for cell in nb.cells:
        if cell.cell_type == "code":
            shown = [o for o in cell.outputs if nbfile.VIEW not in o.get("data", {})]
            cell.outputs = shown


def record(run: Any, profile: str) -> Path:
    """Note time and memory of a successful run in ``benchmarks/costs.json``."""
    file = repository_root() / "benchmarks" / "costs.json"
    costs = read_json(file, {})
    keep = ("seconds", "peak_memory_mb", "device", "cpu", "cores", "torch")
    costs.setdefault(run.slug, {})[profile] = {key: run.cost.get(key) for key in keep}
    return write_json(file, dict(sorted(costs.items())))


def _execute(slug: str, base: Path, profile: str) -> Any:
    from medtut.course.runner import run_lessons

    (run,) = run_lessons([slug], profile, notebooks=base, inject=False)
    if not run.ok:
        raise MedtutError(f"{slug}: the run failed, the stored notebook is unchanged")
    record(run, profile)
    metrics = read_json(run.folder / "metrics.json")
    write_json(base / "metrics" / f"{slug}.json", metrics)
    return run.nb


def main() -> None:
    """Run the command; errors meant for people are printed without a traceback."""
    parser = argparse.ArgumentParser(prog="python -m tools.notebooks")
    parser.add_argument("command", choices=("build", "check"))
    parser.add_argument("slugs", nargs="*", help="all by default")
    flag = argparse.BooleanOptionalAction
    parser.add_argument(
        "--execute", action=flag, default=True, help="run and store outputs"
    )
    parser.add_argument("--profile", default="quick", help="of the stored run")
    given = parser.parse_args()
    try:
        known = sources()
        for slug in given.slugs:
            if slug not in known:
                raise SettingsError(
                    f"no text form for {slug!r}{_did_you_mean(slug, known)}; there "
                    f"are: {', '.join(known) or 'none'}"
                )
        bad = False
        for slug in given.slugs or known:
            if given.command == "build":
                print(build_notebook(slug, None, given.execute, given.profile))
                continue
            for line in check_step(slug):
                bad = True
                print(f"{slug}: {line}")
        raise SystemExit(bad)
    except MedtutError as error:
        print(f"notebooks: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
