"""Everything that can be refused before the first kernel starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medtut.course import nbfile
from medtut.course.catalog import LessonFile, all_lessons, find_lesson, notebooks_dir
from medtut.course.files import check_writable
from medtut.course.profiles import LessonSettings, SettingsError, resolve


@dataclass
class Plan:
    """One lesson, checked and ready to run."""

    lesson: LessonFile
    settings: LessonSettings
    nb: Any
    folder: Path
    parameters: dict[str, Any]
    solved: list[str]


def chosen(
    lessons: Sequence[str | int] | None, notebooks: str | Path | None
) -> list[LessonFile]:
    """Return the lessons that names mean; None means all but the bonus ones."""
    if lessons is not None and not lessons:
        raise SettingsError("name a lesson, or --all")
    if lessons is not None:
        return list(dict.fromkeys(find_lesson(name, notebooks) for name in lessons))
    found = [one for one in all_lessons(notebooks) if not one.bonus]
    if not found:
        raise SettingsError(f"no notebooks in {notebooks_dir(notebooks)}")
    return found


def make_plan(
    lesson: LessonFile,
    profile: str,
    overrides: dict[str, Any],
    data: str | Path | None,
    base: Path,
    solve: bool,
    inject: bool,
) -> Plan:
    """Check one lesson's settings, notebook and output folder.

    Raises
    ------
    SettingsError, MedtutError
        What is wrong, and what to do.
    """
    if data is not None and not Path(data).is_dir():
        raise SettingsError(f"--data {data}: there is no such folder")
    for key, option in (("out", "--out"), ("data", "--data"), ("profile", "--profile")):
        if key in overrides:
            raise SettingsError(f"use {option} in the place of --set {key}=...")
    settings = resolve(lesson.slug, profile, overrides)
    nb = nbfile.read_notebook(lesson.path)
    if not nb.metadata.get("kernelspec", {}).get("name"):
        raise SettingsError(
            f"{lesson.path.name}: no kernelspec in its metadata; papermill needs it"
        )
    known = nbfile.parameters(nb, lesson.path.name)
    missing = sorted(set(overrides) - set(known))
    if missing:
        raise SettingsError(
            f"{lesson.path.name}: the parameters cell has no {', '.join(missing)}, so "
            "the value would be lost"
        )
    solved = put_solutions(nb) if solve else []
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    folder = base / Path(lesson.slug)
    check_writable(folder.parent)
    parameters = dict(overrides) if inject else {}
    if inject and known.get("profile") != profile:
        parameters["profile"] = profile
    return Plan(lesson, settings, nb, folder, parameters, solved)


def put_solutions(nb: Any) -> list[str]:
    """Replace every exercise cell by its solution; return the exercises' names."""
    from medtut.course.exercises import solution_source

    names = []
    for cell in nb.cells:
        name = cell.metadata.get("medtut", {}).get("exercise")
        if name and "exercise" in nbfile.tags(cell):
            cell.source = solution_source(name)
            names.append(name)
    return names
