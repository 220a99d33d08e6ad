"""Lesson 04: settings, sweep arms and the pieces its notebook and sweep share."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from medtut.course import sweep
from medtut.course.lessons import common
from medtut.course.lessons.common import TUNING_SEED
from medtut.course.lessons.vgg import (
    DESIGNS,
    by_case,
    probabilities,
    train_arm,
)
from medtut.course.lessons.vgg_pictures import Task, load_task
from medtut.course.profiles import LessonSettings, lesson_tables
from medtut.data import brain_cohort, mri_augment

if TYPE_CHECKING:
    from medtut.models.prefix import PrefixCache

COHORT_VERSION = ".".join(
    str(v)
    for v in (
        brain_cohort.version(),
        brain_cohort.recipe()["pictures"]["version"],
        mri_augment.VERSION,
    )
)

PRESETS, KEY_NUMBERS = lesson_tables(__file__)


class Settings(LessonSettings):
    """What can be set in lesson 04.

    Attributes
    ----------
    weights : "asset" (the course's ImageNet convolutions), "torchvision" (all of
        VGG16, needs a network), a file, or "random".
    side : pixels of a picture as the model sees it.
    width, hidden : of the convolutions, as a fraction of VGG16's, and of the two
        large linear layers, in units.
    first_block : first block of convolutions that gets adapters, 1 to 5; what lies
        below runs once.
    epochs, batch_size, precision : of every training; "auto" is bfloat16 where the
        machine computes in it.
    copies : looks of other scanners of every training picture.
    lesions : drawn gliomas, and drawn meningiomas, for each picture without tumour.
    plain_share : of the training items that are sure to show a picture as it is.
    drawn_share : of the training items that show a drawn lesion.
    members : models whose probabilities are averaged in the final answer.
    memory_mb : of features kept in memory; the others are read from the cache.
    folds : of Training, of which the first is the validation part.
    train_patients, test_patients : of the drawn pictures.
    """

    weights: str = "asset"
    side: int = Field(ge=32, le=512, multiple_of=32)
    width: float = Field(default=1.0, gt=0, le=1)
    hidden: int = Field(ge=8)
    first_block: int = Field(ge=1, le=5)
    epochs: float = Field(gt=0)
    batch_size: int = Field(ge=1)
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    copies: int = Field(ge=0)
    lesions: int = Field(ge=0)
    plain_share: float = Field(default=0.7, ge=0, le=1)
    drawn_share: float = Field(default=0.125, ge=0, lt=1)
    members: int = Field(ge=1)
    memory_mb: float = Field(default=1500, gt=0)
    folds: int = Field(default=5, ge=2)
    train_patients: int = Field(ge=14)
    test_patients: int = Field(ge=8)


# One grid for the arms that are compared; the rate is chosen on validation. All weights
# together want smaller ones than adapters: at 2e-4 they fell to nearly one answer.
LEARNING_RATES = (2e-4, 1e-3, 5e-3)
FULL_RATES = (1e-5, 3e-5, 1e-4)
GRIDS = {"grid_published": "published", "grid_pooled": "pooled"}
ARMS: dict[str, dict[str, Any]] = {name: {} for name in (*DESIGNS, *GRIDS)}
committed = partial(sweep.committed, "04_vgg16_lora")
chosen_rate = partial(sweep.chosen_rate, "04_vgg16_lora")


def tuned(name: str, settings: Settings) -> dict[str, float]:
    """Best validation score at every rate of the grid, in runs of half the length."""

    def score(rate: float) -> float:
        args = (name, TUNING_SEED, rate, settings, load_task(settings))
        result = train_arm(*args, epochs=settings.epochs / 2, evaluations=1)[1]
        return result.best["score"]

    rates = FULL_RATES if DESIGNS[name].where == "full" else LEARNING_RATES
    args = (repr(DESIGNS[name]), COHORT_VERSION, settings, rates, score)
    return common.tuned("l04", *args, unused=("members", "memory_mb"))


def run_arm(arm: str, seed: int, settings: Settings) -> dict[str, Any]:
    """Train one arm with one seed and judge it on ``Testing``.

    Returns
    -------
    dict
        As `common.record`; ``cases`` is right or wrong by picture, weighted so that
        its mean is the balanced accuracy. With ``probabilities``, (N, 4); for a grid
        with its ``table`` in the place of rates.
    """
    task = load_task(settings)
    if arm in GRIDS:
        from medtut.course.lessons.vgg_trials import grid_search

        found = grid_search(task, settings, seed, GRIDS[arm])
        cases = found["cases"]
        score, table = float(cases.mean()), found["table"]
        return {"score": score, "cases": cases.tolist(), "lr": None, "table": table}
    grid = tuned(arm, settings)
    rate = common.best_rate(grid)
    cache, result = train_arm(arm, seed, rate, settings, task)
    found = probabilities(cache, task.images[task.test], settings)
    truth = task.labels[task.test]
    cases = by_case(found.argmax(1), truth)
    return common.record(
        cases,
        grid,
        cache.encoder,
        result.history,
        probabilities=np.round(found, 5).tolist(),
        train_seconds=result.seconds,
    )


# On the real pictures: chosen on a part of their Training folder held out by source.
REAL_RATES = {"lora_linear": 1e-3}
OTHER_RATE = 2e-3
# What a folder of thousands of pictures gets in quick, in the place of the preset.
OWN = {"lesions": 1, "folds": 20}
REPORTED = ("accuracy", "balanced_accuracy", "macro_f1")


def rate_of(arm: str, settings: Settings) -> float:
    """The committed sweep's choice for drawn pictures; `REAL_RATES` for others."""
    real = REAL_RATES.get(arm, OTHER_RATE)
    return chosen_rate(arm) if settings.data is None else real


