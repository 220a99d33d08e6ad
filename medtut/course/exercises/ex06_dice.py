"""Exercise 06.1: a Dice with a rule for what is absent."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from medtut.course.exercises.engine import Case, Exercise
from medtut.course.exercises.ex05_attention import Answer, idea
from medtut.course.exercises.ex05_threshold import numbers_may_be_wild


def _scores_differ(got: Any, want: Any) -> str | None:
    """Compare scores, of which a small number added somewhere moves none by 1e-4."""
    fault = numbers_may_be_wild(got, want)
    both = [one for one in (got, want) if hasattr(one, "__float__")]
    if fault and len(both) == 2 and not any(np.ndim(one) for one in both):
        return None if abs(float(got) - float(want)) < 1e-4 else fault
    return fault


# ------------------------------------------------------------------------------ 06.1
def organ_dice(logits, truth, empty):
    found, organ = logits > 0, truth > 0  # sigmoid(0) is one half
    size = int(found.sum() + organ.sum())
    if size == 0:
        return empty  # nothing to find, and nothing found
    return 2 * int((found & organ).sum()) / size


def _counts(found: torch.Tensor, organ: torch.Tensor) -> tuple[int, int, int]:
    """Shared, predicted and true voxels."""
    return int((found & organ).sum()), int(found.sum()), int(organ.sum())


def _ratio(above: float, below: float, empty: float) -> float:
    return above / below if below else empty


def _score(
    score: Answer = lambda tp, p, t, empty: _ratio(2 * tp, p + t, empty),
    call: Answer = lambda logits: logits > 0,
    look: Answer = lambda truth: truth > 0,
) -> Answer:
    """Make the solution from three steps, one of which may be another."""

    def answer(logits, truth, empty):
        return score(*_counts(call(logits), look(truth)), empty)

    return answer


def _smooth(above: float, below: float) -> Answer:
    return _score(lambda tp, p, t, empty: (2 * tp + above) / (p + t + below))


def _always(value: float) -> Answer:
    return _score(lambda tp, p, t, empty: _ratio(2 * tp, p + t, value))


def _either(tp: int, p: int, t: int, empty: float) -> float:
    return 2 * tp / (p + t) if p and t else empty


def _unguarded(tp: int, p: int, t: int, empty: float) -> float:
    return 2 * tp / (p + t)  # 0 / 0 is an error for Python's numbers


def _tensors(logits, truth, empty):
    found, organ = logits > 0, truth > 0
    return 2 * (found & organ).sum() / (found.sum() + organ.sum())


def _with_background(logits, truth, empty):
    found, organ = logits > 0, truth > 0
    both = _counts(found, organ), _counts(~found, ~organ)
    return sum(_ratio(2 * tp, p + t, empty) for tp, p, t in both) / 2


def _accuracy(logits, truth, empty):
    return float(((logits > 0) == (truth > 0)).float().mean())


def _soft(logits, truth, empty):
    p, t = logits.sigmoid(), truth.float()
    return float(2 * (p * t).sum() / (p.sum() + t.sum()))


def _slices(logits, truth, empty):
    rows = zip(logits.unbind(2), truth.unbind(2), strict=True)
    scores = [organ_dice(*row, math.nan) for row in rows]
    kept = [one for one in scores if not math.isnan(one)]
    return sum(kept) / len(kept) if kept else empty


def _largest(truth: torch.Tensor) -> torch.Tensor:
    from scipy.ndimage import label

    parts, number = label(truth.numpy() > 0, torch.ones(3, 3, 3).numpy())
    if not number:
        return truth > 0
    sizes = [int((parts == k).sum()) for k in range(1, number + 1)]
    return torch.from_numpy(parts == 1 + sizes.index(max(sizes)))


Box = tuple[slice, ...]


def _box(*edges: int) -> Box:
    """A box of voxels from x0, x1, y0, y1, z0, z1."""
    return tuple(slice(*edges[i : i + 2]) for i in (0, 2, 4))


def _volume(said: str, organ: list[Box], found: list[Box], empty: float) -> Case:
    """Logits that are positive in the boxes `found`, and a truth of boxes `organ`."""

    def draw() -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(len(said))
        shape = (8, 7, 6)
        truth, called = (torch.zeros(shape, dtype=torch.uint8) for _ in range(2))
        for mask, boxes in ((truth, organ), (called, found)):
            for box in boxes:
                mask[box] = 1
        # Timid and bold voxels on both sides: probabilities from 0.27 to 0.95.
        size = 0.2 + torch.rand(shape, generator=generator)
        logits = torch.where(called > 0, 2.4 * size, -0.8 * size)
        return logits, truth, empty

    return Case(said, draw)


def dice() -> Exercise:
    block, half = _box(1, 6, 1, 5, 1, 6), _box(1, 6, 1, 5, 1, 4)
    small, two = _box(7, 8, 5, 7, 4, 6), _box(2, 8, 2, 7, 2, 6)
    return Exercise(
        id="06.1",
        title="an organ, right in every voxel",
        ask="Write organ_dice(logits, truth, empty): the Dice of one organ in one "
        "volume, 2·shared / (predicted + true). logits (X, Y, Z) come from the "
        "network, and a voxel is predicted where their sigmoid is above one half; "
        "truth (X, Y, Z) is 0 or 1, in uint8. A perfect organ scores exactly 1, "
        "whatever its size. Where nothing is predicted and nothing there, return "
        "`empty`: NaN for those who leave such a volume out, 1 for those who count it "
        "as right. What only one of the two has scores 0.",
        difficulty=1,
        minutes=5,
        hints=(
            "The 1 that is added to a loss keeps its gradient alive. What does a score "
            "need it for? Try 100 voxels, all of them right.",
            "Count three things: predicted, true, and shared. Dice is undefined in one "
            "single case. Ask for it before you divide, and do not ask more than that.",
            "found = logits > 0; organ = truth > 0; size = found.sum() + organ.sum(); "
            "if size is 0 return empty, else 2 * (found & organ).sum() / size.",
        ),
        solution_function=organ_dice,
        explanation="The published score adds 1 below the bar only (upstream "
        "utils/metrics.py:18-20), so 100 voxels, all right, give 200 / 201 = 0.995 and "
        "10 voxels 0.952: small organs lose, large ones do not, and an absent organ "
        "that nobody finds scores 0, as a miss. Smoothing both sides would give a miss "
        "of one voxel 1 / 2. Whether an empty volume counts as NaN or as 1 changes a "
        "mean, so it has to be said; that a false alarm in it is 0 has not. Upstream "
        "also keeps only the largest component of the truth "
        "(fseft/datasets/utils.py:54), which makes the second piece a false alarm.",
        cases=(
            _volume("100 voxels, all right", [block], [block], math.nan),
            _volume("60 of 100 voxels", [block], [half], 1.0),
            _volume("a false alarm beside it", [half], [half, small], math.nan),
            _volume("an organ in two pieces", [half, small], [half, small], 1.0),
            _volume("an organ that was missed", [small], [], 1.0),
            _volume("a false alarm without an organ", [], [small], 1.0),
            _volume("nothing there, nothing found, NaN", [], [], math.nan),
            _volume("nothing there, nothing found, 1", [], [], 1.0),
            _volume("shifted by a voxel or two", [block], [two], math.nan),
        ),
        misconceptions=(
            idea(
                "smoothed below only",
                "You added to the bottom and not to the top. 100 voxels, all right, "
                "then score 0.995, and an empty volume 0. That is the published score; "
                "a score needs no smoothing, only a rule for 0 / 0.",
                _smooth(0, 1),
            ),
            idea(
                "smoothed on both sides",
                "You added the same above and below. Perfect organs are 1 and empty "
                "volumes too, whatever `empty` says; and a missed organ of n voxels "
                "scores 1 / (n + 1), not 0. In a loss that helps, in a score it lies.",
                _smooth(1, 1),
            ),
            idea(
                "empty scores 0",
                "Where nothing is there and nothing found your score is 0, that of a "
                "miss (so it is with a small number added below the bar). Return "
                "`empty`.",
                _always(0.0),
                _smooth(0, 1e-6),
            ),
            idea(
                "empty always NaN",
                "0 / 0 became NaN, also for those who asked for 1. Return `empty`.",
                _always(math.nan),
                _tensors,
            ),
            idea(
                "empty always 1",
                "Your score of an empty volume is 1 (so it is with a small number "
                "added above and below), also for those who leave it out of the mean "
                "with NaN. Return `empty`.",
                _always(1.0),
                _smooth(1e-6, 1e-6),
            ),
            idea(
                "divided by zero",
                "0 / 0 is an error for Python's numbers. Ask first whether both sides "
                "are empty.",
                _score(_unguarded),
            ),
            idea(
                "no organ, no error",
                "You return `empty` as soon as the truth is empty. But what was found "
                "there is a false alarm, and scores 0: only if nothing was found "
                "either, there is nothing to score.",
                _score(lambda tp, p, t, empty: 2 * tp / (p + t) if t else empty),
            ),
            idea(
                "empty on one side",
                "You return `empty` where one side is empty. A missed organ and a "
                "false alarm score 0; only both sides together are left undefined.",
                _score(_either),
            ),
            idea(
                "background counted",
                "You counted background, as a second class or as voxels that are "
                "right. It is nearly all of a volume and nearly always right: a missed "
                "organ then scores close to one half, or close to 1.",
                _with_background,
                _accuracy,
            ),
            idea(
                "logits above one half",
                "You compared the logits with 0.5. Their sigmoid is to be above one "
                "half, which it is where the logit is above 0.",
                _score(call=lambda logits: logits > 0.5),
            ),
            idea(
                "not thresholded",
                "You summed probabilities. That is the soft Dice of a loss: even an "
                "organ that is right everywhere stays below 1.",
                _soft,
            ),
            idea(
                "intersection over union",
                "You divided by the union: Jaccard's index, lower than Dice but for 0 "
                "and 1.",
                _score(lambda tp, p, t, empty: _ratio(tp, p + t - tp, empty)),
            ),
            idea(
                "no factor of two",
                "A perfect organ scores one half: both sizes are below the bar, so the "
                "shared voxels count twice above it.",
                _score(lambda tp, p, t, empty: _ratio(tp, p + t, empty)),
            ),
            idea(
                "recall",
                "You divided by the organ alone, so calling everything scores 1.",
                _score(lambda tp, p, t, empty: _ratio(tp, t, empty)),
                _score(lambda tp, p, t, empty: _ratio(tp, t, empty if not p else 0.0)),
            ),
            idea(
                "precision",
                "You divided by what was predicted alone, so one sure voxel scores 1.",
                _score(lambda tp, p, t, empty: _ratio(tp, p, empty)),
                _score(lambda tp, p, t, empty: _ratio(tp, p, empty if not t else 0.0)),
            ),
            idea(
                "mean over slices",
                "You averaged over slices. The organ is one thing in three dimensions: "
                "a slice with two of its voxels would weigh as much as the largest.",
                _slices,
            ),
            idea(
                "largest piece of the truth",
                "You reduced the truth to its largest component. Then whoever finds "
                "both pieces of an organ is punished for the second.",
                _score(look=_largest),
            ),
        ),
        differ=_scores_differ,
    )
