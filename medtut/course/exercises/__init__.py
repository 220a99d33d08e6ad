"""Exercises: a card, a check with four outcomes, three hints, a solution on request.

In a notebook::

    from medtut.course.exercises import exercise
    q = exercise("01.1")          # shows the card
    q.check(scaled_update)        # correct, incorrect, misconception, not attempted
    q.hint(); q.hint(2); q.solution()

The runner's ``--solve`` takes the text for an answer cell from `solution_source` and
reads what the checks said from the executed notebook with `outcomes_in`.
"""

from __future__ import annotations

import importlib
from typing import Any

from medtut.course.exercises.cards import OUTCOME_MIME, Card, Outcome
from medtut.course.exercises.engine import Case, Exercise, Misconception
from medtut.errors import MedtutError

__all__ = [
    "OUTCOME_MIME",
    "Card",
    "Case",
    "Exercise",
    "ExerciseError",
    "Misconception",
    "Outcome",
    "exercise",
    "exercises_of",
    "outcomes_in",
    "solution_source",
    "stub_source",
]


class ExerciseError(MedtutError):
    """An exercise that does not exist was asked for."""


def exercises_of(lesson: str | int) -> dict[str, Exercise]:
    """Return the exercises of a lesson by id.

    Parameters
    ----------
    lesson : str or int
        "01_lora_math", "01" or 1.

    Returns
    -------
    dict
        Fresh `Exercise` objects, in the order of the lesson; empty when the lesson
        has none.
    """
    number = str(lesson).split("_")[0].split(".")[0]
    if not (number.isascii() and number.isdigit()):
        raise ExerciseError(f"{lesson!r} is no lesson; write it as 1, '01' or a slug.")
    name = f"medtut.course.exercises.ex{int(number):02d}"
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        return {}
    return {one.id: one for one in module.make()}


def _find(exercise_id: str) -> Exercise:
    known = exercises_of(str(exercise_id).split(".")[0])
    if exercise_id not in known:
        listed = ", ".join(known) or "none for that lesson"
        raise ExerciseError(
            f"There is no exercise {exercise_id!r}. There are: {listed}."
        )
    return known[exercise_id]


def exercise(exercise_id: str) -> Exercise:
    """Return an exercise and show its card.

    Parameters
    ----------
    exercise_id : str
        Such as "01.1".

    Raises
    ------
    ExerciseError
        If there is none with that id; the message lists those of the lesson.
    """
    found = _find(exercise_id)
    found.card.show()
    return found


def solution_source(exercise_id: str) -> str:
    """Return the text that solves an answer cell (`torch` and `math` are imported)."""
    return _find(exercise_id).solution_source()


def stub_source(exercise_id: str) -> str:
    """Return the text of an untouched answer cell."""
    return _find(exercise_id).stub()


def outcomes_in(notebook: Any) -> dict[str, str]:
    """Read what the checks said from an executed notebook.

    Parameters
    ----------
    notebook : nbformat.NotebookNode or dict
        An executed notebook, version 4.

    Returns
    -------
    dict
        Exercise id to status; the last check of an exercise counts.
    """
    said: dict[str, str] = {}
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            found = output.get("data", {}).get(OUTCOME_MIME)
            if found:
                said[found["exercise"]] = found["status"]
    return said