def committed_tables(arm: str) -> list[list[dict[str, Any]]]:
    """The tables of the committed grid searches of an arm, one a seed."""
    runs = sweep.load_sweep("04_vgg16_lora")
    return [r["metrics"]["table"] for r in runs if r["arm"] == arm]


def committed_probabilities(arm: str) -> np.ndarray:
    """(seeds, N, 4) on the drawn test pictures, of the committed runs of an arm."""
    runs = sweep.load_sweep("04_vgg16_lora")
    found = [r["metrics"]["probabilities"] for r in runs if r["arm"] == arm]
    p = np.array(found).clip(1e-9)
    return p / p.sum(-1, keepdims=True)


def with_weights(lesson: Any) -> Settings:
    """Settings of a lesson, with `OWN` for a folder of one's own.

    With random weights, and saying so, where no others are.
    """
    from medtut.data.assets import AssetUnavailable, fetch

    settings = lesson.settings
    if settings.data is not None and settings.profile == "quick":
        usual = {key: Settings.model_fields[key].default for key in OWN}
        usual |= PRESETS["quick"]
        free = [key for key in OWN if getattr(settings, key) == usual[key]]
        settings = settings.model_copy(update={key: OWN[key] for key in free})
    if settings.weights == "asset":
        try:
            fetch("vgg16-imagenet-conv")
        except AssetUnavailable:
            said = "random weights, so that no number below is evidence"
            lesson.fell_back("ImageNet's convolutions", said)
            return settings.model_copy(update={"weights": "random"})
    return settings


@dataclass
class Answer:
    """What the members of an arm say together.

    Attributes
    ----------
    probabilities, validation : (N, 4), means over the members, on test and validation.
    first : (N, 4) on test of the first member alone, without mirroring.
    cache : of the first member; its ``encoder`` is the model.
    members : how many there are.
    """

    probabilities: np.ndarray
    validation: np.ndarray
    first: np.ndarray
    cache: PrefixCache
    members: int

    @property
    def model(self) -> Any:
        """The first member."""
        return self.cache.encoder

    def save(self, folder: Path) -> int:
        """Write the first member's adapter and head; return the size in bytes."""
        from medtut.lora import save_adapter
        from medtut.models.vgg import head_name

        save_adapter(self.model, folder, extra=[head_name(self.model)])
        return sum(f.stat().st_size for f in folder.glob("*.safetensors"))


