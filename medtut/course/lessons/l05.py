"""Lesson 05: settings, sweep arms and the pieces its notebook and sweep share."""

from __future__ import annotations

from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

import medtut
from medtut.course import sweep
from medtut.course.lessons import common
from medtut.course.lessons.common import TUNING_SEED
from medtut.course.lessons.ct import (
    DESIGNS,
    Part,
    _as_seen,
    arm_scores,
    embed,
    load_part,
    train_arm,
    voxels,
    weights_file,
    zero_shot,
)
from medtut.course.lessons.ct import mean_auroc as macro
from medtut.course.lessons.ct_target import adapt
from medtut.course.profiles import LessonSettings, lesson_tables
from medtut.data.chest_anatomy import recipe
from medtut.data.download import sha256_of

COHORT_VERSION = f"{recipe()['version']}.{recipe()['anatomy_version']}"
# Runs from other weights are not to be compared. (Their module would import torch.)
_WEIGHTS = Path(medtut.__file__).parent / "models/weights/ctclip_small.safetensors"
if _WEIGHTS.is_file():
    COHORT_VERSION += f" weights {sha256_of(_WEIGHTS)[:8]}"

PRESETS, KEY_NUMBERS = lesson_tables(__file__)


class Settings(LessonSettings):
    """What can be set in lesson 05.

    Attributes
    ----------
    weights : "small", the course's own checkpoint, or a file of `save_ctclip`.
    text : "asset" (MiniLM), a folder, or a name on Hugging Face; what the checkpoint
        was trained with.
    image, spacing : voxels (D, H, W) of a volume and their sides in mm.
    train, dev, test : source patients: of the sweep, to choose thresholds on, to judge
        on. There are as many of the other body as of dev.
    target_train, target_test : of the other scanner.
    epochs, batch_size, depth : of the arms of the sweep; layers in plane and in depth.
    precision : of every training; "auto" is bfloat16 where the machine computes in it.
    rank : of LoRA on the target.
    target_steps : of every training on the target.
    warmup : steps of the arms' training; None for a twentieth of them.
    clip_norm : of the arms' gradients; None for 1.
    validate_every, validate_samples : epochs from one validation of an arm to the next,
        and on how many of the dev patients; None: the arm is not validated, on all.
    """

    weights: str = "small"
    text: str = "asset"
    image: tuple[int, int, int] = (48, 96, 96)
    spacing: tuple[float, float, float] = (6.0, 3.6, 3.6)
    train: int = Field(ge=8)
    dev: int = Field(ge=8)
    test: int = Field(ge=8)
    target_train: int = Field(ge=4)
    target_test: int = Field(ge=8)
    epochs: float = Field(gt=0)
    batch_size: int = Field(ge=2)
    depth: int = Field(ge=1)
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    rank: int = Field(ge=1)
    target_steps: int = Field(ge=1)
    warmup: int | None = Field(default=None, ge=0)
    clip_norm: float | None = Field(default=None, ge=0)
    validate_every: float | None = Field(default=None, gt=0)
    validate_samples: int | None = Field(default=None, ge=8)

    def unset(self) -> tuple[str, ...]:
        """Names of the training settings that nobody gave.

        They came later: a run without them is the run that it was.
        """
        return tuple(name for name in SCHEDULE if getattr(self, name) is None)

    def stored(self) -> dict[str, Any]:
        """As ever, without what is `unset`, so that older runs still count."""
        unset = self.unset()
        return {k: v for k, v in super().stored().items() if k not in unset}


SCHEDULE = ("warmup", "clip_norm", "validate_every", "validate_samples")
# One grid for all arms; the rate is chosen on the dev patients.
LEARNING_RATES = (3e-4, 1e-3, 3e-3)
TARGET = ("as_is", "lora", "head", "full")
TARGET_RATES = (3e-4, 1e-3, 3e-3, 1e-2)
ARMS: dict[str, dict[str, Any]] = {name: {} for name in (*DESIGNS, *TARGET)}
# Metrics of arms that differ from rms_swiglu_sigmoid in one thing.
SINGLE_METRICS = {
    "text_lora": "text_lora_minus_frozen",
    "low_rank": "low_rank_minus_attention",
    "full_projection": "full_projection_minus_attention",
}
# What an arm's rate does not depend on.
SOURCE_UNUSED = ("target_train", "target_test", "rank", "target_steps", "test")
TARGET_UNUSED = ("train", "dev", "test", "target_test", "epochs", "depth",
                 *SCHEDULE)  # fmt: skip
