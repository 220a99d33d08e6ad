"""Lesson 02: settings, sweep arms and the pieces its notebook and sweep share."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import numpy as np
from pydantic import Field

from medtut.course import sweep
from medtut.course.lessons import common
from medtut.course.lessons.common import TUNING_SEED
from medtut.course.lessons.medclip import (
    DESIGNS,
    held_out,
    load_task,
    predict,
    train_arm,
)
from medtut.course.profiles import lesson_tables
from medtut.data import brain_cohort

COHORT_VERSION = brain_cohort.version()

PRESETS, KEY_NUMBERS = lesson_tables(__file__)


class Settings(common.PatientSettings):
    """What can be set in lesson 02.

    Attributes
    ----------
    tower : small is the course's own, tiny is MedCLIP's (needs its weights).
    steps, batch_size : of every training.
    rank, alpha, dropout : of the LoRA arms; the published values are the defaults.
    train_patients, validation_patients, test_patients : of the drawn cohort.
    level_step : every how many axial levels a slice is used, in training and judging.
    oracle_slices : slices of the experiment on the output grid.
    """

    tower: Literal["small", "tiny"] = "small"
    rank: int = Field(ge=1)
    alpha: float = Field(gt=0)
    dropout: float = Field(ge=0, lt=1)
    level_step: int = Field(ge=1)
    oracle_slices: int = Field(ge=2)


# The same grid for every arm; the rate is chosen on the validation patients.
LEARNING_RATES = (1e-3, 3e-3, 1e-2)

# No settings differ between the arms; the designs do.
ARMS: dict[str, dict[str, Any]] = {name: {} for name in DESIGNS}
committed = partial(sweep.committed, "02_medclip_segmentation")
# Arms that do not compete take the rate of the one they vary.
RATE_OF = {"leaky": "lora"}
LEAK = ("lora", "leaky", "published")  # also scored on what their own split holds out


def tuned(name: str, settings: Settings) -> dict[str, float]:
    """Best validation Dice at every rate of the grid, in runs of half the length."""

    def score(rate: float) -> float:
        args = (name, TUNING_SEED, rate, settings, load_task(settings))
        return train_arm(*args, steps=max(1, settings.steps // 2))[1].best["score"]

    # test_patients counts: it decides who is drawn, and who is in which part.
    args = (repr(DESIGNS[name]), COHORT_VERSION, settings, LEARNING_RATES, score)
    return common.tuned("l02", *args, unused=("oracle_slices",))


def run_arm(arm: str, seed: int, settings: Settings) -> dict[str, Any]:
    """Train one arm with one seed, at the rate that validation chose."""
    from medtut.evaluate import case_table, score_cases

    grid = tuned(RATE_OF.get(arm, arm), settings)
    task = load_task(settings)
    model, result = train_arm(arm, seed, common.best_rate(grid), settings, task)
    cases = task.part("test")
    found = [predict(model, c, DESIGNS[arm], settings.level_step) for c in cases]
    scores = case_table(score_cases((p.label, p.truth, p.spacing) for p in found))
    foreground = scores.pop("foreground")
    evals = [row for row in result.history if "loss" in row and "score" in row]
    own = held_out(model, arm, seed, task, settings) if arm in LEAK else None
    return common.record(
        foreground,
        grid,
        model,
        result.history,
        patients=[case.id for case in cases],
        own_split_published=own and own["published"],
        own_split_foreground=own and own["without_background"],
        validation_loss=[[row["step"], row["loss"]] for row in evals],
        best_step=result.best["step"],
        **{
            key: [None if np.isnan(v) else float(v) for v in values]
            for key, values in scores.items()
        },
    )


def chosen_rate(arm: str) -> float:
    """The learning rate that the committed sweep chose on validation."""
    return sweep.chosen_rate("02_medclip_segmentation", RATE_OF.get(arm, arm))


def real_patient(name: str) -> tuple[Any, Any]:
    """A real scan as slices: images (Z, 224, 224) and tumour mask, both tensors.

    ``brain1`` or ``brain2`` of the PyRadiomics test data: T1 with contrast agent and
    with the skull, brought to the field of view of BraTS (240 mm) and normalised over
    what is brighter than a tenth of its 99th percentile.

    Raises
    ------
    AssetUnavailable
        Without a network, when the file was not fetched before.
    """
    import torch
    from monai.transforms import Resized

    to_224 = Resized(("image", "label"), (224, 224, -1), mode=("trilinear", "nearest"))
    both = common.real_patient(name, 1.0, 240, to_224)
    image, mask = (volume[0].permute(2, 0, 1) for volume in both)
    inside = image > 0.1 * torch.quantile(image[image > 0], 0.99)
    scaled = (image - image[inside].mean()) / image[inside].std()
    return torch.where(inside, scaled, 0.0).float(), mask > 0.5
