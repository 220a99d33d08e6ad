"""Judge findings without training for them: zero-shot scores, a probe, a baseline.

Scores are (N, K), one column per finding, truth is (N, K) of 0 and 1. A volume may
show any number of findings, so every finding is a two-class question of its own.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike as Array

from medtut.errors import MedtutError

METRICS = ("auroc", "auprc", "precision", "recall", "f1")
GRID = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
Score = list[float] | None


class FindingsReport(dict):
    """What `findings_report` returns: a dict ready for JSON, with its draws.

    Attributes
    ----------
    table : (1 + draws, K, 5)
        `METRICS` of the data as they are (row 0) and of each draw, NaN where there is
        none. It is not part of the dict, and `macro_over` needs it.
    """

    table: np.ndarray


def unit(vectors: Array) -> np.ndarray:
    """Vectors (..., d) divided by their length.

    Raises
    ------
    MedtutError
        A vector that is zero or not finite has no direction.
    """
    v = np.asarray(vectors, dtype=float)
    length = np.linalg.norm(v, axis=-1, keepdims=True)
    if not (np.isfinite(length) & (length > 0)).all():
        said = "some are zero or not finite. Look for NaN in the volume, or the weights"
        raise MedtutError(f"Embeddings {v.shape}: {said}.")
    return v / length


def pair_scores(
    image: Array, positive: Array, negative: Array, scale: float = 1.0
) -> np.ndarray:
    """P(finding) from a pair of opposite sentences: softmax over the pair.

    The published pair is "There is X." and "There is no X." (CT-CLIP, arXiv
    2403.17834), so P = 1 here. With several wordings the unit embeddings are averaged
    and made unit again, as CLIP does (Radford et al. 2021, section 3.1.4).

    Parameters
    ----------
    image : (N, d)
    positive, negative : (K, P, d), or (K, d) for one wording each
    scale : float
        exp of the learned temperature. It, and SigLIP's bias, which the pair cancels,
        change no order within a finding, so no AUROC; they do change F1 at 0.5.

    Returns
    -------
    (N, K) in [0, 1]

    Raises
    ------
    MedtutError
        Shapes that do not fit, and what `unit` refuses.
    """
    from scipy.special import expit

    x, *sides = (unit(one) for one in (image, positive, negative))
    yes, no = (unit(one.mean(1)) if one.ndim == 3 else one for one in sides)
    if x.ndim != 2 or yes.shape != no.shape or yes.shape[1:] != x.shape[1:]:
        said = [one.shape for one in (x, *sides)]
        raise MedtutError(f"Not (N, d) and twice (K, P, d), but {said}.")
    return expit(scale * (x @ (yes - no).T))


def _checked(scores: Array, truth: Array) -> tuple[np.ndarray, np.ndarray]:
    s, y = np.asarray(scores, dtype=float), np.asarray(truth)
    if s.ndim != 2 or not s.size or s.shape != y.shape:
        raise MedtutError(f"Scores {s.shape}, truth {y.shape}: both must be (N, K).")
    if not (np.isfinite(s).all() and np.isin(y, (0, 1)).all()):
        raise MedtutError("Scores must be finite and truth 0 or 1, without gaps.")
    return s, y.astype(bool)


def _curve(score: np.ndarray, positive: np.ndarray, weight: np.ndarray) -> tuple:
    """True and false alarms (B, T) at each of the T distinct scores, highest first."""
    order = np.argsort(-score, kind="stable")
    last = np.append(np.flatnonzero(np.diff(score[order])), len(score) - 1)
    sides = ((weight * one)[:, order] for one in (positive, ~positive))
    true, false = (one.cumsum(1)[:, last] for one in sides)
    return true, false, score[order][last]


def _judge(
    score: np.ndarray, positive: np.ndarray, weight: np.ndarray, cut: float
) -> np.ndarray:
    """Return `METRICS` (B, 5) for weights (B, N) of the volumes; NaN without a cut."""
    true, false, _ = _curve(score, positive, weight)
    gain, step = (np.diff(one, axis=1, prepend=0) for one in (true, false))
    p, n = true[:, -1], false[:, -1]
    auroc = (step * (true - gain / 2)).sum(1) / (p * n)
    auprc = (gain * true / np.maximum(true + false, 1e-12)).sum(1) / p
    hit, said = weight @ (positive & (score >= cut)), weight @ (score >= cut)
    alarms = np.stack([hit / np.maximum(said, 1e-12), hit / p, 2 * hit / (said + p)], 1)
    alarms = alarms if np.isfinite(cut) else alarms * np.nan
    return np.column_stack([auroc, auprc, alarms])


def auroc(scores: Array, truth: Array) -> np.ndarray:
    """AUROC (K,): share of pairs in the right order, ties half; NaN without a pair.

    The area below the ROC curve with ties joined by a straight line, which is the
    rank formula of Mann and Whitney (Hanley and McNeil 1982).
    """
    s, y = _checked(scores, truth)
    areas, once = np.full(s.shape[1], np.nan), np.ones((1, len(s)))
    for c in np.flatnonzero(y.any(0) & ~y.all(0)):
        areas[c] = _judge(s[:, c], y[:, c], once, 0.5)[0, 0]
    return areas


def choose_thresholds(scores: Array, truth: Array) -> np.ndarray:
    """Thresholds (K,) of the best F1 on a dev split, to be used unchanged on the test.

    Each lies halfway between neighbouring scores; among equal F1 the highest is taken,
    which raises the fewest alarms. NaN for a finding without a positive: nothing can
    be chosen. Chosen on the test set, as in CT-CLIP's bootstrap_values.py, F1 would be
    the best of many. The array cannot be written to.
    """
    s, y = _checked(scores, truth)
    cuts = np.full(s.shape[1], np.nan)
    for c in np.flatnonzero(y.any(0)):
        true, false, at = _curve(s[:, c], y[:, c], np.ones((1, len(s))))
        best = int((2 * true / (true + false + true[:, -1:]))[0].argmax())
        below = at[min(best + 1, len(at) - 1)]
        # Halfway between neighbours in floating point may be the lower one itself.
        half = (below + at[best]) / 2
        cuts[c] = half if half > below else at[best]
    cuts.flags.writeable = False
    return cuts


def _drawn(positive: np.ndarray, group: np.ndarray, order: np.ndarray) -> np.ndarray:
    """How often each patient (B, G) is drawn, with replacement within its stratum.

    Strata are patients with positive volumes only, with negative ones only, and with
    both, so no draw lacks a class. A stratum's sample is the first of its members in
    `order` (B, L), which all findings share: a patient drawn twice for one finding is
    mostly drawn twice for the next, so that an average over findings gets an interval
    as wide as findings that occur together demand.
    """
    n = int(group.max()) + 1
    ill, well = (np.bincount(group, side, n) > 0 for side in (positive, ~positive))
    stratum, count = ill + 2 * well, np.zeros((len(order), n))
    for one in np.unique(stratum):
        hit = (stratum == one)[order]
        hit &= hit.cumsum(1) <= (stratum == one).sum()
        row, column = np.nonzero(hit)
        np.add.at(count, (row, order[row, column]), 1)
    return count


def _orders(patients: int, draws: int, seed: int) -> np.ndarray:
    """Patients (draws, 5 G) drawn with replacement, and at the end each once.

    The end completes the sample of a rare stratum that came up too seldom before.
    """
    rng = np.random.default_rng(seed)
    once = np.tile(np.arange(patients), (draws, 1))
    often = rng.integers(patients, size=(draws, 4 * patients))
    return np.hstack([often, rng.permuted(once, axis=1)])


def _averages(table: np.ndarray, share: np.ndarray) -> dict[str, Score]:
    """Averages with weights (K,) over the findings that have a number."""
    known = np.ma.masked_invalid(table)
    return _scored(np.ma.average(known, axis=1, weights=share).filled(np.nan))


def _scored(columns: np.ndarray) -> dict[str, Score]:
    """Return metric to [value, low, high] of (1 + draws, 5), None without a number."""
    ends = np.vstack([columns[0], np.quantile(columns[1:], [0.025, 0.975], axis=0)])
    every = zip(METRICS, ends.T.tolist(), strict=True)
    return {name: one if np.isfinite(one[0]) else None for name, one in every}


def findings_report(
    scores: Array, truth: Array, thresholds: Array | None = None,
    names: Sequence[str] | None = None, groups: Sequence[Any] | None = None,
    draws: int = 1000, seed: int = 0,
) -> FindingsReport:  # fmt: skip
    """Judge scores of findings, with 95 % percentile intervals over patients.

    Parameters
    ----------
    scores, truth : (N, K)
    thresholds : (K,), optional
        From `choose_thresholds` on other patients; a finding is called at a score of
        at least this. By default 0.5, where both sentences of a pair are equally near:
        no calibrated choice. NaN gives no precision, recall and F1.
    names : K names, optional
    groups : (N,), optional
        Patient of each volume; its volumes are drawn together. By default each volume
        is a patient.
    draws, seed : how many resamples, and their seed.

    Returns
    -------
    FindingsReport
        ``findings``: name to a dict of [value, low, high] for each of `METRICS`, with
        ``positives``, ``prevalence`` (which is chance for auprc) and ``threshold``, or
        None for a finding whose volumes are all of one class; these are listed in
        ``without``. ``macro`` and ``weighted`` (by positives): the averages over the
        others. ``volumes``, ``patients``, ``draws``.

    Notes
    -----
    auprc is the average precision, as in scikit-learn. Precision where nothing was
    called is 0. Stratified by `_drawn`; the weights of ``weighted`` are those of the
    data in every draw.

    Raises
    ------
    MedtutError
        Shapes that do not fit, scores that are not finite, truth other than 0 and 1.
    """
    s, y = _checked(scores, truth)
    n, k = s.shape
    named = list(map(str, range(k)) if names is None else names)
    cuts = np.full(k, 0.5) if thresholds is None else np.ravel(thresholds).astype(float)
    group = np.unique(range(n) if groups is None else groups, return_inverse=True)[1]
    if (got := [len(set(named)), len(cuts), len(group)]) != [k, k, n]:
        said = f"{got} different names, thresholds, groups, not {[k, k, n]}"
        raise MedtutError(f"Scores {s.shape} come with {said}.")
    patients, support = int(group.max()) + 1, y.sum(0)
    order = _orders(patients, draws, seed)
    report = FindingsReport(findings=dict.fromkeys(named))
    report.table = table = np.full((1 + draws, k, len(METRICS)), np.nan)
    both = (support > 0) & (support < n)
    report["without"] = [named[c] for c in np.flatnonzero(~both)]
    for c in np.flatnonzero(both):
        weight = _drawn(y[:, c], group, order)[:, group]
        table[:, c] = _judge(s[:, c], y[:, c], np.vstack([np.ones(n), weight]), cuts[c])
        here = {"positives": int(support[c]), "prevalence": float(support[c] / n)}
        here["threshold"] = float(cuts[c]) if np.isfinite(cuts[c]) else None
        report["findings"][named[c]] = here | _scored(table[:, c])
    report["macro"] = _averages(table, np.ones(k))
    report["weighted"] = _averages(table, support)
    report |= {"volumes": n, "patients": patients, "draws": draws}
    return report


def macro_over(report: FindingsReport, which: Array) -> dict[str, Score]:
    """Macro averages, with intervals, over some findings of a report.

    Such as those of at least 2 voxels, which a reader of these volumes could see.

    Parameters
    ----------
    which : names, or (K,) bool

    Raises
    ------
    MedtutError
        An unknown name, or a mask of another length.
    """
    named, wanted = list(report["findings"]), np.asarray(which)
    mask = wanted if wanted.dtype == bool else np.isin(named, wanted)
    if len(mask) != len(named) or not (mask is wanted or np.isin(wanted, named).all()):
        raise MedtutError(f"{which} must be a mask or names of {named}.")
    return _averages(report.table[:, mask], np.ones(mask.sum()))


class Probe(NamedTuple):
    """Scores (N, K) of a linear probe on test and dev data, and the C it took."""

    scores: np.ndarray
    dev_scores: np.ndarray
    c: float


def linear_probe(
    x: Array, y: Array, dev_x: Array, dev_y: Array, test_x: Array, grid: Array = GRID
) -> Probe:
    """Logistic regression per finding on standardised features.

    One C serves all findings, the one with the best macro AUROC on dev (the smallest
    among equals): per finding, a dev split has too few positives to choose by. A
    finding of one class in training gets that class as its score.

    Parameters
    ----------
    x, dev_x, test_x : (N, F) features of train, dev and test data
    y, dev_y : (N, K) truth of the first two
    grid : values of C

    Raises
    ------
    MedtutError
        No finding has both classes on the dev split.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.multiclass import OneVsRestClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    tried = []
    for c in sorted(grid):
        each = OneVsRestClassifier(LogisticRegression(C=c, max_iter=1000))
        with warnings.catch_warnings(action="ignore"):  # of a finding of one class
            fit = make_pipeline(StandardScaler(), each).fit(x, y)
        said = [fit.predict_proba(a)[:, -np.shape(y)[1] :] for a in (test_x, dev_x)]
        if np.isnan(areas := auroc(said[1], dev_y)).all():
            raise MedtutError("linear_probe: no finding has both classes on dev.")
        tried.append((np.nanmean(areas), Probe(*said, c)))
    return max(tried, key=lambda one: one[0])[1]


def histogram_and_pooled(volumes: Array, bins: int = 32, cells: int = 4) -> np.ndarray:
    """Features that need no network: a histogram and a coarse picture.

    With `linear_probe` this is the floor beside every model: what grey values and
    where they lie roughly already tell.

    Parameters
    ----------
    volumes : iterable of N volumes (D, H, W) or (1, D, H, W) in [-1, 1]

    Returns
    -------
    (N, bins + cells ** 3)
        Shares of the voxels, and means over a grid of cells.

    Raises
    ------
    MedtutError
        A volume with NaN, by its number.
    """
    import torch

    rows = []
    for number, volume in enumerate(volumes):
        v = torch.tensor(np.asarray(volume, np.float32)).squeeze(0).clip(-1, 1)
        if v.isnan().any():
            raise MedtutError(f"Volume {number} holds NaN; read it again.")
        share = torch.histc(v, bins, -1, 1) / v.numel()
        pooled = torch.nn.functional.adaptive_avg_pool3d(v[None], cells)
        rows.append(torch.cat([share, pooled.flatten()]).numpy())
    return np.stack(rows)
