"""Exercises of lesson 02: the honest share, the honest split, Dice, and windowing."""

from __future__ import annotations

import math
from typing import Any

import torch

from medtut.course.exercises.engine import (
    Case,
    Exercise,
    Misconception,
    numbers_differ,
)
from medtut.course.exercises.ex02_split import split
from medtut.course.exercises.ex02_window import windowing


# ------------------------------------------------------------------------------ 02.1
def trainable_share(adapter, decoder, frozen):
    trained = adapter + decoder
    return trained / (trained + frozen)


def _share_case(said: str, *counts: int) -> Case:
    numbers = ", ".join(f"{n:,}" for n in counts)
    return Case(f"{said} (adapter, decoder, frozen: {numbers})", lambda: counts)


def _share() -> Exercise:
    return Exercise(
        id="02.1",
        title="how much of it is trained",
        ask="Write trainable_share(adapter, decoder, frozen): the share of all "
        "parameters that the optimizer changes, as a fraction between 0 and 1. The "
        "arguments count parameters; adapter and decoder are trained, frozen is the "
        "pretrained encoder.",
        difficulty=1,
        minutes=3,
        hints=(
            "Which of the three counts get a gradient, and which belong to the model "
            "that is run at the end?",
            "The decoder starts from random numbers and is trained in full: it stands "
            "above the fraction bar and below it.",
            "(adapter + decoder) / (adapter + decoder + frozen).",
        ),
        solution_function=trainable_share,
        explanation="141,312 adapter weights look like 0.5 % because PEFT counts the "
        "model it wrapped, and the decoder is not in it. With its 1,567,332 weights "
        "the share is 1,708,644 of 29,621,214, or 5.77 %.",
        cases=(
            _share_case("the published system", 141_312, 1_567_332, 27_912_570),
            _share_case("a small decoder", 141_312, 400_000, 27_912_570),
            _share_case("more decoder than encoder", 5_000, 90_000, 60_000),
            _share_case("no decoder", 2_048, 0, 100_000),
            _share_case("nothing frozen", 300, 700, 0),
        ),
        misconceptions=(
            Misconception(
                "decoder left out",
                "That is what PEFT prints: adapter over adapter and encoder. The "
                "decoder lies outside the wrapped model, so it is missing above and "
                "below the bar, and it is trained in full.",
                (lambda a, d, f: a / (a + f),),
            ),
            Misconception(
                "decoder not counted as trained",
                "The decoder is in your total, but not among what is trained. It "
                "starts from random numbers; every weight in it gets a gradient.",
                (lambda a, d, f: a / (a + d + f),),
            ),
            Misconception(
                "decoder missing from the total",
                "The decoder is above the fraction bar and not below it: a share can "
                "then exceed 1.",
                (lambda a, d, f: (a + d) / (a + f),),
            ),
            Misconception(
                "percent",
                "The number is right in percent; a fraction between 0 and 1 is asked "
                "for.",
                (lambda a, d, f: 100 * (a + d) / (a + d + f),),
            ),
            Misconception(
                "trained over frozen",
                "You divided by what is frozen. That is a ratio of two parts, not a "
                "share of the whole, and has no value when nothing is frozen.",
                (lambda a, d, f: (a + d) / f,),
            ),
            Misconception(
                "the frozen share",
                "That is the share that stays as it was: 1 minus what is asked for.",
                (lambda a, d, f: f / (a + d + f),),
            ),
            Misconception(
                "integer division",
                "// drops everything behind the decimal point, so every share below 1 "
                "becomes 0. Use /.",
                (lambda a, d, f: (a + d) // (a + d + f),),
            ),
        ),
        differ=numbers_differ,
    )


# ------------------------------------------------------------------------------ 02.3
def foreground_dice(prediction, label, classes):
    scores = []
    for k in range(1, classes):  # 0 is background
        found, true = prediction == k, label == k
        size = int(found.sum() + true.sum())
        if size:  # in neither: there was nothing to find
            scores.append(2 * int((found & true).sum()) / size)
    return sum(scores) / len(scores) if scores else math.nan


def _parts(prediction: Any, label: Any, k: int) -> tuple[int, int, int]:
    """Overlap, predicted and true pixels of a class."""
    found, true = prediction == k, label == k
    return int((found & true).sum()), int(found.sum()), int(true.sum())


def _mean(scores: list[float], empty: float = math.nan) -> float:
    return sum(scores) / len(scores) if scores else empty


def _dice_like(
    first: int = 1,
    last: int = 0,
    absent: float | None = None,
    empty: float = math.nan,
    factor: float = 2.0,
    smooth: float = 0.0,
    skip: str = "both",
):
    """A Dice with one thing changed: the wrong ideas below differ in one each."""

    def wrong(prediction, label, classes):
        scores = []
        for k in range(first, classes + last):
            both, found, true = _parts(prediction, label, k)
            out = {"both": found + true == 0, "truth": true == 0, "either": 0}[skip]
            if skip == "either":
                out = found == 0 or true == 0
            if not out or smooth:
                scores.append((factor * both + smooth) / (found + true + smooth))
            elif absent is not None:
                scores.append(absent)
        return _mean(scores, empty)

    return wrong


def _iou(prediction, label, classes):
    parts = [_parts(prediction, label, k) for k in range(1, classes)]
    return _mean([both / (f + t - both) for both, f, t in parts if f + t])


def _pooled(prediction, label, classes):
    both, found, true = _parts(prediction > 0, label > 0, 1)
    return 2 * both / (found + true) if found + true else math.nan


def _summed(prediction, label, classes):
    parts = [_parts(prediction, label, k) for k in range(1, classes)]
    both, found, true = (sum(column) for column in zip(*parts, strict=True))
    return 2 * both / (found + true) if found + true else math.nan


def _accuracy(prediction, label, classes):
    return float((prediction == label).double().mean())


def _dice_differs(got: Any, want: Any) -> str | None:
    """Compare two numbers of which either may be NaN."""
    if hasattr(got, "__float__") and not isinstance(got, bool | str | complex):
        here, there = math.isnan(float(got)), math.isnan(float(want))
        if here and there:
            return None
        if there:
            return f"expected NaN, for there was nothing to find; got {float(got):.6g}"
    return numbers_differ(got, want)


def _maps(said: str, prediction: str, label: str, classes: int = 4) -> Case:
    """A case from two maps, drawn as rows of digits."""

    def read(text: str) -> torch.Tensor:
        return torch.tensor([[int(digit) for digit in row] for row in text.split()])

    return Case(said, lambda: (read(prediction), read(label), classes))


def _dice() -> Exercise:
    return Exercise(
        id="02.3",
        title="a Dice that background cannot inflate",
        ask="Write foreground_dice(prediction, label, classes): the mean Dice over "
        "the classes 1 to classes - 1 of two integer maps of one shape; 0 is "
        "background. A class that is in neither map is left out of the mean; when "
        "that leaves none, return NaN.",
        difficulty=2,
        minutes=8,
        hints=(
            "Take one class at a time, as two masks: where is it predicted, where is "
            "it true?",
            "Dice of a class is 2·|overlap| / (|predicted| + |true|). When is that "
            "0/0, and what should a mean do then?",
            "Loop over range(1, classes), skip k only if both masks are empty, "
            "average, and return math.nan for an empty list.",
        ),
        solution_function=foreground_dice,
        explanation="Background fills most of a slice, so its Dice is near 1: with it, "
        "three classes at 0.56 read as 0.67. A class that is in neither map says "
        "nothing about the model, so it neither helps nor hurts; one that is predicted "
        "where there is none scores 0.",
        cases=(
            _maps(
                "three classes, partly right",
                "000000 011220 011220 033330 000000",
                "000000 001220 011222 003330 000030",
            ),
            _maps("a class in neither map", "0000 0110 0220", "0000 0011 0220"),
            _maps("a false alarm", "0000 0112 0330", "0000 0110 0333"),
            _maps("a class that is missed", "0000 0110 0000", "0330 0110 0220"),
            _maps("nothing to find, nothing found", "0000 0000", "0000 0000"),
            _maps("one foreground class", "0011 0111", "0001 1111", 2),
        ),
        misconceptions=(
            Misconception(
                "background included",
                "Your mean holds class 0. Background is most of the slice and nearly "
                "always right, so it lifts every score.",
                (_dice_like(first=0),),
            ),
            Misconception(
                "absent class counts as 1",
                "A class that is in neither map adds a 1 to your mean: the rarer a "
                "class, the better a model looks that never finds it. Leave it out.",
                (_dice_like(absent=1.0), _dice_like(absent=1.0, empty=1.0)),
            ),
            Misconception(
                "absent class counts as 0",
                "A class that is in neither map adds a 0 to your mean: a model is "
                "punished for a lesion that is not there. Leave it out.",
                (_dice_like(absent=0.0), _dice_like(absent=0.0, empty=0.0)),
            ),
            Misconception(
                "empty case scored",
                "The classes are right; but with nothing to find and nothing found "
                "there is no score to give. Return NaN, and report such cases apart.",
                (_dice_like(empty=0.0), _dice_like(empty=1.0)),
            ),
            Misconception(
                "intersection over union",
                "That is IoU (Jaccard), which divides by the union. Dice divides twice "
                "the overlap by the sum of the two sizes and is never smaller.",
                (_iou,),
            ),
            Misconception(
                "classes pooled",
                "You scored tumour against none, or summed the counts over classes "
                "before dividing. The large class then hides the small ones: score "
                "every class, then average.",
                (_pooled, _summed),
            ),
            Misconception(
                "factor 2 forgotten",
                "Overlap over the sum of both sizes is at most one half; Dice has a 2 "
                "above the bar.",
                (_dice_like(factor=1.0),),
            ),
            Misconception(
                "smoothing added",
                "A constant above and below the bar is for losses: it gives a score to "
                "classes that are not there and lifts small lesions.",
                (_dice_like(smooth=1.0), _dice_like(smooth=1e-3)),
            ),
            Misconception(
                "false alarms forgiven",
                "You skip a class that the label lacks even when it is predicted. That "
                "is a false alarm and scores 0; skip a class only if it is in neither.",
                (_dice_like(skip="truth"), _dice_like(skip="either")),
            ),
            Misconception(
                "last class forgotten",
                "classes counts background too, so the last class is classes - 1, and "
                "range(1, classes) reaches it.",
                (_dice_like(last=-1),),
            ),
            Misconception(
                "pixel accuracy",
                "The share of right pixels is nearly 1 for a model that finds nothing.",
                (_accuracy,),
            ),
        ),
        differ=_dice_differs,
    )


def make() -> list[Exercise]:
    """Return fresh exercises of lesson 02, in order."""
    return [_share(), split(), _dice(), windowing()]
