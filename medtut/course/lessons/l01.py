"""Lesson 01: settings, sweep arms and the pieces its notebook and sweep share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from medtut.course import sweep
from medtut.course.lessons import common
from medtut.course.lessons.common import TUNING_SEED
from medtut.course.profiles import lesson_tables
from medtut.data.brain_slices import SIDE, VERSION, SliceSpec, brain_slices
from medtut.errors import MedtutError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

COHORT_VERSION = VERSION

PRESETS, KEY_NUMBERS = lesson_tables(__file__)


class Settings(common.TrainingSettings):
    """What can be set in lesson 01.

    Attributes
    ----------
    steps, batch_size : of every training; a batch is of slices.
    rank, alpha : of the LoRA arm.
    train_slices, test_slices : drawn subjects of the target contrasts.
    norm_ranks : ranks of the scaling experiment, at most the model's width (256).
    toggles : merge/unmerge rounds of the drift experiment.
    """

    rank: int = Field(ge=1, le=256)
    alpha: float = Field(gt=0)
    train_slices: int = Field(ge=1)
    test_slices: int = Field(ge=2)
    norm_ranks: tuple[int, ...]
    toggles: int = Field(ge=1)


# The same grid for every arm; the rate is chosen on the validation subjects.
LEARNING_RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
# Settings in which the arms differ; the method is the arm's name up to the underscore.
# alpha = 2 r at every rank, the habit of the published configurations.
ARMS: dict[str, dict[str, Any]] = {
    "head": {},
    "lora_r1": {"rank": 1, "alpha": 2.0},
    "lora_r8": {"rank": 8, "alpha": 16.0},
    "lora_r64": {"rank": 64, "alpha": 128.0},
    "full": {},
}


@dataclass
class Task:
    """The slices of a contrast, as tensors."""

    train: torch.utils.data.TensorDataset
    validation: torch.utils.data.TensorDataset
    test: torch.utils.data.TensorDataset


def load_task(
    settings: Settings, seed: int = 0, contrasts: tuple[str, ...] = ("t2", "flair")
) -> Task:
    """Draw the three splits; `seed` moves the training subjects only.

    Every contrast gives an equal share of the slices. Validation and test subjects are
    the same for every seed, so that arms and seeds are compared on the same cases.
    """
    import torch

    def dataset(split: str, count: int, seed: int) -> torch.utils.data.TensorDataset:
        share = max(1, count // len(contrasts))
        parts = [brain_slices(SliceSpec(c, split, share, seed)) for c in contrasts]  # type: ignore[arg-type]
        return torch.utils.data.TensorDataset(
            *(
                torch.from_numpy(np.concatenate([part[key] for part in parts]))
                for key in ("image", "label")
            )
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
    from medtut.evaluate import outputs, tissue_dice

    image, label = dataset.tensors
    found = outputs(model, image, batch=32).argmax(1)
    return np.nanmean(tissue_dice(found, label, 4), axis=1)


def prepare(model: nn.Module, method: str, rank: int = 8, alpha: float = 16.0) -> None:
    """Choose what trains, in place: head, lora, dora, pissa or full.

    The low-rank methods adapt the query and value projections and train the head too,
    as the published systems of lessons 02 and 03 do.
    """
    from medtut.lora import LoRAConfig, inject

    if method in ("lora", "dora", "pissa"):
        inject(model, LoRAConfig(r=rank, alpha=alpha, variant=method))
        model.get_submodule("head").requires_grad_(True)
    elif method in ("head", "full"):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(method == "full" or name.startswith("head."))
    else:
        raise MedtutError(
            f"prepare: unknown method {method!r}; there are head, lora, dora, pissa, "
            "full."
        )


def train_arm(
    arm: str, seed: int, rate: float, settings: Settings, task: Task
) -> nn.Module:
    """Adapt the pretrained model with one arm at one learning rate."""
    import torch

    from medtut.models.vit import load_dense_vit
    from medtut.train import TrainConfig, fit

    torch.manual_seed(seed)
    model = load_dense_vit()
    prepare(model, arm.split("_")[0], settings.rank, settings.alpha)
    config = TrainConfig(
        steps=settings.steps, batch_size=settings.batch_size, lr=rate, seed=seed
    )
    fit(model, loss_fn, task.train, config, progress=False)
    return model


def tuned(arm: str, settings: Settings) -> dict[str, float]:
    """Validation Dice at every rate of the grid, on training subjects of its own."""

    def score(rate: float) -> float:
        task = load_task(settings, TUNING_SEED)
        model = train_arm(arm, TUNING_SEED, rate, settings, task)
        return float(slice_scores(model, task.validation).mean())

    unused = ("data", "test_slices", "norm_ranks", "toggles")
    return common.tuned("l01", arm, VERSION, settings, LEARNING_RATES, score, unused)


def run_arm(arm: str, seed: int, settings: Settings) -> dict[str, Any]:
    """Train one arm with one seed, at the rate the tuning subjects chose."""
    grid = tuned(arm, settings)
    task = load_task(settings, seed)
    model = train_arm(arm, seed, common.best_rate(grid), settings, task)
    return common.record(slice_scores(model, task.test), grid, model)


def chosen_rate(method: str) -> float:
    """The learning rate that the committed sweep chose on its tuning subjects."""
    arm = "lora_r8" if method in ("lora", "dora", "pissa") else method
    return sweep.chosen_rate("01_lora_math", arm)


def sweep_table(runs: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Test Dice of every arm, ``(seeds, cases)``, seeds ascending."""
    found = sweep.by_arm(runs)
    return {arm: found[arm] for arm in ARMS}


