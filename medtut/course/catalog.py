"""Which lessons there are, and which one a name means."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from medtut.course.files import repository_root
from medtut.course.profiles import SettingsError, _did_you_mean


@dataclass(frozen=True)
class LessonFile:
    """A notebook of the course: ``slug`` is its name, bonus ones start ``bonus/``."""

    slug: str
    path: Path

    @property
    def number(self) -> str:
        """The two digits the name starts with."""
        return f"{int(re.match(r'[0-9]+', self.path.name)[0]):02d}"

    @property
    def bonus(self) -> bool:
        """Whether this is an optional experiment."""
        return self.slug.startswith("bonus/")


def notebooks_dir(folder: Path | str | None = None) -> Path:
    """Return the folder of notebooks: argument, ``MEDTUT_NOTEBOOKS``, the clone's."""
    chosen = folder or os.environ.get("MEDTUT_NOTEBOOKS")
    if chosen:
        return Path(chosen).resolve()
    here = repository_root() / "notebooks"
    # Run from elsewhere, an editable install still knows its clone.
    clone = Path(__file__).resolve().parents[2] / "notebooks"
    return here if here.is_dir() or not clone.is_dir() else clone


def all_lessons(folder: Path | str | None = None) -> list[LessonFile]:
    """Return the numbered notebooks in order, then the bonus ones."""
    base = notebooks_dir(folder)
    found = [LessonFile(p.stem, p) for p in sorted(base.glob("[0-9]*.ipynb"))]
    bonus = sorted((base / "bonus").glob("[0-9]*.ipynb"))
    return found + [LessonFile(f"bonus/{p.stem}", p) for p in bonus]


def find_lesson(name: str | int, folder: Path | str | None = None) -> LessonFile:
    """Return the lesson that a number, slug or path means.

    Examples
    --------
    ``find_lesson(1)``, ``find_lesson("01")``, ``find_lesson("01_lora_math")``,
    ``find_lesson("bonus/01_dora")`` and ``find_lesson("notebooks/01_lora_math.ipynb")``
    all work.

    Raises
    ------
    SettingsError
        When no notebook fits; the message lists what there is.
    """
    lessons = all_lessons(folder)
    text = str(name).strip().replace("\\", "/").removesuffix(".ipynb")
    number = f"{int(text):02d}" if text.isdigit() else None
    for lesson in lessons:
        own = lesson.path.with_suffix("").as_posix()
        if text in (lesson.slug, own) or ("/" in text and own.endswith("/" + text)):
            return lesson
        if lesson.number == number and not lesson.bonus:
            return lesson
    slugs = [lesson.slug for lesson in lessons]
    there = ", ".join(slugs) or f"none in {notebooks_dir(folder)}"
    raise SettingsError(
        f"there is no lesson {str(name)!r}{_did_you_mean(text, slugs)}; "
        f"the lessons are: {there}"
    )


@contextlib.contextmanager
def environment(**values: str) -> Iterator[None]:
    """Set environment variables for a while.

    Kernels started meanwhile inherit them.
    """
    kept = {key: os.environ.get(key) for key in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for key, value in kept.items():
            os.environ.pop(key, None)
            os.environ.update({key: value} if value is not None else {})