def final_answer(
    arm: str,
    settings: Settings,
    task: Task,
    seed: int,
    below: PrefixCache | None = None,
    progress: bool = False,
) -> Answer:
    """Train an arm's members and average their answers, over mirrored pictures too.

    The first member has the lesson's seed, so that it repeats the committed run. Where
    the arm has a sister that learns from pictures as they are only (``_plain``), the
    last member is that one, with half of the vote: it is the surer one on pictures like
    those of Training, the others on pictures unlike them. On a folder of one's own the
    weights at the end of the schedule are taken: validation, of the same sources as
    Training, picks by a few pictures.

    Parameters
    ----------
    below : cache of an arm with less frozen, see `train_arm`.
    """
    names = [arm] * settings.members
    votes = np.full(settings.members, 1 / settings.members)
    if f"{arm}_plain" in DESIGNS and settings.members > 1:
        names[-1] = f"{arm}_plain"
        votes = np.array([0.5 / (len(names) - 1)] * (len(names) - 1) + [0.5])
    first: Any = None
    both: dict[str, Any] = {"test": 0, "validation": 0}
    for k, (name, vote) in enumerate(zip(names, votes, strict=True)):
        cache, _ = train_arm(
            name, seed + k, rate_of(name, settings), settings, task,
            below=below, progress=progress,
            evaluations=3 if settings.data is None else 1,
        )  # fmt: skip
        for part in both:
            images = task.images[getattr(task, part)]
            plain = probabilities(cache, images, settings)
            if first is None:  # "test" comes first
                first = plain, cache
            mirrored = probabilities(cache, images[:, :, ::-1].copy(), settings)
            both[part] = both[part] + vote * (plain + mirrored) / 2
    return Answer(both["test"], both["validation"], *first, settings.members)


def epoch_speed(model: Any, cache: Any, x: Any) -> float:
    """How many times as fast a training step is from the cache; CPU time, taking turns.

    Both take the gradient of the same sum, on one thread, since a thread that waits
    counts as busy; the fastest of three turns counts.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    spent: dict[str, list[float]] = {"plain": [], "cached": []}
    model.train()
    for _ in range(3):
        for name, run in (("plain", model), ("cached", cache)):
            began = time.process_time()
            run(x).square().mean().backward()
            spent[name].append(time.process_time() - began)
    torch.set_num_threads(threads)
    model.eval()
    model.zero_grad()
    tick = time.get_clock_info("process_time").resolution  # 16 ms on Windows
    return min(spent["plain"]) / max(min(spent["cached"]), tick)


def with_svd(
    answer: Answer, rank: int, task: Task, settings: Settings
) -> tuple[float, float]:
    """Error of the first linear cut to a rank, and the balanced accuracy with it."""
    from torch import nn

    from medtut.lora import delta_weight
    from medtut.models.prefix import PrefixCache
    from medtut.models.published_vgg import truncated_svd

    model = copy.deepcopy(answer.model)
    adapted = model.classifier[0]
    whole = nn.Linear(adapted.weight.shape[1], adapted.weight.shape[0])
    whole.weight.data = adapted.weight.data + delta_weight(adapted).detach()
    whole.bias.data = adapted.bias.data
    model.classifier[0], error = truncated_svd(whole, rank)
    model.requires_grad_(False)
    found = probabilities(PrefixCache(model), task.images[task.test], settings)
    truth = task.labels[task.test]
    return error, float(by_case(found.argmax(1), truth).mean())