def kmeans_scores(
    dataset: torch.utils.data.TensorDataset, order: tuple[str, str, str]
) -> np.ndarray:
    """Trivial baseline: three intensity clusters per slice, named by brightness.

    Parameters
    ----------
    dataset : the slices.
    order : tissues ("csf", "grey", "white") from dark to bright. The baseline is also
        told where the brain is, so it is a generous floor.
    """
    import torch
    from sklearn.cluster import KMeans

    from medtut.evaluate import tissue_dice

    classes = np.array([("csf", "grey", "white").index(name) + 1 for name in order])
    guesses = []
    for image, label in dataset:
        inside = label > 0
        values = image[0][inside].numpy()[:, None]
        found = KMeans(3, n_init=3, random_state=0).fit(values)
        rank = found.cluster_centers_[:, 0].argsort().argsort()
        guess = torch.zeros_like(label)
        guess[inside] = torch.from_numpy(classes[rank[found.labels_]])
        guesses.append(guess)
    label = dataset.tensors[1]
    return np.nanmean(tissue_dice(torch.stack(guesses), label, 4), axis=1)


def load_bench() -> dict[str, Any]:
    """Headline ratios of ``medtut bench lora`` as committed with the course."""
    from medtut.course.files import read_json, repository_root

    path = repository_root() / "benchmarks" / "results" / "lora_swin.json"
    result = read_json(path, None)
    if result is None:
        raise MedtutError(f"{path.name} is missing: run `medtut bench lora` once.")
    steps, inference = result["step_ratio_to_peft"], result["inference_ratio_to_base"]
    return {
        "machine": result["machine"]["cpu"],
        "step_over_full": steps["medtut"] / steps["full"],
        "step_over_peft": steps["medtut"],
        "merged_over_base": inference["merged"],
        "unmerged_over_base": inference["unmerged"],
    }


def real_slice() -> Tensor:
    """One axial slice of the real patient brain1, ``(1, 96, 96)``, through MONAI.

    Raises
    ------
    AssetUnavailable
        Without a network, when the file was not fetched before.
    """
    image, mask = common.real_patient("brain1", 2.0, SIDE, mask="bilinear")
    level = int(mask.sum((0, 1, 2)).argmax())  # where the tumour is largest
    picture = image[..., level]
    inside = picture[picture > picture.mean()]
    return (picture - inside.mean()) / inside.std()
