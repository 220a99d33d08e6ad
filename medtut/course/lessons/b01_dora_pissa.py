"""Bonus 01: settings of the notebook on DoRA and PiSSA; the task is lesson 01's."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from medtut.course.profiles import LessonSettings

KEY_NUMBERS = [
    ("first_update_ratio", "first update, PiSSA over LoRA, same rate", "{:.2f}"),
    ("score_pissa", "Dice with PiSSA (one seed)", "{:.3f}"),
    ("score_naive_file", "its factors on the original weight, naively", "{:.3f}"),
    ("round_trip_difference", "difference after save and load", "{:.1e}"),
]


class Settings(LessonSettings):
    """What can be set in the bonus notebook on DoRA and PiSSA.

    Attributes
    ----------
    steps : optimiser steps of the three trainings.
    probe_steps : steps at every learning rate of the grid, to choose one.
    batch_size : slices per step.
    rank, alpha : the same for all three methods.
    train_slices, test_slices : drawn subjects of the target contrasts.
    rates : the grid of learning rates, the same for all three methods.
    """

    steps: int = Field(ge=1)
    probe_steps: int = Field(ge=2)
    batch_size: int = Field(ge=1)
    rank: int = Field(ge=1, le=128)
    alpha: float = Field(gt=0)
    train_slices: int = Field(ge=2)
    test_slices: int = Field(ge=2)
    rates: tuple[float, ...] = Field(min_length=1)


_COMMON = {"rank": 8, "alpha": 16.0, "batch_size": 8}
PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {
        **_COMMON,
        "steps": 4,
        "probe_steps": 3,
        "train_slices": 16,
        "test_slices": 6,
        "rates": (1e-3, 1e-2),
    },
    "quick": {
        **_COMMON,
        "steps": 80,
        "probe_steps": 20,
        "train_slices": 128,
        "test_slices": 24,
        "rates": (1e-3, 3e-3, 1e-2, 3e-2),
    },
    "full": {
        **_COMMON,
        "steps": 1000,
        "probe_steps": 100,
        "train_slices": 512,
        "test_slices": 200,
        "rates": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    },
}
