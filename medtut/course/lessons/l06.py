"""Lesson 06: settings, sweep arms and the pieces its notebook and sweep share."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import numpy as np
from pydantic import Field, ValidationInfo, field_validator

from medtut.course import sweep
from medtut.course.lessons import common, fseft
from medtut.course.lessons.common import TUNING_SEED
from medtut.course.profiles import lesson_tables
from medtut.data.abdomen_anatomy import recipe
from medtut.data.download import sha256_of
from medtut.data.few_shot import Protocol, draw_protocol
from medtut.errors import MedtutError

COHORT_VERSION = str(recipe()["version"])
# Runs from other weights are not to be compared.
if fseft.SMALL_WEIGHTS.is_file():
    COHORT_VERSION += f" weights {sha256_of(fseft.SMALL_WEIGHTS)[:8]}"

PRESETS, KEY_NUMBERS = lesson_tables(__file__)


class Settings(common.TrainingSettings):
    """What can be set in lesson 06.

    Attributes
    ----------
    weights : "small", the course's own network; "fseft", the published checkpoint; or
        a file of `save_swin_unetr`.
    spacing : of the network's grid, mm.
    roi : voxels of a region, each a multiple of 32.
    shots : numbers k of labelled volumes.
    pool, test : patients of the target hospital, to draw from and to judge on.
    source : patients of each source hospital, to show what partial labels do.
    steps, batch_size : of every adaptation.
    """

    weights: str = "small"
    spacing: float = Field(gt=0)
    roi: tuple[int, int, int]
    shots: tuple[int, ...] = Field(min_length=1)
    pool: int = Field(ge=1)
    test: int = Field(ge=3)
    source: int = Field(ge=1)

    @field_validator("roi")
    @classmethod
    def _fits(cls, roi: tuple[int, int, int]) -> tuple[int, int, int]:
        from medtut.models.swin_unetr import check_roi

        try:
            check_roi(roi)
        except MedtutError as error:
            raise ValueError(str(error)) from None
        return roi

    @field_validator("shots")
    @classmethod
    def _ascend(cls, shots: tuple[int, ...]) -> tuple[int, ...]:
        if [*shots] != sorted({*shots}) or shots[0] < 1:
            raise ValueError("numbers of labelled volumes ascend, from 1 or more")
        return shots

    @field_validator("pool")
    @classmethod
    def _suffices(cls, pool: int, info: ValidationInfo) -> int:
        if pool < (most := max(info.data.get("shots", (1,)))):
            raise ValueError(f"k = {most} cannot be drawn from a pool of {pool}")
        return pool


SEEDS = 5
RATES = (3e-4, 1e-3, 3e-3, 1e-2)  # one grid for all, chosen on the tuning patients
BASE_PEFT = ("lora", "full")
BASE_ALL = ("bias", "norm", "adaptformer", "compacter", *BASE_PEFT)
NOVEL_MAIN = ("lora", "full", "scratch")
NOVEL_ALL = ("probe", "bias", "norm", "adaptformer", "compacter", *NOVEL_MAIN)
RANKS = ("rank1", "rank2", "rank8", "rank16", "adaptive")
PRETRAIN = {"pretrain_partial": "ignore", "pretrain_background": "background"}


def _arms() -> dict[str, dict[str, Any]]:
    black = fseft.BLACK_BOX[1:]
    at = {1: (*black, *BASE_PEFT), 5: (*black, *BASE_PEFT), 10: (*black, *BASE_ALL)}
    names = [f"base_k{k}_{m}" for k, methods in at.items() for m in methods]
    at = {1: NOVEL_MAIN, 5: (*NOVEL_ALL, *RANKS), 10: NOVEL_MAIN}
    names += [f"novel_k{k}_{m}" for k, methods in at.items() for m in methods]
    names += [f"softmax_k10_{m}" for m in ("probe", "spatial3", "lora")]
    return {name: {} for name in ("base_k1_zero_shot", *names, *PRETRAIN)}


ARMS = _arms()
committed = partial(sweep.committed, "06_fseft_few_shot")
chosen_rate = partial(sweep.chosen_rate, "06_fseft_few_shot")


def parse(arm: str) -> tuple[str, int, str]:
    """Task, k and method of an arm such as "novel_k5_lora"."""
    task, k, method = arm.split("_", 2)
    return task, int(k[1:]), method


@lru_cache(maxsize=2)
def protocol(settings: Settings) -> Protocol:
    """Which target patients each k and seed learns from, nested."""
    pool = [p.case.record.id for p in fseft.target_patients("pool", settings)]
    test = [p.case.record.id for p in fseft.target_patients("test", settings)]
    return draw_protocol(pool, test, settings.shots, SEEDS, name="target hospital")


def support(k: int, seed: int, settings: Settings) -> list[fseft.Patient]:
    """The k labelled volumes of a seed."""
    chosen = protocol(settings).support(k, seed % SEEDS)
    people = {p.case.record.id: p for p in fseft.target_patients("pool", settings)}
    return [people[i] for i in chosen]


def tuned(task: str, method: str, settings: Settings) -> dict[str, float]:
    """Mean Dice at every rate of the grid, in runs of half the length.

    On patients of the target hospital that nothing else uses; once for a task and a
    method, and used for every k. The variants of LoRA take LoRA's.
    """
    method = "lora" if method in RANKS else method
    steps = max(1, settings.steps // 2)

    def score(rate: float) -> float:
        people = fseft.target_patients("tuning", settings)
        learn, held = people[: -fseft.HELD], people[-fseft.HELD :]
        args = task, method, learn, TUNING_SEED, rate, settings, steps
        model = fseft.train(*args)[0]
        return float(np.nanmean(fseft.dice_table(model, task, method, held, settings)))

    # Raise the number when arms are trained or judged otherwise.
    version = f"1 {COHORT_VERSION} {sha256_of(fseft.weights_file(settings))}"
    unused = ("pool", "test", "source", "data")
    args = f"{task} {method}", version, settings, RATES, score
    return common.tuned("l06", *args, unused=unused)


def rounded(table: np.ndarray) -> list[list[float | None]]:
    """A table for JSON, which knows no NaN."""
    return [[None if np.isnan(x) else round(float(x), 4) for x in row] for row in table]


def adapt_one(
    task: str, k: int, method: str, seed: int, settings: Settings,
    rate: float | None = None, progress: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Adapt with k volumes and judge on the test patients; see `run_arm`."""
    from medtut.adapters import effective_ranks

    grid = {} if method == "zero_shot" or rate else tuned(task, method, settings)
    rate = rate or (common.best_rate(grid) if grid else 1.0)
    people = [] if method == "zero_shot" else support(k, seed, settings)
    given = task, method, people, seed, rate, settings
    model, done, result = fseft.train(*given, progress=progress)
    test = fseft.target_patients("test", settings)
    table = fseft.dice_table(model, task, method, test, settings)
    told = {
        "score": float(np.nanmean(table)),
        "table": rounded(table),
        "lr": rate, "validation_by_lr": grid, "trainable": done.total,
        "counts": done.counts, "support": [p.case.record.id for p in people],
        "train_seconds": result.seconds if result else 0.0,
    }  # fmt: skip
    if ranks := effective_ranks(model):
        told["ranks"] = ranks
        told["rank_mean"] = sum(ranks.values()) / (3 * len(ranks))  # of q, k and v
    return told


