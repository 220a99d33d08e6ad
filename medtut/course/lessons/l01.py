"""Lesson 01: settings, sweep arms and the pieces its notebook and sweep share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from medtut.course.profiles import LessonSettings
from medtut.data.brain_slices import VERSION, SliceSpec, brain_slices
from medtut.errors import MedtutError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

COHORT_VERSION = VERSION

KEY_NUMBERS = [
    ("zero_shot_score", "Dice on T2 before adapting", "{:.3f}"),
    ("lora_r8_score", "after LoRA (rank 8, one seed)", "{:.3f}"),
    ("full_score", "after full fine-tuning (one seed)", "{:.3f}"),
    ("trainable_fraction", "parameters trained by LoRA", "{:.2%}"),
    ("norm_slope_unscaled", "exponent of ‖ΔW‖ over rank, unscaled", "{:.2f}"),
]


class Settings(LessonSettings):
    """What can be set in lesson 01.

    Attributes
    ----------
    steps : optimiser steps of every training.
    batch_size : slices per step.
    rank, alpha : of the LoRA arm.
    train_slices, test_slices : drawn subjects of the target contrast.
    norm_ranks : ranks of the scaling experiment, at most the model's width (256).
    toggles : merge/unmerge rounds of the drift experiment.
    """

    steps: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    rank: int = Field(ge=1, le=256)
    alpha: float = Field(gt=0)
    train_slices: int = Field(ge=1)
    test_slices: int = Field(ge=2)
    norm_ranks: tuple[int, ...]
    toggles: int = Field(ge=1)


_COMMON = {"rank": 8, "alpha": 16.0, "batch_size": 8}
PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {
        **_COMMON,
        "steps": 4,
        "train_slices": 16,
        "test_slices": 6,
        "norm_ranks": (4, 64, 256),
        "toggles": 50,
    },
    "quick": {
        **_COMMON,
        "steps": 120,
        "train_slices": 64,
        "test_slices": 40,
        "norm_ranks": (4, 8, 16, 32, 64, 128, 256),
        "toggles": 1000,
    },
    "full": {
        **_COMMON,
        "steps": 1000,
        "train_slices": 512,
        "test_slices": 200,
        "norm_ranks": (4, 8, 16, 32, 64, 128, 256),
        "toggles": 1000,
    },
}

# The same grid for every arm; the rate is chosen on the validation subjects.
LEARNING_RATES = (3e-4, 1e-3, 3e-3)
ARMS: dict[str, dict[str, Any]] = {
    "head": {"method": "head"},
    "lora_r1": {"method": "lora", "rank": 1},
    "lora_r8": {"method": "lora", "rank": 8},
    "lora_r64": {"method": "lora", "rank": 64},
    "dora_r8": {"method": "dora", "rank": 8},
    "pissa_r8": {"method": "pissa", "rank": 8},
    "full": {"method": "full"},
}


@dataclass
class Task:
    """The slices of the target contrast, as tensors."""

    train: torch.utils.data.TensorDataset
    validation: torch.utils.data.TensorDataset
    test: torch.utils.data.TensorDataset


def load_task(settings: Settings, seed: int = 0, contrast: str = "t2") -> Task:
    """Draw the three splits; `seed` moves the training subjects only.

    Validation and test subjects are the same for every seed, so that arms and seeds
    are compared on the same cases.
    """
    import torch

    def dataset(split: str, count: int, seed: int) -> torch.utils.data.TensorDataset:
        arrays = brain_slices(SliceSpec(contrast, split, count, seed=seed))  # type: ignore[arg-type]
        return torch.utils.data.TensorDataset(
            torch.from_numpy(arrays["image"]), torch.from_numpy(arrays["label"])
        )

    return Task(
        train=dataset("train", settings.train_slices, seed),
        validation=dataset("validation", max(4, settings.test_slices // 2), 0),
        test=dataset("test", settings.test_slices, 0),
    )


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy over all pixels."""
    from torch.nn import functional as F

    image, label = batch
    return F.cross_entropy(model(image), label)


def slice_scores(
    model: nn.Module, dataset: torch.utils.data.TensorDataset
) -> np.ndarray:
    """Mean foreground Dice of every slice, ``(cases,)``; absent tissues left out."""
    import torch

    from medtut.evaluate import tissue_dice

    image, label = dataset.tensors
    training = model.training
    model.eval()
    with torch.no_grad():
        device = next(model.parameters()).device
        logits = [model(part.to(device)).cpu() for part in image.split(32)]
    model.train(training)
    return np.nanmean(tissue_dice(torch.cat(logits).argmax(1), label, 4), axis=1)


def prepare(model: nn.Module, method: str, rank: int = 8, alpha: float = 16.0) -> None:
    """Choose what trains, in place: head, lora, dora, pissa or full.

    The low-rank methods adapt the query and value projections, as the published
    systems of lessons 02 and 03 do, and leave the head as it is.
    """
    from medtut.lora import LoRAConfig, inject

    if method in ("lora", "dora", "pissa"):
        inject(model, LoRAConfig(r=rank, alpha=alpha, variant=method))
    elif method in ("head", "full"):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(method == "full" or name.startswith("head."))
    else:
        raise MedtutError(
            f"prepare: unknown method {method!r}; there are head, lora, dora, pissa, "
            "full."
        )


def run_arm(arm: str, seed: int, settings: Settings) -> dict[str, Any]:
    """Train one arm at every learning rate of the grid and test the chosen one."""
    import torch

    from medtut.models.vit import load_dense_vit
    from medtut.train import TrainConfig, fit

    task = load_task(settings, seed)
    choice = ARMS[arm]
    # alpha = 2 r at every rank, the habit of the published configurations.
    rank = choice.get("rank", settings.rank)
    runs = []
    for rate in LEARNING_RATES:
        torch.manual_seed(seed)
        model = load_dense_vit()
        prepare(model, choice["method"], rank, alpha=2.0 * rank)
        config = TrainConfig(
            steps=settings.steps, batch_size=settings.batch_size, lr=rate, seed=seed
        )
        fit(model, loss_fn, task.train, config, progress=False)
        runs.append(
            {
                "lr": rate,
                "validation": float(slice_scores(model, task.validation).mean()),
                "test": slice_scores(model, task.test).tolist(),
            }
        )
    best = max(runs, key=lambda run: run["validation"])
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {
        "score": float(np.mean(best["test"])),
        "cases": best["test"],
        "lr": best["lr"],
        "validation_by_lr": {str(run["lr"]): run["validation"] for run in runs},
        "trainable": trained,
    }
