"""Bonus 04: settings of the notebook on ResNet, DenseNet and what weights are worth."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from medtut.course.lessons import l04
from medtut.course.lessons.common import TrainingSettings
from medtut.course.profiles import lesson_tables

PRESETS, KEY_NUMBERS = lesson_tables(__file__)
for _name, _preset in PRESETS.items():  # lesson 04's: the same drawn pictures
    for _part in ("train_patients", "test_patients"):
        _preset[_part] = l04.PRESETS[_name][_part]


class Settings(TrainingSettings):
    """What can be set in the bonus notebook; names shared with lesson 04 mean the same.

    Attributes
    ----------
    weights : "asset" (ImageNet's convolutions for VGG16, none for the others),
        "torchvision" (ImageNet's for all three, needs a network), or "random".
    seeds : runs of every arm, from `seed` on.
    rank : of every adapter.
    rate_lora, rate_full : learning rates, stated and not searched.
    longer : factor on the steps of the one run that shows what more steps bring.
    """

    weights: Literal["asset", "torchvision", "random"] = "asset"
    side: int = Field(ge=32, le=512, multiple_of=32)
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    copies: int = Field(ge=0)
    lesions: int = Field(ge=0)
    plain_share: float = Field(default=0.7, ge=0, le=1)
    drawn_share: float = Field(default=0.125, ge=0, lt=1)
    memory_mb: float = Field(default=1000, gt=0)
    folds: int = Field(default=5, ge=2)
    train_patients: int = Field(ge=14)
    test_patients: int = Field(ge=8)
    seeds: int = Field(ge=1)
    rank: int = Field(default=8, ge=1)
    rate_lora: float = Field(default=2e-3, gt=0)
    rate_full: float = Field(default=5e-4, gt=0)
    longer: int = Field(default=4, ge=1)
