"""``medtut run``: lessons, headlessly, through papermill.

Everything that can be refused is refused before the first kernel starts. A run works
in ``<slug>.partial`` and takes the place of an earlier result only when it succeeded.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medtut import machine
from medtut.course import engine, files, nbfile
from medtut.course.catalog import environment, notebooks_dir
from medtut.course.plan import Plan, chosen, make_plan
from medtut.course.profiles import choose_profile, profile_table
from medtut.course.render import to_html
from medtut.course.report import memory, minutes, write_index
from medtut.files import read_json, write_json, write_text


@dataclass
class LessonRun:
    """The result of running one lesson.

    Attributes
    ----------
    slug : str
    ok : bool
    folder : Path
        The finished folder, or the ``.partial`` one of a failed run.
    errors : list of str
    cost : dict
        What ``cost.json`` holds.
    nb : notebook
        As executed and cleaned.
    """

    slug: str
    ok: bool
    folder: Path
    errors: list[str]
    cost: dict[str, Any]
    nb: Any


def run_lessons(
    lessons: Sequence[str | int] | None = None,
    profile: str | None = None,
    overrides: dict[str, Any] | None = None,
    data: str | Path | None = None,
    out: str | Path | None = None,
    solve: bool = False,
    timeout: float | None = None,
    progress: bool = True,
    *,
    notebooks: str | Path | None = None,
    inject: bool = True,
    console: Any = None,
) -> list[LessonRun]:
    """Run lessons and write executed notebook, HTML, figures, numbers and cost.

    Parameters
    ----------
    lessons : sequence of str or int, optional
        Numbers, slugs or paths; None runs every notebook, without the bonus ones.
    profile : {"smoke", "quick", "full"}, optional
        Default: ``MEDTUT_PROFILE``, else quick. Given here, it beats the variable.
    overrides : dict, optional
        Settings of the lessons, as in ``--set``.
    data : path, optional
        Folder of the user's own data set.
    out : path, optional
        In the place of ``build``.
    solve : bool
        Put the solutions into the exercises; then every check must pass.
    timeout : float, optional
        Seconds per cell; default from ``profiles.yml``.
    progress : bool
        Show a bar that moves with the cells.
    notebooks : path, optional
        Another folder of notebooks.
    inject : bool
        Write profile and overrides into the notebook below its parameters; without,
        the profile travels in the environment only.

    Returns
    -------
    list of LessonRun
        A failing lesson does not stop the others.

    Raises
    ------
    SettingsError, MedtutError
        Before anything runs: unknown lesson, profile or setting, a value of the
        wrong type, a folder that cannot be written, a notebook without kernelspec.
    """
    from rich.console import Console

    console = console or Console(stderr=True)
    passed = {"MEDTUT_PROFILE": profile or choose_profile()}
    if notebooks:
        passed["MEDTUT_NOTEBOOKS"] = str(notebooks_dir(notebooks))
    if data is not None:
        passed["MEDTUT_DATA"] = str(Path(data).resolve())
    with environment(**passed):
        name = choose_profile()
        base = Path(out or files.repository_root() / "build").resolve() / name
        files.check_cache()
        rest = (name, dict(overrides or {}), data, base, solve, inject)
        plans = [make_plan(lesson, *rest) for lesson in chosen(lessons, notebooks)]
        limit = timeout or profile_table()[name]["cell_timeout"]
        runs = [_run(plan, limit, progress, console) for plan in plans]
        index = write_index(base, name)
    console.print(f"Overview: {index}", soft_wrap=True, highlight=False)
    return runs


def _run(plan: Plan, timeout: float, progress: bool, console: Any) -> LessonRun:
    work, slug = _workplace(plan), plan.lesson.slug
    source = work / "input.partial.ipynb"
    target = work / plan.lesson.path.name
    nbfile.write_notebook(plan.nb, source)
    bar = _bar(plan, progress, console)
    given, cwd = plan.parameters, plan.lesson.path.parent
    with environment(MEDTUT_OUT=str(work)), bar as on_cell:
        done = engine.execute(
            source, target, parameters=given, cwd=cwd, timeout=timeout, on_cell=on_cell
        )
    source.unlink(missing_ok=True)
    errors = _errors(plan, done, work)
    cost = _cost(plan, done, work)
    write_json(work / "cost.json", cost)
    if done.nb is not None:
        shown = f"build/{plan.settings.profile}/{slug}"
        places = {work: shown, files.repository_root(): ".", Path.home(): "~"}
        nbfile.clean(done.nb, {str(k): v for k, v in places.items() if k.parts[1:]})
        nbfile.write_notebook(done.nb, target)
    said = f"{slug} ({plan.settings.profile})"
    if errors:
        say = [f"{said} FAILED", *errors]
        if target.is_file():
            say.append(f"The notebook as far as it came: {target}")
        if plan.folder.is_dir():
            say.append(f"The result of an earlier run is left as it was: {plan.folder}")
        console.print("\n".join(say), markup=False, highlight=False, soft_wrap=True)
        return LessonRun(slug, False, work, errors, cost, done.nb)
    write_text(target.with_suffix(".html"), to_html(done.nb, cost["title"]))
    (work / "run.json").unlink(missing_ok=True)
    files.replace_folder(work, plan.folder)
    used = f"{minutes(cost['seconds'])}, {memory(cost['peak_memory_mb'])}"
    console.print(f"{said}: {used}")
    return LessonRun(slug, True, plan.folder, [], cost, done.nb)


def _workplace(plan: Plan) -> Path:
    """Return the ``.partial`` folder; one left by the same run is gone on with."""
    work = plan.folder.with_name(plan.folder.name + ".partial")
    text = "\n".join(cell.source for cell in plan.nb.cells)
    digest = hashlib.sha256(text.encode("utf-8")).hexdigest()
    key = {"settings": plan.settings.model_dump(mode="json"), "notebook": digest}
    if work.exists() and read_json(work / "run.json") != key:
        shutil.rmtree(work, ignore_errors=True)
    files.check_writable(work)
    # Numbers of the broken-off run must not be read as this one's.
    for name in ("metrics.json", "metrics.previous.json", "figures.json"):
        (work / name).unlink(missing_ok=True)
    write_json(work / "run.json", key)
    return work


def _errors(plan: Plan, done: engine.Execution, work: Path) -> list[str]:
    found = [str(error) for error in nbfile.find_errors(done.nb)] if done.nb else []
    if done.error and not any(done.error in text for text in found):
        found.insert(0, str(nbfile.error_at(done.nb, done.cell, done.error)))
    if found:
        return found
    if skipped := nbfile.not_executed(done.nb) if done.nb else []:
        return [f"cell {index + 1} was not run" for index in skipped]
    if read_json(work / "metrics.json", {}).get("status") != "complete":
        return ["the notebook never called lesson.finish()"]
    if not plan.solved:
        return []
    from medtut.course.exercises import outcomes_in

    said = outcomes_in(done.nb)
    told = {name: said.get(name, "never checked") for name in plan.solved}
    wrong = {name: status for name, status in told.items() if status != "correct"}
    return [f"exercise {n}: its solution is {s}, not correct" for n, s in wrong.items()]


def _heading(cell: Any, level: str = "#+") -> str:
    """Return the first heading in a Markdown cell, "" if there is none."""
    match = re.search(rf"^{level}\s+(.+)$", cell.source, re.MULTILINE)
    return match[1].strip() if match and cell.cell_type == "markdown" else ""


def _cost(plan: Plan, done: engine.Execution, work: Path) -> dict[str, Any]:
    result = read_json(work / "metrics.json", {})
    here = {**machine.describe_machine(), **result.get("machine", {})}
    inside = float(result.get("peak_memory_mb", 0.0))
    titles = filter(None, (_heading(cell, "#") for cell in plan.nb.cells))
    return {
        "lesson": plan.lesson.slug,
        "title": next(titles, plan.lesson.slug),
        "profile": plan.settings.profile,
        "seconds": round(done.seconds, 1),
        "peak_memory_mb": round(max(done.peak_mb, inside), 1),
        **{key: here[key] for key in ("device", "cpu", "cores")},
        "torch": machine.versions().get("torch"),
        "cells": done.cell_seconds,
    }


@contextlib.contextmanager
def _bar(plan: Plan, progress: bool, console: Any) -> Iterator[Any]:
    total = len(plan.nb.cells) + bool(plan.parameters)
    if not progress or not console.is_terminal:
        console.print(f"{plan.lesson.slug} ({plan.settings.profile}): {total} cells")
        yield None
        return
    from rich import progress as show
    from rich.markup import escape

    columns = ("{task.description}", show.BarColumn(), show.MofNCompleteColumn())
    columns += ("cells", show.TimeElapsedColumn(), "{task.fields[heading]}")
    with show.Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(plan.lesson.slug, total=total, heading="")

        def on_cell(index: int, cell: Any) -> None:
            if heading := escape(_heading(cell)[:40]):
                bar.update(task, heading=heading)
            bar.update(task, completed=index)

        yield on_cell