committed = partial(sweep.committed, "05_ctclip_modern")
chosen_rate = partial(sweep.chosen_rate, "05_ctclip_modern")


@lru_cache(maxsize=1)
def source_parts(settings: Settings) -> dict[str, Part]:
    """The three parts of the source."""
    return {name: load_part(name, settings) for name in ("train", "dev", "test")}


@lru_cache(maxsize=1)
def target_parts(settings: Settings) -> dict[str, Part]:
    """The two parts of the target."""
    return {n: load_part(n, settings) for n in ("target_train", "target_test")}


def tuned(name: str, settings: Settings) -> dict[str, float]:
    """How good every rate of the grid is, in runs of half the length.

    By macro AUROC on the dev patients; on the target by the loss of a quarter of its
    training patients, too few for an AUROC of rare findings.
    """

    def source_score(rate: float) -> float:
        parts = source_parts(settings)
        args = name, TUNING_SEED, rate, settings, parts, settings.epochs / 2
        return macro(arm_scores(train_arm(*args)[0], parts["dev"], settings),
                     parts["dev"].truth)  # fmt: skip

    def target_score(rate: float) -> float:
        part = target_parts(settings)["target_train"]
        args = name, TUNING_SEED, rate, settings, part
        return adapt(*args, validate=True)[1].best["score"]

    where, unused = (TARGET_RATES, target_score), TARGET_UNUSED
    if name in DESIGNS:
        where, unused = (LEARNING_RATES, source_score), SOURCE_UNUSED
    # Raise the number when arms are trained or judged otherwise.
    version = f"2 {COHORT_VERSION} {sha256_of(weights_file(settings))}"
    what = repr(DESIGNS.get(name, name))
    unused = (*unused, *settings.unset())
    return common.tuned("l05", what, version, settings, *where, unused=unused)


