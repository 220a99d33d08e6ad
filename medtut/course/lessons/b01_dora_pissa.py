"""Bonus 01: settings of the notebook on DoRA and PiSSA; the task is lesson 01's."""

from __future__ import annotations

from pydantic import Field

from medtut.course.lessons.common import TrainingSettings
from medtut.course.profiles import lesson_tables

PRESETS, KEY_NUMBERS = lesson_tables(__file__)


class Settings(TrainingSettings):
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

    probe_steps: int = Field(ge=2)
    rank: int = Field(ge=1, le=128)
    alpha: float = Field(gt=0)
    train_slices: int = Field(ge=2)
    test_slices: int = Field(ge=2)
    rates: tuple[float, ...] = Field(min_length=1)
