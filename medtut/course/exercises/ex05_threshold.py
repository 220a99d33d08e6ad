"""Exercise 05.4: a threshold from a dev split."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from medtut.course.exercises.engine import (
    Case,
    Exercise,
    describe,
    numbers_differ,
)
from medtut.course.exercises.ex05_attention import Answer, idea


def numbers_may_be_wild(got: Any, want: Any) -> str | None:
    """Compare numbers of which one may be NaN or infinite, or rows of them."""
    if np.ndim(got) or np.ndim(want):
        alike = np.shape(got) == np.shape(want)
        if alike and np.allclose(got, want, rtol=1e-4, equal_nan=True):
            return None
        return f"one number is asked for, got {describe(got)}"
    if hasattr(got, "__float__") and not isinstance(got, bool | str | complex):
        here, there = float(got), float(want)
        if here == there or (math.isnan(here) and math.isnan(there)):
            return None
    return numbers_differ(got, want, rtol=1e-4)


# ------------------------------------------------------------------------------ 05.4
def choose_threshold(scores, truth):
    best, chosen = -1.0, None
    for t in np.unique(scores)[::-1]:  # from the highest, which raises fewest alarms
        called = scores >= t
        f1 = 2 * (called & (truth == 1)).sum() / (called.sum() + truth.sum())
        if f1 > best:
            best, chosen = f1, t
    return chosen


def _counts(scores: Any, truth: Any, at: Any, above: bool = False) -> tuple[Any, ...]:
    """True and false alarms, positives and negatives, at each threshold."""
    called = scores > at[:, None] if above else scores >= at[:, None]
    hit, false = (called & (truth == k) for k in (1, 0))
    return hit.sum(1), false.sum(1), (truth == 1).sum(), (truth == 0).sum()


def _f1(tp: Any, fp: Any, p: Any, n: Any) -> Any:
    return 2 * tp / (tp + fp + p)


def _f1_of_rest(tp: Any, fp: Any, p: Any, n: Any) -> Any:
    return 2 * (n - fp) / (2 * (n - fp) + fp + p - tp)


def _unguarded(tp: Any, fp: Any, p: Any, n: Any) -> Any:
    with np.errstate(invalid="ignore"):
        precision, recall = tp / (tp + fp), tp / p
        return 2 * precision * recall / (precision + recall)


def _pick(
    good: Answer = _f1,
    lowest: bool = False,
    above: bool = False,
    grid: Any = None,
    give: Answer = lambda at, good, k: at[k],
) -> Answer:
    """Make an answer that takes the threshold at which `good` is largest."""

    def answer(scores, truth):
        at = np.unique(scores) if grid is None else np.asarray(grid)
        at = at if lowest else at[::-1]
        found = good(*_counts(scores, truth, at, above))
        return give(at, found, int(np.argmax(found)))

    return answer


def _both(**how: Any) -> tuple[Answer, ...]:
    """An answer that takes the highest among equals, and the lowest."""
    return _pick(**how), _pick(lowest=True, **how)


def _between(at: Any, good: Any, k: int) -> Any:
    return (at[k] + at[min(k + 1, len(at) - 1)]) / 2


def _crash(scores, truth):
    best, chosen = -1.0, None
    for t in sorted(set(scores.tolist())):
        tp = int(((scores >= t) & (truth == 1)).sum())
        precision, recall = tp / int((scores >= t).sum()), tp / int(truth.sum())
        f1 = 2 * precision * recall / (precision + recall)
        if f1 > best:
            best, chosen = f1, t
    return chosen


def _drawn(said: str, ill: int, well: int, shift: float, digits: int = 2) -> Case:
    """Scores of a weak model, rounded so that some are equal."""

    def draw() -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(ill + well)
        truth = rng.permutation(np.repeat([1, 0], [ill, well]))
        x = rng.normal(size=len(truth)) + shift * truth - 1.5
        scores = 1 / (1 + np.exp(-x))
        return scores.round(digits), truth

    return Case(said, draw)


def _listed(said: str, scores: str, truth: str) -> Case:
    numbers = [float(one) for one in scores.split()]
    labels = [int(one) for one in truth.split()]
    return Case(said, lambda: (np.array(numbers), np.array(labels)))


def threshold() -> Exercise:
    return Exercise(
        id="05.4",
        title="a threshold before the test",
        ask="Write choose_threshold(scores, truth): from NumPy arrays (N,) of a dev "
        "split, scores of one finding and truth of 0 and 1 with at least one 1, return "
        "the threshold of the best F1. The finding is called where score >= threshold. "
        "Return one of the scores; among equal F1 the highest, which raises the fewest "
        "alarms.",
        difficulty=2,
        minutes=6,
        hints=(
            "Between two neighbouring scores nothing changes. How many thresholds are "
            "there to try?",
            "np.unique(scores) lists them. F1 = 2·TP / (called + positives) needs no "
            "precision, so it never divides 0 by 0.",
            "for t in np.unique(scores)[::-1]: called = scores >= t; f1 = 2 * (called "
            "& (truth == 1)).sum() / (called.sum() + truth.sum()); keep t where f1 is "
            "larger than the best so far.",
        ),
        solution_function=choose_threshold,
        explanation="A pair of sentences, softmaxed, gives no calibrated "
        "probability: 0.5 only means that both are equally near. The threshold belongs "
        "to the model, so it is chosen on patients who are not in the test, and kept. "
        "Chosen on the test itself, F1 is the largest of many and too good: for scores "
        "that say nothing, 10 positives among 100 reach about 0.24 that way and 0.15 "
        "honestly. The original evaluation tunes it on the labels it reports, and the "
        "source's table shows precision and recall at 0.5 beside an F1 from elsewhere.",
        cases=(
            _drawn("a rare finding", 8, 62, 1.4),
            _drawn("a common finding", 40, 20, 1.0),
            _listed(
                "scores that lie close together",
                "0.5031 0.4987 0.5012 0.4995 0.5003 0.4978 0.5022",
                "1 0 0 1 1 0 0",
            ),
            _listed("a healthy volume on top", "0.9 0.8 0.7 0.6 0.2", "0 1 1 0 0"),
            _listed("two thresholds of one F1", "0.9 0.7 0.6 0.4 0.1", "1 0 0 1 0"),
            _listed(
                "volumes of one score", "0.8 0.8 0.6 0.6 0.6 0.3 0.1", "1 0 1 1 0 0 0"
            ),
        ),
        misconceptions=(
            idea(
                "one half",
                "0.5 is where both sentences of the pair are equally near, and no "
                "choice of yours. Let the dev split say where F1 is best.",
                lambda scores, truth: 0.5,
            ),
            idea(
                "accuracy",
                "You took the best accuracy. With a rare finding that calls next to "
                "nobody ill, since no is nearly always right.",
                *_both(good=lambda tp, fp, p, n: tp + n - fp),
            ),
            idea(
                "above, not at least",
                "You counted score > threshold. A finding is called at the threshold "
                "too, and volumes of one score are called together.",
                *_both(above=True),
            ),
            idea(
                "lowest among equals",
                "F1 is best there, and also at a higher threshold. Take the highest: "
                "the same F1 with fewer alarms.",
                _pick(lowest=True),
            ),
            idea(
                "divided by zero",
                "Where no call is right, precision and recall are 0 and F1 is 0 / 0: "
                "an error, or NaN, which argmax takes for the largest. 2·TP / (called "
                "+ positives) is 0 there.",
                *_both(good=_unguarded),
                _crash,
            ),
            idea(
                "a coarse grid",
                "You tried evenly spaced thresholds. Scores of a pair of sentences may "
                "all lie within 0.49 and 0.51, and rare ones near 0: try the scores.",
                *_both(grid=np.linspace(0, 1, 11)),
                *_both(grid=np.linspace(0, 1, 101)),
                *_both(grid=np.linspace(0.1, 0.9, 9)),
                *_both(grid=np.linspace(0.05, 0.95, 19)),
                *_both(grid=np.linspace(0.01, 0.99, 99)),
            ),
            idea(
                "between two scores",
                "Halfway to the next score calls the same volumes, and is what the "
                "package does. Here one of the scores is asked for.",
                _pick(give=_between),
            ),
            idea(
                "F1 returned",
                "That is the best F1. The threshold at which it is reached is asked "
                "for.",
                _pick(give=lambda at, good, k: good[k]),
            ),
            idea(
                "position returned",
                "That is the place of the threshold in a list. Return the score there.",
                _pick(give=lambda at, good, k: k),
                _pick(give=lambda at, good, k: len(at) - 1 - k),
                _pick(lowest=True, give=lambda at, good, k: k),
            ),
            idea(
                "both classes",
                "You counted the F1 of healthy volumes too (macro, or weighted by "
                "class). That is the F1 in the paper's table, and the reason why its "
                "0.707 cannot stand beside 0.450.",
                *_both(good=lambda *c: _f1(*c) + _f1_of_rest(*c)),
                *_both(good=lambda *c: c[2] * _f1(*c) + c[3] * _f1_of_rest(*c)),
            ),
            idea(
                "precision",
                "You took the best precision: one sure call may have it, and nearly "
                "every patient is missed. F1 asks for recall too.",
                *_both(good=lambda tp, fp, p, n: tp / (tp + fp)),
            ),
            idea(
                "recall",
                "You took the best recall: everybody is called, at the lowest score. "
                "F1 asks for precision too.",
                _pick(good=lambda tp, fp, p, n: tp, lowest=True),
                lambda scores, truth: scores[truth == 1].min(),
            ),
            idea(
                "corner of the ROC curve",
                "You took the largest sensitivity + specificity - 1 (Youden). It "
                "weighs healthy and ill alike, so a rare finding gets many false "
                "alarms.",
                *_both(good=lambda tp, fp, p, n: tp / p - fp / n),
            ),
            idea(
                "as many calls as positives",
                "You called as many volumes as are ill. There precision equals recall, "
                "which is not where F1 is best.",
                lambda scores, truth: np.sort(scores)[-int(truth.sum())],
            ),
        ),
        differ=numbers_may_be_wild,
    )
