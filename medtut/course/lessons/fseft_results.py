"""Lesson 06: what its runs say, live and committed, and the figures of it."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from medtut.course import sweep
from medtut.course.lessons import common, fseft, l06
from medtut.data.organs import BASE, GLUTEUS, HEART, LUNG, NOVEL
from medtut.evaluate.statistics import Comparison, interval, paired_comparison
from medtut.viz import CYCLE, GREY, VERMILION

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SLUG = "06_fseft_few_shot"
SHOTS = (1, 5, 10)
GROUPS = {"heart": HEART, "lungs": LUNG, "gluteal": GLUTEUS}
WORDS = {
    "zero_shot": "zero-shot", "probe": "linear probe", "spatial1": "spatial adapter 1³",
    "spatial3": "spatial adapter 3³", "lora": "LoRA", "adaptformer": "AdaptFormer",
    "compacter": "Compacter", "full": "all parameters", "scratch": "from scratch",
    "bias": "biases", "norm": "norms",
}  # fmt: skip


def filled(tables: Any) -> np.ndarray:
    """(seeds, patients, structures) of floats, NaN for None."""
    return np.array(tables, float)


@lru_cache(maxsize=1)
def stored_tables() -> dict[str, np.ndarray]:
    """Dice (seeds, patients, structures) of every arm of the committed sweep.

    Zero-shot has no support to draw: its one table stands for every k and seed.
    """
    runs = sweep.by_arm(sweep.load_sweep(SLUG), "table")
    found = {arm: filled(t) for arm, t in runs.items()}
    for k in SHOTS:
        found[f"base_k{k}_zero_shot"] = found["base_k1_zero_shot"]
    return found


def per_patient(tables: Any) -> np.ndarray:
    """Mean Dice (seeds, patients) over structures, of tables (seeds, patients, S)."""
    return np.nanmean(np.asarray(tables, float), -1)


def contrast(one: np.ndarray, other: np.ndarray) -> Comparison:
    """One arm minus another over the same seeds and patients."""
    return paired_comparison(per_patient(one), per_patient(other))


def rate_of(task: str, method: str, settings: Any) -> float:
    """The rate that the committed runs of a task and method chose; 1 if none trains.

    Other weights choose anew.
    """
    if method == "zero_shot":
        return 1.0
    rates = l06.committed("lr") if settings.weights == "small" else {}
    found = [v[0] for arm, v in rates.items()
             if re.fullmatch(rf"{task}_k\d+_{method}", arm)]  # fmt: skip
    if found:
        return float(found[0])
    return common.best_rate(l06.tuned(task, method, settings))


def chosen_black_box() -> str:
    """The black-box method that was best on the tuning patients, not on the test."""
    runs = {r["arm"]: r["metrics"] for r in sweep.load_sweep(SLUG)}
    grids = {m: runs[f"base_k1_{m}"]["validation_by_lr"] for m in fseft.BLACK_BOX[1:]}
    return max(grids, key=lambda m: max(grids[m].values()))


def cache_speedup(settings: Any, repeats: int = 7) -> dict[str, float]:
    """Seconds of a step of the linear probe, with the backbone run again and cached.

    In turns, on the same crop, the median of some; a step is forward, loss, backward
    and optimizer, and of the cached one also the reading of the crop.
    """
    import torch

    people = fseft.target_patients("pool", settings)[:1]
    model, done = fseft.start("base", "probe", 0, settings)
    optimizer = torch.optim.AdamW(done.parameters(model), 1e-3)
    ways = {"again": None, "cached": fseft.features_of(people, settings)}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(repeats):
        for way, inputs in ways.items():
            data = fseft.Crops(people, "base", BASE, settings.roi, inputs)
            loss = fseft.Loss("base", None if inputs is None else fseft.head)
            start = time.perf_counter()
            items = {key: v[None] for key, v in data[0].items()}
            optimizer.zero_grad()
            loss(model, items).backward()
            optimizer.step()
            seconds[way].append(time.perf_counter() - start)
    return {way: float(np.median(s)) for way, s in seconds.items()}


@lru_cache(maxsize=4)
def _adapted(method: str, k: int, settings: Any) -> Any:
    people = [] if method == "zero_shot" else l06.support(k, 0, settings)
    rate = rate_of("base", method, settings) if people else 1.0
    return fseft.train("base", method, people, 0, rate, settings)[0]


def explored(what: str, patient: int, settings: Any) -> np.ndarray:
    """Probabilities (9, X, Y, Z) of a test patient.

    Parameters
    ----------
    what : "zero_shot", or a black-box method and k such as "spatial3, k = 10".
    """
    method, _, k = what.partition(", k = ")
    model = _adapted(method, int(k or 1), settings)
    person = fseft.target_patients("test", settings)[patient]
    return fseft.probabilities(model, "base", method, [person], settings)[0]


def surface_scores(method: str, settings: Any) -> dict[str, dict[str, float]]:
    """Dice, NSD and HD95 of the test patients as is, and adapted with one volume.

    Means over patients and base organs; of HD95 the median, since an organ that was
    missed counts with the diagonal of the scan.
    """
    from medtut.evaluate.organs import score_case

    told = {}
    for name in ("zero_shot", f"{method}, k = {min(settings.shots)}"):
        rows = []
        for n, one in enumerate(fseft.target_patients("test", settings)):
            masks = fseft.decide(explored(name, n, settings), one, "base")
            rows += score_case(masks, one.masks(BASE), one.case.spacing, BASE)
        values = {
            m: np.array([r[m] for r in rows], float) for m in ("dice", "nsd", "hd95")
        }
        told[name] = {m: float(np.nanmean(v)) for m, v in values.items()}
        told[name]["hd95"] = float(np.nanmedian(values["hd95"]))
    return told


def method_rows(tables: Mapping[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """Dice at every k (None where it was not run) and what trains."""
    trained, rows = l06.committed("trainable"), {}
    for task, methods in (("base", WORDS), ("novel", l06.NOVEL_ALL)):
        rows[task] = {}
        for m in methods:
            names = [f"{task}_k{k}_{m}" for k in SHOTS]
            dice = [
                float(np.nanmean(tables[n])) if n in tables else None for n in names
            ]
            if any(d is not None for d in dice):
                counts = [int(trained[n][0]) for n in names if n in trained]
                rows[task][m] = {"dice": dice, "trainable": counts[0]}
    return rows


def draw_shots(
    ax: Axes, tables: Mapping[str, np.ndarray], task: str, methods: Sequence[str]
) -> None:
    """Dice against k with intervals; zero-shot, where there is one, as a line."""
    for n, m in enumerate(methods):
        there = [k for k in SHOTS if f"{task}_k{k}_{m}" in tables]
        points = [per_patient(tables[f"{task}_k{k}_{m}"]) for k in there]
        middle = np.array([p.mean() for p in points])
        ends = np.array([interval(p) for p in points]).T
        at = np.array([SHOTS.index(k) for k in there]) + 0.07 * (n - len(methods) / 2)
        ax.errorbar(at, middle, abs(ends - middle), marker="osD^v"[n % 5], ms=5, lw=1.2,
                    capsize=2, color=CYCLE[n], label=WORDS[m])  # fmt: skip
    if f"{task}_k1_zero_shot" in tables:
        level = per_patient(tables[f"{task}_k1_zero_shot"]).mean()
        ax.axhline(level, color=GREY, ls="--", lw=1, marker="", label="zero-shot")
    ax.set_xticks(range(len(SHOTS)), map(str, SHOTS))
    ax.set(xlabel="labelled volumes k", ylabel="mean Dice", title=f"{task} structures")
    ax.legend(frameon=False, fontsize=8)


def draw_organs(
    ax: Axes, tables: Mapping[str, np.ndarray], k: int, method: str
) -> None:
    """Dice of every base organ as is, and after a method."""
    for shift, (m, colour, marker) in enumerate(
        (("zero_shot", GREY, "D"), (method, VERMILION, "o"))
    ):
        table = tables[f"base_k{k}_{m}"]
        middle = np.full(len(BASE), np.nan)
        ends = []
        for i in range(len(BASE)):
            one = table[:, ~np.isnan(table[:, :, i]).any(0), i]
            middle[i] = one.mean() if one.size else np.nan  # of the interval's patients
            ends.append(interval(one) if one.shape[1] > 1 else (middle[i],) * 2)
        at = np.arange(len(BASE)) + 0.2 * shift - 0.1
        ax.errorbar(middle, at, xerr=abs(np.array(ends).T - middle), fmt=marker, ms=4,
                    lw=1, color=colour, label=WORDS[m])  # fmt: skip
    ax.set_yticks(range(len(BASE)), [n.replace("_", " ") for n in BASE], fontsize=8)
    ax.invert_yaxis()
    ax.set(xlabel="Dice", title=f"by organ, k = {k}")
    ax.legend(frameon=False, fontsize=8)


def draw_groups(ax: Axes, tables: Mapping[str, np.ndarray]) -> None:
    """Dice of the three groups of novel structures at k = 5, by method."""
    for n, (group, members) in enumerate(GROUPS.items()):
        at = [NOVEL.index(m) for m in members]
        for row, m in enumerate(l06.NOVEL_ALL):
            values = per_patient(tables[f"novel_k5_{m}"][..., at])
            low, high = interval(values)
            y, label = row + 0.22 * (n - 1), group if row == 0 else None
            ax.plot([low, high], [y, y], "-", color=CYCLE[n], marker="", lw=1.2)
            ax.plot(values.mean(), y, "osD"[n], color=CYCLE[n], ms=4, label=label)
    said = WORDS | {"probe": "head and decoder"}
    names = [said[m] for m in l06.NOVEL_ALL]
    ax.set_yticks(range(len(names)), names, fontsize=8)
    ax.invert_yaxis()
    ax.set(xlabel="Dice", title="novel structures, k = 5")
    ax.legend(frameon=False, fontsize=8)


def draw_ranks(ax: Axes, ranks: Mapping[int, np.ndarray], adaptive: np.ndarray) -> None:
    """Dice against a fixed rank, and the adaptive rank as a band."""
    points = [per_patient(t) for t in ranks.values()]
    middle = np.array([p.mean() for p in points])
    ends = np.array([interval(p) for p in points]).T
    ax.errorbar(range(len(ranks)), middle, abs(ends - middle), capsize=2, marker="o",
                color=CYCLE[0], label="fixed rank")  # fmt: skip
    found = per_patient(adaptive)
    ax.axhspan(*interval(found), color=CYCLE[1], alpha=0.2)
    ax.axhline(found.mean(), color=CYCLE[1], ls="--", marker="", label="adaptive")
    ax.set_xticks(range(len(ranks)), map(str, ranks))
    ax.set(xlabel="rank r", ylabel="mean Dice", title="novel structures, k = 5")
    ax.legend(frameon=False, fontsize=8)


def draw_left(ax: Axes) -> None:
    """Directions that an adaptive rank leaves, by layer, and their range."""
    runs = [r["metrics"]["ranks"] for r in sweep.load_sweep(SLUG)
            if r["arm"] == "novel_k5_adaptive"]  # fmt: skip
    table = np.array([list(r.values()) for r in runs]) / 3
    middle = table.mean(0)
    spread = np.abs(np.array([table.min(0), table.max(0)]) - middle)
    ax.bar(range(len(middle)), middle, yerr=spread, color=CYCLE[1], capsize=2)
    stages = [re.search(r"layers(\d).*blocks\.(\d)", name) for name in runs[0]]
    labels = [f"{m[1]}.{m[2]}" if m else "?" for m in stages]
    ax.set_xticks(range(len(middle)), labels)
    ax.set(xlabel="stage and block", ylabel="directions left, mean of q, k, v")
