"""Lesson 02: settings, sweep arms and the pieces its notebook and sweep share."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import numpy as np
from pydantic import Field

from medtut.course import sweep
from medtut.course.lessons.medclip import (
    DESIGNS,
    held_out,
    load_task,
    predict,
    train_arm,
)
from medtut.course.profiles import LessonSettings, lesson_tables
from medtut.data import brain_cohort
from medtut.data.cache import cached_json

COHORT_VERSION = brain_cohort.version()

PRESETS, KEY_NUMBERS = lesson_tables(__file__)


class Settings(LessonSettings):
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
    steps: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    rank: int = Field(ge=1)
    alpha: float = Field(gt=0)
    dropout: float = Field(ge=0, lt=1)
    train_patients: int = Field(ge=1)
    validation_patients: int = Field(ge=1)
    test_patients: int = Field(ge=3)
    level_step: int = Field(ge=1)
    oracle_slices: int = Field(ge=2)


# The same grid for every arm; the rate is chosen on the validation patients.
LEARNING_RATES = (1e-3, 3e-3, 1e-2)
TUNING_SEED = 1000  # order and initialisation that no reported run has

# No settings differ between the arms; the designs do.
ARMS: dict[str, dict[str, Any]] = {name: {} for name in DESIGNS}
committed = partial(sweep.committed, "02_medclip_segmentation")
# Arms that do not compete take the rate of the one they vary.
RATE_OF = {"leaky": "lora"}
LEAK = ("lora", "leaky", "published")  # also scored on what their own split holds out


def tuned(name: str, settings: Settings) -> dict[str, float]:
    """Best validation Dice at every rate of the grid, in runs of half the length.

    Kept in the cache, so that the five seeds of an arm tune once.
    """
    # test_patients counts: it decides who is drawn, and who is in which part.
    size = settings.model_dump(exclude={"oracle_slices", "out", "seed", "profile"})
    key = {"arm": repr(DESIGNS[name]), "cohort": COHORT_VERSION, **size}
    key |= {"rates": LEARNING_RATES}

    def make() -> dict[str, float]:
        task = load_task(settings)
        half = max(1, settings.steps // 2)
        scores = {}
        for rate in LEARNING_RATES:
            args = (name, TUNING_SEED, rate, settings, task)
            scores[str(rate)] = train_arm(*args, steps=half)[1].best["score"]
        return scores

    return cached_json("l02_tuning", key, make)


def run_arm(arm: str, seed: int, settings: Settings) -> dict[str, Any]:
    """Train one arm with one seed, at the rate that validation chose."""
    from medtut.evaluate import case_table, score_cases

    grid = tuned(RATE_OF.get(arm, arm), settings)
    rate = float(max(grid, key=grid.__getitem__))
    task = load_task(settings)
    model, result = train_arm(arm, seed, rate, settings, task)
    cases = task.part("test")
    found = [predict(model, c, DESIGNS[arm], settings.level_step) for c in cases]
    scores = case_table(score_cases((p.label, p.truth, p.spacing) for p in found))
    evals = [row for row in result.history if "score" in row]
    own = held_out(model, arm, seed, task, settings) if arm in LEAK else None
    return {
        "score": float(scores["foreground"].mean()),
        "cases": scores["foreground"].tolist(),
        "patients": [case.id for case in cases],
        **{
            key: [None if np.isnan(v) else float(v) for v in values]
            for key, values in scores.items()
            if key != "foreground"
        },
        "own_split_published": own and own["published"],
        "own_split_foreground": own and own["without_background"],
        "lr": rate,
        "validation_by_lr": grid,
        "validation": [[row["step"], row["score"]] for row in evals],
        "validation_loss": [[r["step"], r["loss"]] for r in evals if "loss" in r],
        "best_step": result.best["step"],
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


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
    from monai import transforms as mt

    from medtut.data.assets import fetch

    files = fetch("pyradiomics-brain")
    images = {"image": files[f"{name}_image"], "mask": files[f"{name}_label"]}
    both = tuple(images)
    read = mt.Compose(
        [
            mt.LoadImaged(both, ensure_channel_first=True),
            mt.Orientationd(both, "RAS", labels=None),
            mt.Spacingd(both, (1.0, 1.0, -1.0), mode=("bilinear", "nearest")),
            mt.ResizeWithPadOrCropd(both, (240, 240, -1)),
            mt.Resized(both, (224, 224, -1), mode=("trilinear", "nearest")),
            mt.Rotate90d(both),
        ]
    )
    found = read(images)
    image, mask = (found[key].as_tensor()[0].permute(2, 0, 1) for key in both)
    inside = image > 0.1 * torch.quantile(image[image > 0], 0.99)
    scaled = (image - image[inside].mean()) / image[inside].std()
    return torch.where(inside, scaled, 0.0).float(), mask > 0.5
