"""The checks of lesson 02 against right answers, wrong ideas, and known numbers."""

import math
import platform
import random

import numpy as np
import pytest
import torch
from exercise_cases import ExerciseCases

from medtut.course import exercises as ex
from medtut.course.exercises import exercise

LESSON = ex.exercises_of("02_medclip_segmentation")


# Right answers written another way than the solution.
def _share_frozen(adapter, decoder, frozen):
    return 1 - frozen / (adapter + decoder + frozen)


def _share_tensor(adapter, decoder, frozen):
    sizes = torch.tensor([adapter, decoder, frozen], dtype=torch.float64)
    return sizes[:2].sum() / sizes.sum()


def _split_numpy(ids, fraction, seed):
    names, place = np.unique(np.array(ids), return_inverse=True)
    rng = np.random.default_rng(seed)
    train = rng.permutation(len(names))[: int(fraction * len(names))]
    inside = np.isin(place, train)
    return np.flatnonzero(inside), np.flatnonzero(~inside)


def _split_random(ids, fraction, seed):
    names = list(dict.fromkeys(ids))  # in the order of their first slice
    random.Random(seed).shuffle(names)
    keep = names[: math.ceil(fraction * len(names))]
    train = [i for i in range(len(ids)) if ids[i] in keep]
    return train, sorted(set(range(len(ids))) - set(train))


def _split_sklearn(ids, fraction, seed):
    from sklearn.model_selection import GroupShuffleSplit

    rule = GroupShuffleSplit(1, train_size=fraction, random_state=seed)
    train, test = next(rule.split(ids, groups=np.array(ids, dtype=str)))
    return list(train.tolist()), list(test.tolist())


def _split_hashed(ids, fraction, seed):
    from hashlib import sha256

    names = sorted(set(ids), key=lambda one: sha256(f"{seed}{one}".encode()).digest())
    keep = set(names[: round(fraction * len(names))])
    sides = ([], [])
    for i, one in enumerate(ids):
        sides[one not in keep].append(i)
    return sides


def _dice_one_hot(prediction, label, classes):
    p = torch.nn.functional.one_hot(prediction, classes).flatten(0, -2)[:, 1:].double()
    t = torch.nn.functional.one_hot(label, classes).flatten(0, -2)[:, 1:].double()
    return (2 * (p * t).sum(0) / (p.sum(0) + t.sum(0))).nanmean()


def _dice_numpy(prediction, label, classes):
    table = np.zeros((classes, classes))
    np.add.at(table, (prediction.numpy().ravel(), label.numpy().ravel()), 1)
    both, size = np.diag(table)[1:], (table.sum(0) + table.sum(1))[1:]
    return np.mean(2 * both[size > 0] / size[size > 0]) if size.any() else np.nan


def _window_interp(image, low, high):
    bottom, top = np.percentile(image, (low, high))
    if bottom == top:
        return np.zeros_like(image, dtype=np.uint8)
    return np.interp(image, (bottom, top), (0, 255)).astype(np.uint8)


def _window_torch(image, low, high):
    x = torch.from_numpy(image)
    bottom, top = torch.quantile(x, torch.tensor([low, high]) / 100)
    return ((x - bottom) / (top - bottom).clamp_min(1e-8) * 255).clamp(0, 255).byte()


def _window_where(image, low, high):
    b, t = np.percentile(image, low), np.percentile(image, high)
    scaled = np.where(t > b, (np.clip(image, b, t) - b) / (t - b) * 255, 0)
    return scaled.astype("uint8")


def test_published_share_is_577_in_ten_thousand():
    share = LESSON["02.1"].solution_function(141_312, 1_567_332, 27_912_570)
    assert share == 1_708_644 / 29_621_214
    assert round(100 * share, 2) == 5.77


# -------------------------------------------------------------------- 02.2, as written
def _own_words_unseeded(ids, fraction, seed):
    names = np.array(sorted(set(ids)))
    np.random.default_rng().shuffle(names)
    keep = set(names[: round(fraction * len(names))])
    return [i for i, p in enumerate(ids) if str(p) in keep], [
        i for i, p in enumerate(ids) if str(p) not in keep
    ]


