"""Are probabilities honest, and what is to be done with them?

Calibration error and temperature, class priors that differ between training and use,
weights and offsets for imbalanced training, a threshold for missed tumours.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike as Array

from medtut.errors import MedtutError
from medtut.evaluate.classification import checked


def reliability(
    probabilities: Array, truth: Array, bins: int = 15, adaptive: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cases, mean confidence and accuracy (B,) of each bin that is not empty.

    Cases are sorted by confidence, the largest of their probabilities.
    Bins are ((b - 1) / B, b / B] (Guo et al. 2017), or with `adaptive` hold equally
    many cases each, equal confidences together (Nguyen and O'Connor 2015).
    """
    p, y = checked(probabilities, truth)
    sure, right = p.max(1), p.argmax(1) == y
    edges = np.linspace(0, 1, bins + 1)[1:-1]
    edges = np.quantile(sure, edges) if adaptive else edges
    place = np.searchsorted(edges, sure, side="left")
    count = np.bincount(place, minlength=bins)
    sums = [np.bincount(place, weights=v, minlength=bins) for v in (sure, right)]
    used = count > 0
    return count[used], *(one[used] / count[used] for one in sums)


def ece(
    probabilities: Array, truth: Array, bins: int = 15, adaptive: bool = False
) -> float:
    """Expected calibration error: mean |accuracy - confidence|, weighted by cases.

    Of the answer given, not of all classes; Eq. 3 of Guo et al. 2017. Its value depends
    on `bins` and is biased upwards for few cases, so state both.
    """
    count, confidence, accuracy = reliability(probabilities, truth, bins, adaptive)
    return float((count * np.abs(accuracy - confidence)).sum() / count.sum())


def fit_temperature(logits: Array, truth: Array) -> float:
    """Temperature T of softmax(logits / T) with the least NLL (Guo et al. 2017).

    Fit it on validation data; it changes no answer. Logits (N, K) may be log
    probabilities. T is sought from 0.02 to 50; an end of it means that there is no
    best T, as when every answer is right.
    """
    from scipy.optimize import minimize_scalar
    from scipy.special import log_softmax, softmax

    z = np.asarray(logits, dtype=float)
    _, y = checked(softmax(z, axis=1), truth)

    def nll(log_t: float) -> float:
        return -log_softmax(z / np.exp(log_t), axis=1)[np.arange(len(y)), y].mean()

    ends = (np.log(0.02), np.log(50))
    return float(np.exp(minimize_scalar(nll, bounds=ends, method="bounded").x))


def correct_prior(
    probabilities: Array, train_prior: Array, target_prior: Array
) -> np.ndarray:
    """Probabilities under other class frequencies (Saerens et al. 2002, Eq. 4).

    Right where only the frequencies differ, not what a class looks like, and the
    probabilities are calibrated. Priors (K,) may be counts.
    """
    old, new = _prior(train_prior), _prior(target_prior)
    p = np.asarray(probabilities, dtype=float) * (new / old)
    return p / p.sum(1, keepdims=True)


def estimate_prior(
    probabilities: Array, train_prior: Array, steps: int = 1000
) -> np.ndarray:
    """Class frequencies (K,) of unlabelled images by EM (Saerens et al. 2002, Eq. 9).

    This looks at the images to be judged, all at once and without labels: say so
    wherever a result rests on it, and that one patient alone cannot be judged so.
    """
    prior = _prior(train_prior)
    for _ in range(steps):
        before, prior = prior, correct_prior(probabilities, train_prior, prior).mean(0)
        prior = prior.clip(1e-12)
        if np.abs(prior - before).max() < 1e-9:
            break
    return prior / prior.sum()


def logit_offset(counts: Array, tau: float = 1.0) -> np.ndarray:
    """What to add to logits in the training loss, and there only: tau * log prior (K,).

    The logit-adjusted loss (Menon et al. 2021, Eq. 10): trained so, the bare logits
    stand for classes that are equally frequent.
    """
    return tau * np.log(_prior(counts))


def class_weights(counts: Array) -> np.ndarray:
    """Loss weights (K,) N / (K n_k): scikit-learn's "balanced" rule."""
    prior = _prior(counts)
    return 1 / (len(prior) * prior)


def _prior(counts: Array) -> np.ndarray:
    prior = np.asarray(counts, dtype=float)
    if prior.ndim != 1 or not (prior > 0).all():
        raise MedtutError(f"frequencies must be above 0, one per class; got {prior}.")
    return prior / prior.sum()


class Alarm(NamedTuple):
    """A threshold and what it does.

    Attributes
    ----------
    threshold : tumour where its probability is at least this.
    recall : share of the tumours found.
    missed, false_alarms : tumours called healthy, healthy called tumour.
    tumours, healthy : how many there are.
    """

    threshold: float
    recall: float
    missed: int
    false_alarms: int
    tumours: int
    healthy: int


def alarms(p_tumour: Array, tumour: Array, threshold: float) -> Alarm:
    """Count what a threshold misses, and its false alarms; both inputs are (N,)."""
    said, true = np.asarray(p_tumour) >= threshold, np.asarray(tumour, dtype=bool)
    if said.shape != true.shape or not true.any():
        raise MedtutError(f"{true.sum()} tumours in {true.shape}, p {said.shape}.")
    missed, n = int((true & ~said).sum()), int(true.sum())
    false, healthy = int((said & ~true).sum()), int((~true).sum())
    return Alarm(float(threshold), 1 - missed / n, missed, false, n, healthy)


def threshold_for_recall(p_tumour: Array, tumour: Array, recall: float = 0.99) -> Alarm:
    """The highest threshold that finds at least this share of tumours.

    Choose it on validation data, then count with `alarms` on the test data, where the
    recall will differ.

    Parameters
    ----------
    p_tumour : (N,), such as 1 - P(no_tumor)
    tumour : (N,) bool
    recall : above 0, at most 1
    """
    alarms(p_tumour, tumour, 0)  # refuses what does not fit
    known = np.sort(np.asarray(p_tumour, dtype=float)[np.asarray(tumour, dtype=bool)])
    may_miss = int((1 - recall) * len(known) + 1e-9)
    return alarms(p_tumour, tumour, known[may_miss])


def decide(probabilities: Array, healthy: int, threshold: float) -> np.ndarray:
    """Answers (N,): the likeliest tumour where P(any) >= threshold, else `healthy`."""
    p = np.array(probabilities, dtype=float)
    found = 1 - p[:, healthy] >= threshold
    p[:, healthy] = -1
    return np.where(found, p.argmax(1), healthy)
