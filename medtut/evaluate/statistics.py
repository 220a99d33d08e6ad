"""Intervals and paired comparisons over cases and seeds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from medtut.errors import MedtutError

MIN_SEEDS = 5


@dataclass(frozen=True)
class Comparison:
    """Difference of two arms over the same cases and seeds.

    Attributes
    ----------
    difference : mean of the first arm minus the second.
    low, high : 95 % interval, bootstrap over cases and seeds.
    p_value : two-sided sign-flip test over the cases' mean differences.
    cases, seeds : how many there were.
    """

    difference: float
    low: float
    high: float
    p_value: float
    cases: int
    seeds: int

    def __str__(self) -> str:
        return (
            f"{self.difference:+.3f} (95 % interval {self.low:+.3f} to {self.high:+.3f}"
            f", p = {self.p_value:.3g}; {self.cases} cases, {self.seeds} seeds)"
        )


def interval(
    scores: ArrayLike, *, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Bootstrap interval of the mean of ``scores`` (seeds, cases).

    Cases and seeds are resampled, because both are draws from something larger
    (Bouthillier et al., MLSys 2021). A drawn seed is drawn for all cases at once: a
    lucky run is lucky on many of them, and seeds drawn case by case would average
    that luck away and give too narrow an interval.
    """
    table = _table(scores, "interval")
    rng, (seeds, cases) = np.random.default_rng(seed), table.shape
    means = np.empty(resamples)
    for k in range(resamples):
        chosen = rng.integers(cases, size=cases)
        which = rng.integers(seeds, size=seeds)
        means[k] = table[np.ix_(which, chosen)].mean()
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def paired_comparison(
    first: ArrayLike,
    second: ArrayLike,
    *,
    resamples: int = 2000,
    seed: int = 0,
    min_seeds: int = MIN_SEEDS,
) -> Comparison:
    """Compare two arms that share seeds and cases, both ``(seeds, cases)``.

    Raises
    ------
    MedtutError
        Different shapes, or fewer than `min_seeds` seeds: one lucky seed is no
        evidence.
    """
    a = _table(first, "paired_comparison")
    b = _table(second, "paired_comparison")
    if a.shape != b.shape:
        raise MedtutError(
            "paired_comparison: the arms must share seeds and cases; their tables are "
            f"{a.shape} and {b.shape}."
        )
    if a.shape[0] < min_seeds:
        raise MedtutError(
            f"paired_comparison: {a.shape[0]} seed(s); a comparison needs at least "
            f"{min_seeds}. Run `medtut sweep` for more, or show the run as one run."
        )
    difference = a - b
    low, high = interval(difference, resamples=resamples, seed=seed)
    per_case = difference.mean(0)
    rng = np.random.default_rng(seed)
    flips = rng.choice([-1.0, 1.0], size=(resamples * 5, per_case.size))
    extreme = np.abs((flips * per_case).mean(1)) >= abs(per_case.mean()) - 1e-12
    return Comparison(
        difference=float(difference.mean()),
        low=low,
        high=high,
        # One is added to both so that the p-value of a sampled test is never zero.
        p_value=float((extreme.sum() + 1) / (extreme.size + 1)),
        cases=a.shape[1],
        seeds=a.shape[0],
    )


def _table(scores: ArrayLike, caller: str) -> np.ndarray:
    table = np.atleast_2d(np.asarray(scores, dtype=float))
    if table.ndim != 2 or table.size == 0 or not np.isfinite(table).all():
        raise MedtutError(
            f"{caller}: expected a filled table (seeds, cases) of finite scores, got "
            f"shape {table.shape} with {int((~np.isfinite(table)).sum())} not finite."
        )
    return table
