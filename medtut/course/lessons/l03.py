"""Lesson 03: settings, sweep arms and the pieces its notebook and sweep share."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, ValidationInfo, field_validator

from medtut.course import sweep
from medtut.course.lessons import common
from medtut.course.lessons.common import TUNING_SEED
from medtut.course.lessons.sam import (
    DESIGNS,
    RANDOM,
    is_cohort,
    load_task,
    slices_of,
    train_arm,
)
from medtut.course.lessons.sam_judge import PROMPTS, judge
from medtut.course.profiles import lesson_tables
from medtut.data import brain_cohort
from medtut.data.brats import Case, load_case, save_prediction
from medtut.data.brats_men import Region, to_volume
from medtut.errors import MedtutError

COHORT_VERSION = brain_cohort.version()

PRESETS, KEY_NUMBERS = lesson_tables(__file__)


class Settings(common.PatientSettings):
    """What can be set in lesson 03.

    Attributes
    ----------
    model : litemedsam, or segment-anything's (needs `checkpoint`).
    checkpoint : file of weights; LiteMedSAM's comes with the course's assets. "random"
        takes none.
    side : pixels of the longest side as the model sees it.
    first_layer : LiteMedSAM's first adapted layer, 1 to 3; what is below runs once.
    steps, batch_size : of every training.
    jitter : of the training boxes, as a fraction of the box's side.
    slices : of a patient, trained on and judged on.
    train_patients, validation_patients, test_patients : of the drawn cohort.
    """

    model: Literal["litemedsam", "vit_b", "vit_l", "vit_h"] = "litemedsam"
    checkpoint: str | None = None
    side: int = Field(ge=64, le=1024, multiple_of=16)
    first_layer: int = Field(ge=1, le=3)
    jitter: float = Field(ge=0, lt=1)
    slices: int = Field(ge=1)

    @field_validator("side")
    @classmethod
    def _fits(cls, side: int, info: ValidationInfo) -> int:
        if info.data.get("model") == "litemedsam" and side > 256:
            raise ValueError("LiteMedSAM takes at most 256 pixels")
        return side


# One grid for the arms that are compared; the rate is chosen on validation.
LEARNING_RATES = (1e-4, 1e-3, 3e-3, 1e-2)
ARMS: dict[str, dict[str, Any]] = {name: {} for name in DESIGNS}
TUNED = ("lora", "full", "decoder", "lora_decoder")
UNTRAINED = ("zero", "zero_packed")
committed = partial(sweep.committed, "03_sam_lora")
chosen_rate = partial(sweep.chosen_rate, "03_sam_lora")


def tuned(name: str, settings: Settings) -> dict[str, float]:
    """Best validation Dice at every rate of the grid, in runs of half the length."""

    def score(rate: float) -> float:
        args = (name, TUNING_SEED, rate, settings, load_task(settings))
        half = max(1, settings.steps // 2)
        return train_arm(*args, steps=half, evaluations=1)[2].best["score"]

    args = (repr(DESIGNS[name]), COHORT_VERSION, settings, LEARNING_RATES, score)
    return common.tuned("l03", *args)


def run_arm(arm: str, seed: int, settings: Settings) -> dict[str, Any]:
    """Train one arm with one seed and judge it on the test patients.

    The rates of the arms in `TUNED` come from the grid; the others vary `lora` in one
    point and keep its rate, as one would who turns that knob alone.
    """
    grid = {"0": 0.0}
    if arm not in UNTRAINED:
        grid = tuned(arm if arm in TUNED else "lora", settings)
    task = load_task(settings)
    args = (arm, seed, common.best_rate(grid), settings, task)
    sam, encode, result = train_arm(*args)
    items = slices_of(task, "test", DESIGNS[arm], settings, seed)
    shown = PROMPTS if arm in ("zero", "lora") else PROMPTS[1:2]
    found = judge(sam, encode, items, settings, shown, seed)
    main = found["jitter 5 %"]
    return common.record(
        main.dice,
        grid,
        sam,
        result.history if result else (),
        patients=main.patients,
        scans=main.table.tolist(),
        averaged=main.mean.tolist(),
        prompts={name: one.dice.tolist() for name, one in found.items()},
        train_seconds=result.seconds if result else 0.0,
        images_encoded=encode.made,
    )


def committed_prompts(arm: str) -> dict[str, np.ndarray]:
    """Dice ``(seeds, patients)`` of the committed runs of an arm under each prompt."""
    runs = [r for r in sweep.load_sweep("03_sam_lora") if r["arm"] == arm]
    names = runs[0]["metrics"]["prompts"] if runs else ()
    return {n: np.array([r["metrics"]["prompts"][n] for r in runs]) for n in names}


def with_weights(lesson: Any) -> Settings:
    """Settings of a lesson; with random weights, and saying so, where none are."""
    from medtut.data.assets import AssetUnavailable, fetch

    settings = lesson.settings
    if settings.model == "litemedsam" and settings.checkpoint is None:
        try:
            fetch("litemedsam")
        except AssetUnavailable:
            said = "random weights, so that no number below is evidence"
            lesson.fell_back("LiteMedSAM's weights", said)
            return settings.model_copy(update={"checkpoint": RANDOM})
    return settings


def picture_settings(settings: Settings) -> Settings:
    """LiteMedSAM's own 256 pixels for pictures from elsewhere, outside of smoke."""
    small = settings.model == "litemedsam" and settings.profile != "smoke"
    return settings.model_copy(update={"side": 256}) if small else settings


def pictures(settings: Settings) -> dict[str, list[dict[str, Any]]]:
    """Pictures to try the models on, by group; items as `judge` takes them.

    The folder given as `data`, if it holds pictures with masks and not a cohort; else
    a few slices of four real patients. Pictures with an empty mask have no box and are
    left out.

    Raises
    ------
    AssetUnavailable
        Without a network, when the real patients were not fetched before.
    MedtutError
        No picture has a lesion in its mask, or what `image_folder` refuses.
    """
    from medtut.data.image_folder import REAL, find_pairs, load_pair, real_slices

    if settings.data is not None and not is_cohort(settings.data):
        groups = {"yours": [load_pair(pair) for pair in find_pairs(settings.data)]}
    else:
        groups = {name: real_slices(name) for name in REAL}
        groups = {name: items[:: -(-len(items) // 4)] for name, items in groups.items()}
    found = {
        name: [
            item | {"case": name, "modality": "", "z": k}
            for k, item in enumerate(items)
            if item["mask"].any()
        ]
        for name, items in groups.items()
    }
    if bare := [name for name, items in found.items() if not items]:
        raise MedtutError(
            f"all masks of {', '.join(bare)} are empty: no box, no prompt."
        )
    return found


def volume_viewer(case: Case, found: np.ndarray, region: Region, folder: Path) -> Any:
    """Show a scan with a found mask (Z, H, W) in niivue; the mask is written first.

    It is brought back to the grid of the case, as ``<case>-found.nii.gz``.
    """
    from ipyniivue import NiiVue

    shape = load_case(case, ("t2f",)).image.shape[1:]
    label = to_volume(found.astype(np.uint8), shape, "clean", region)
    path = save_prediction(folder / f"{case.id}-found.nii.gz", label, case)
    viewer = NiiVue()
    mask = {"path": str(path), "colormap": "warm", "opacity": 0.5}
    viewer.load_volumes([{"path": str(case.images["t2f"])}, mask])
    return viewer
