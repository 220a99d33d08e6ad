"""Metrics with planted defects, and sound ones that must pass."""

import math

import numpy as np
import pytest
import torch

from medtut.audit import Subject, SubjectError, metric_misbehaves
from medtut.evaluate import published_dice, region_dice


def dice(p, t, classes=(1, 2, 3), smooth=0.0, empty=math.nan, alarm=0.0):
    """Dice per class, in the ways in which people write it."""
    scores = []
    for k in classes:
        a, b = p == k, t == k
        sizes = float(a.sum() + b.sum())
        if sizes + smooth == 0:
            continue
        scores.append((2 * float((a & b).sum()) + smooth) / (sizes + smooth))
    if not (t > 0).any() and (p > 0).any():
        return alarm if alarm is not None else float(np.mean(scores))
    if not (t > 0).any() and not smooth:
        return empty
    return float(np.mean(scores))


def run(metric):
    return metric_misbehaves(Subject(metric=metric))


def foreground(p, t):
    return region_dice(p, t)["foreground"]


@pytest.mark.parametrize(
    "metric",
    [
        foreground,
        lambda p, t: region_dice(p, t)["WT"],
        dice,
        lambda p, t: dice(p, t, empty=1.0),
        lambda p, t: torch.tensor(dice(p, t)),
        lambda p, t: np.float32(dice(p.numpy(), t.numpy())),
        lambda p, t: float(np.nanmean([dice(a, b) for a, b in zip(p, t, strict=True)])),
        lambda p, t: dice(p > 0, t > 0, classes=(1,)),
        lambda p, t: dice(p, t) / (2 - dice(p, t)),  # Jaccard
    ],
)
def test_sound_metrics_pass(metric):
    assert run(metric)[0] == []


def test_silent_without_a_metric():
    assert metric_misbehaves(Subject()) == ([], [])


def test_the_published_metric_counts_background():
    (one,), notes = run(published_dice)
    assert (one.severity, one.where) == ("error", "background")
    # Background (4096 - 36 of 4096 right) and nothing of the lesion.
    right = 2 * 4060 / (4060 + 4096)
    assert one.numbers["tiny_lesion_missed"] == pytest.approx(right / 2)
    assert any("pools a batch" in note for note in notes)
    assert any("left empty 1" in note for note in notes)


def raising(p, t):
    if not t.any():
        raise ZeroDivisionError("division by zero")
    return dice(p, t)


@pytest.mark.parametrize(
    ("metric", "severity", "where", "said"),
    [
        (lambda p, t: (p == t).float().mean(), "error", "background", "class 0"),
        (lambda p, t: dice(p, t, (0, 1, 2, 3)), "error", "background", "class 0"),
        (lambda p, t: dice(p, t, alarm=math.nan), "error", "empty label", "NaN"),
        (lambda p, t: dice(p, t, alarm=1.0), "error", "empty label", "rewards"),
        (
            lambda p, t: dice(p, t, (1,), smooth=1, alarm=None),
            "warning",
            "empty label",
            "+ 1",
        ),
        (lambda p, t: dice(p, t, empty=0.0), "warning", "empty label", "is right"),
        (raising, "error", "empty label", "stops"),
        (lambda p, t: 1 - dice(p, t), "error", "order", "a loss"),
        (lambda p, t: 100 * dice(p, t), "error", "order", "percentage"),
        (lambda p, t: 1.0, "error", "order", "half"),
        (lambda p, t: math.nan, "error", "order", "half"),
        (
            lambda p, t: dice(p, t, (0, 1)) if p.any() else 0.0,
            "error",
            "background",
            "class 0",
        ),
        (lambda p, t: dice(p, t, smooth=1), "error", "background", "in neither map"),
        (lambda p, t: dice(p, t) if p.any() else 0.5, "error", "background", "missed"),
        (
            lambda p, t: dice(p, t) if p.any() else math.nan,
            "error",
            "order",
            "half",
        ),
    ],
)
def test_planted_defects(metric, severity, where, said):
    findings, _ = run(metric)
    one = findings[0]
    assert (one.severity, one.where) == (severity, where)
    assert said in one.message
    assert len(one.numbers) >= 2


def test_numbers_of_the_smoothed_dice():
    (one,), _ = run(lambda p, t: dice(p, t, (1,), smooth=1, alarm=None))
    assert one.numbers["one_voxel_on_empty"] == pytest.approx(1 / 2)
    assert one.numbers["lesion_on_empty"] == pytest.approx(1 / 37)
    assert one.numbers["empty_left_empty"] == 1


def test_the_error_of_an_empty_case_is_quoted():
    (one,), _ = run(raising)
    assert "division by zero" in one.numbers["empty_left_empty"]


def test_notes_say_what_is_no_defect():
    assert run(lambda p, t: region_dice(p, t)["WT"])[1][0].startswith("the metric does")
    per_case = lambda p, t: float(  # noqa: E731
        np.nanmean([dice(a, b) for a, b in zip(p, t, strict=True)])
    )
    assert run(per_case)[1] == []
    (note,) = run(foreground)[1]
    assert "0.500 as a mean of two" in note


def test_a_metric_that_fails_on_everything_is_an_error_of_the_subject():
    with pytest.raises(SubjectError, match="ValueError: logits"):
        run(lambda p, t: (_ for _ in ()).throw(ValueError("logits, please")))
    with pytest.raises(SubjectError, match="failed"):
        run(region_dice)  # a dict is no number


def test_maps_handed_over_may_be_written_to():
    def rude(p, t):
        score = dice(p, t)
        p.fill_(0), t.fill_(0)
        return score

    assert run(rude)[0] == []