def continue_pretraining(arm: str, seed: int, settings: Settings) -> dict[str, Any]:
    """Train the network on at the sources, with one reading of what is not outlined.

    Both readings have the same patients, steps and rate; judged by the nine base
    organs on patients of the sources with everything outlined.
    """
    from medtut.course.lessons.common import train_config
    from medtut.data.organs import BASE, STRUCTURES
    from medtut.train import fit

    rate = 3e-3
    model, done = fseft.start("pretrain", "full", seed, settings)
    people = fseft.source_patients("source", settings)
    roi, length = settings.roi, settings.steps * settings.batch_size
    rng = np.random.default_rng(seed)
    people = [people[i] for i in rng.permutation(len(people))]
    data = fseft.Crops(people, "pretrain", STRUCTURES, roi, length=length)
    loss = fseft.Loss("pretrain", unlabelled=PRETRAIN[arm])
    config = train_config(settings, rate, seed, settings.steps, 0, clip_norm=1.0)
    result = fit(model, loss, data, config, progress=False)
    test = fseft.source_patients("source_test", settings)
    rows = [STRUCTURES.index(n) for n in BASE]
    found = fseft.probabilities(model, "pretrain", "full", test, settings)
    pairs = zip(found, test, strict=True)
    masks = [fseft.decide(p[rows], one, "base") for p, one in pairs]
    pairs = zip(masks, test, strict=True)
    table = np.array([fseft.dice_there(m, one.masks(BASE)) for m, one in pairs])
    return {"score": float(np.nanmean(table)), "lr": rate, "trainable": done.total,
            "table": rounded(table), "train_seconds": result.seconds}  # fmt: skip


def run_arm(arm: str, seed: int, settings: Settings) -> dict[str, Any]:
    """One arm of the sweep with one seed.

    Returns
    -------
    dict
        ``score`` (mean Dice over patients and structures), ``table`` (patients,
        structures; None where a patient does not have one), ``lr``, ``trainable``,
        ``support`` and, of adaptive ranks, ``ranks`` and ``rank_mean``.
    """
    if arm in PRETRAIN:
        return continue_pretraining(arm, seed, settings)
    return adapt_one(*parse(arm), seed, settings)