def _own_words_set(ids, fraction, seed):
    names = list(set(ids))
    random.Random(seed).shuffle(names)
    keep = names[: round(fraction * len(names))]
    return [i for i, p in enumerate(ids) if p in keep], [
        i for i, p in enumerate(ids) if p not in keep
    ]


def _own_words_slices(ids, fraction, seed):
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))
    cut = int(fraction * len(ids))
    return order[:cut], order[cut:]


def test_check_leaves_global_randomness_alone():
    random.seed(5)
    np.random.seed(5)
    want = random.random(), np.random.random()
    random.seed(5)
    np.random.seed(5)
    exercise("02.2").check(_own_words_unseeded)
    assert (random.random(), np.random.random()) == want


# -------------------------------------------------------------------- 02.3
def test_solution_agrees_with_a_library():
    from sklearn.metrics import f1_score

    rng = np.random.default_rng(0)
    label = rng.integers(0, 4, (9, 9))
    prediction = np.where(rng.random((9, 9)) < 0.6, label, rng.integers(0, 4, (9, 9)))
    want = f1_score(
        label.ravel(), prediction.ravel(), labels=[1, 2, 3], average="macro"
    )
    solve = LESSON["02.3"].solution_function
    got = solve(torch.tensor(prediction), torch.tensor(label), 4)
    assert got == pytest.approx(want)


def _nan_as_half(p, t, c):
    return _dice_numpy(p, t, c) if (p + t).any() else 0.5


# -------------------------------------------------------------------- 02.4, as written
def _raw_cast(image, low, high):
    bottom, top = np.percentile(image, [low, high])
    if top == bottom:
        return np.zeros(image.shape, np.uint8)
    return ((image - bottom) / (top - bottom) * 255).astype(np.uint8)


def _no_guard(image, low, high):
    bottom, top = np.percentile(image, [low, high])
    return (np.clip((image - bottom) / (top - bottom), 0, 1) * 255).astype(np.uint8)


@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="elsewhere the cast differs"
)
def test_a_real_cast_that_wraps_is_recognised():
    assert exercise("02.4").check(_raw_cast).misconception == "cast without clipping"


# -------------------------------------------------------------------- all four
RIGHT = {
    "02.1": [_share_frozen, _share_tensor],
    "02.2": [_split_numpy, _split_random, _split_sklearn, _split_hashed],
    "02.3": [_dice_one_hot, _dice_numpy],
    "02.4": [_window_interp, _window_torch, _window_where],
}
OWN_WORDS = {
    "02.2": [
        (_own_words_unseeded, "not repeatable"),
        (_own_words_set, "order of a set"),
        (_own_words_slices, "split over slices"),
    ],
    "02.4": [
        (_no_guard, "division by zero"),
    ],
}
BROKEN = {
    "02.2": [
        (lambda ids, fraction, seed: 3, "expected the pair"),
        (lambda ids, fraction, seed: (3, 4), "expected the pair"),
        (lambda ids, fraction, seed: ([0], [len(ids)]), "indices run from 0"),
        (lambda ids, fraction, seed: ([0.5], [1]), "whole numbers"),
        (lambda ids, fraction, seed: ([0, 0], []), "used twice"),
        (lambda ids, fraction, seed: ids[seed + 10**6], "IndexError at line"),
        (lambda ids, fraction, seed: print(), "returned None"),
    ],
    "02.3": [
        (_nan_as_half, "expected NaN"),
    ],
    "02.4": [
        (lambda x, low, high: x.tolist(), "expected a uint8 picture"),
        (
            lambda x, low, high: _window_interp(x, low, high).T[:3],
            "got uint8 of shape (3, 48)",
        ),
    ],
}


class TestLesson02(ExerciseCases):
    lesson = "02_medclip_segmentation"
    functions = ("trainable_share", "split_by_patient", "foreground_dice", "window")
    right, own_words, broken = RIGHT, OWN_WORDS, BROKEN
