"""Bonus 02: settings of the notebook on two branches; the task is lesson 02's."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from medtut.course.lessons import l02
from medtut.course.profiles import lesson_tables

_, KEY_NUMBERS = lesson_tables(__file__)


class Settings(l02.Settings):
    """What can be set in the bonus notebook on two branches, beside lesson 02's.

    Attributes
    ----------
    rate : learning rate of both arms; None for the one the sweep chose for LoRA.
    width : channels of the local branch, a multiple of 4.
    """

    rate: float | None = Field(default=None, gt=0)
    width: int = Field(default=16, ge=4, multiple_of=4)


# The lesson's own sizes, so that the drawn patients and its LoRA run are the same.
PRESETS: dict[str, dict[str, Any]] = l02.PRESETS
