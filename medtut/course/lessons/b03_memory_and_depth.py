"""Bonus 03: settings of the notebook on memory, loss weights and attention in depth."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from medtut.course.lessons import l03
from medtut.course.profiles import lesson_tables

_, KEY_NUMBERS = lesson_tables(__file__)


class Settings(l03.Settings):
    """What can be set in the bonus notebook, beside lesson 03's.

    Attributes
    ----------
    model : LiteMedSAM only; the attention in depth is written for its layers.
    rate : learning rate of every training; None for those that lesson 03's sweep chose.
    width : of the attention in depth.
    """

    model: Literal["litemedsam"] = "litemedsam"
    rate: float | None = Field(default=None, gt=0)
    width: int = Field(default=32, ge=1)


# The lesson's own numbers of patients, so that the drawn cohort is the same.
PRESETS: dict[str, dict[str, Any]] = {
    "smoke": l03.PRESETS["smoke"],
    "quick": l03.PRESETS["quick"] | {"steps": 12, "slices": 1},
    "full": l03.PRESETS["full"]
    | {"model": "litemedsam", "side": 256, "steps": 2000, "slices": 4},
}