def run_arm(arm: str, seed: int, settings: Settings) -> dict[str, Any]:
    """Train one arm with one seed and ask it about test patients, of its own place.

    Returns
    -------
    dict
        ``score`` (macro AUROC), ``scores`` (N, 18), ``truth`` (a text of 0 and 1 for
        each patient), ``lr``, ``validation_by_lr``, ``trainable``; of trained arms also
        ``failed`` (the loss ended no lower than it began), ``loss`` at the beginning
        and at the end, ``steps``, ``train_seconds``.
    """
    from medtut.models.text_tower import TEMPLATES

    grid = {} if arm == "as_is" else tuned(arm, settings)
    rate = common.best_rate(grid) if grid else None
    if arm in DESIGNS:
        parts = source_parts(settings)
        model, result = train_arm(arm, seed, rate, settings, parts)
        found, truth = arm_scores(model, parts["test"], settings), parts["test"].truth
    else:
        parts = target_parts(settings)
        model, result = adapt(arm, seed, rate or 1.0, settings, parts["target_train"])
        vectors = embed(model, parts["target_test"].volumes)
        found = zero_shot(model, vectors, settings.text, TEMPLATES[:1])
        truth = parts["target_test"].truth
    told: dict[str, Any] = {
        "score": macro(found, truth), "scores": found.round(4).tolist(),
        "truth": ["".join(map(str, row)) for row in truth], "lr": rate,
        "validation_by_lr": grid,
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }  # fmt: skip
    if result is None:
        return told
    loss = [row["loss"] for row in result.history if "loss" in row]
    tenth = max(1, len(loss) // 10)
    ends = [float(np.mean(loss[:tenth])), float(np.mean(loss[-tenth:]))]
    failed = not (np.isfinite(loss).all() and ends[1] < ends[0])
    more = {"loss": ends, "failed": failed, "steps": result.steps}
    return told | more | {"train_seconds": result.seconds}


def sweep_truth(arm: str) -> np.ndarray:
    """Truth (N, 18) of the test patients of an arm's committed runs."""
    runs = [r for r in sweep.load_sweep("05_ctclip_modern") if r["arm"] == arm]
    return np.array([list(map(int, row)) for row in runs[0]["metrics"]["truth"]])


def areas(scores: np.ndarray, truth: np.ndarray, draws: int = 400) -> np.ndarray:
    """Macro AUROC (seeds, 1 + draws) of scores (seeds, N, 18): as is, and resampled.

    The draws of patients are the same for every seed and every arm.
    """
    from medtut.evaluate.zero_shot import findings_report

    tables = [findings_report(s, truth, draws=draws).table[..., 0] for s in scores]
    return np.nanmean(tables, -1)


def contrast(one: np.ndarray, other: np.ndarray) -> tuple[float, float, float]:
    """Difference of two arms' `areas` with its interval over patients and seeds."""
    gap = one - other
    draws = gap.shape[1] - 1
    seeds = np.random.default_rng(0).integers(len(gap), size=(draws, len(gap)))
    drawn = np.take_along_axis(gap[:, 1:].T, seeds, 1).mean(1)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return float(gap[:, 0].mean()), float(low), float(high)


def spread(table: np.ndarray) -> tuple[float, float]:
    """Interval of an arm's `areas` over patients and seeds."""
    return contrast(table, np.zeros_like(table))[1:]


def spread_gap(
    one: np.ndarray, other: np.ndarray, draws: int = 2000
) -> tuple[float, float, float]:
    """Standard deviation over seeds of one arm's `areas` less that of another's.

    With an interval over seeds drawn anew. Of five seeds it is rather too narrow.
    """
    rng = np.random.default_rng(0)
    values = [table[:, 0] for table in (one, other)]
    drawn = [v[rng.integers(len(v), size=(draws, len(v)))].std(1, ddof=1)
             for v in values]  # fmt: skip
    found = values[0].std(ddof=1) - values[1].std(ddof=1)
    low, high = np.quantile(drawn[0] - drawn[1], (0.025, 0.975))
    return float(found), float(low), float(high)


def baseline(train: Part, dev: Part, test: Part) -> np.ndarray:
    """Scores (N, 18) of what needs no network: a histogram of HU and coarse densities.

    Logistic regression with labels, its penalty chosen on `dev`.
    """
    from medtut.evaluate.zero_shot import histogram_and_pooled, linear_probe

    x = [histogram_and_pooled(part.volumes) for part in (train, dev, test)]
    return linear_probe(x[0], train.truth, x[1], dev.truth, x[2]).scores


def outlines(part: Part, number: int, settings: Settings) -> np.ndarray:
    """Outlines (18, D, H, W) of one drawn patient, on the grid of the settings."""
    from medtut.data.chest_cohort import outlines_of

    return _as_seen(outlines_of(part.records[number].path), settings)


def macro_visible(scores: np.ndarray, part: Part, least: int = 2) -> float:
    """`macro` without the patients whose finding has fewer than `least` voxels.

    They are left out for that finding alone. Of real patients nobody knows the voxels,
    and all count.
    """
    from medtut.evaluate.zero_shot import auroc

    size, truth = voxels(part), part.truth
    keep = (
        np.ones(truth.shape, bool) if size is None else (truth == 0) | (size >= least)
    )
    columns = [np.flatnonzero(k) for k in keep.T]
    each = [auroc(scores[k, i : i + 1], truth[k, i : i + 1])[0]
            for i, k in enumerate(columns)]  # fmt: skip
    return float(np.nanmean(each))


def columns(report: dict[str, Any], names: Any) -> tuple[np.ndarray, np.ndarray]:
    """Places of the names that have an AUROC, and (3, n): its value, low and high."""
    found = [report["findings"][name] for name in names]
    at = np.array([i for i, one in enumerate(found) if one is not None])
    return at, np.array([found[i]["auroc"] for i in at]).T
