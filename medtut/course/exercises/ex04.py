"""Exercises of lesson 04: adapters of convolutions, and a fair mean.

The layout of a picture and the correction of a prior are in `ex04_arrays`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from medtut.course.exercises.engine import (
    Case,
    Exercise,
    Misconception,
    describe,
    numbers_differ,
)
from medtut.course.exercises.ex02 import _dice_differs
from medtut.course.exercises.ex04_arrays import layout, prior


# ------------------------------------------------------------------------------ 04.1
def conv_lora_parameters(c_in, c_out, kernel, r):
    a = r * (c_in * kernel * kernel)  # one row for each of r filters
    b = c_out * r  # mixes the r maps, pixel by pixel
    return a + b


def _layer(c_in: int, c_out: int, kernel: int, r: int) -> Case:
    said = f"{c_in} channels to {c_out}, {kernel}×{kernel} window, rank {r}"
    return Case(said, lambda: (c_in, c_out, kernel, r))


def _counting() -> Exercise:
    return Exercise(
        id="04.1",
        title="the bill for VGG16's convolutions",
        ask="Write conv_lora_parameters(c_in, c_out, kernel, r): how many numbers LoRA "
        "of rank r trains beside a convolution from c_in channels to c_out with a "
        "square window. A is a matrix (r, c_in·kernel·kernel), B a matrix (c_out, r), "
        "and neither has a bias. Summed over the 13 convolutions of VGG16 at r = 8 it "
        "has to give 301,272.",
        difficulty=1,
        minutes=4,
        hints=(
            "Seen from one output pixel a convolution is a linear layer. How many "
            "inputs has it?",
            "c_in·kernel·kernel inputs, c_out outputs. A has r rows as long as the "
            "input, B has r columns as long as the output.",
            "r * c_in * kernel**2 + c_out * r.",
        ),
        solution_function=conv_lora_parameters,
        explanation="The widest layers, 512 to 512, have 2,359,296 numbers in the "
        "kernel and 40,960 in the pair. All thirteen pairs together, 301,272, cost as "
        "much as the pairs of the two large linear layers, 299,008: the linears are "
        "nine tenths of the network, and LoRA counts edges, not areas.",
        cases=(
            _layer(512, 512, 3, 8),
            _layer(3, 64, 3, 8),
            _layer(128, 256, 3, 4),
            _layer(16, 24, 1, 2),
            _layer(8, 4, 5, 1),
        ),
        misconceptions=(
            Misconception(
                "no window in A",
                "You counted r·(c_in + c_out), a linear layer. A row of A sees the "
                "whole window, kernel·kernel numbers of each channel; over VGG16 you "
                "would promise 63,512 in place of 301,272.",
                (lambda i, o, k, r: r * (i + o),),
            ),
            Misconception(
                "loralib's window in B",
                "r·k²·(c_in + c_out) is what loralib's ConvLoRA trains: its A has r·k "
                "rows and its B r·k columns, over VGG16 571,608 numbers at r = 8, and "
                "its update has rank r·k. Here B is (c_out, r), as in peft.",
                (lambda i, o, k, r: r * k * i * k + o * k * r * k,),
            ),
            Misconception(
                "the window on the wrong side",
                "You gave the window to B. The filters that look at neighbouring "
                "pixels are A's; B only mixes what they found.",
                (lambda i, o, k, r: r * i + o * r * k * k,),
            ),
            Misconception(
                "one side of the window",
                "The window is square: kernel·kernel numbers of each channel. You "
                "counted kernel.",
                (
                    lambda i, o, k, r: r * i * k + o * r,
                    lambda i, o, k, r: r * i * 2 * k + o * r,
                ),
            ),
            Misconception(
                "the frozen weight counted",
                "c_out·c_in·kernel² numbers are the pretrained kernel. It stays as it "
                "is; LoRA trains A and B beside it.",
                (
                    lambda i, o, k, r: o * i * k * k,
                    lambda i, o, k, r: o * i * k * k + r * i * k * k + o * r,
                    lambda i, o, k, r: o * (i * k * k + 1) + r * i * k * k + o * r,
                ),
            ),
            Misconception(
                "one factor only",
                "You counted one of the two. A leads from the window down to r, B from "
                "r up to c_out, and both are trained.",
                (
                    lambda i, o, k, r: r * i * k * k,
                    lambda i, o, k, r: o * r,
                ),
            ),
            Misconception(
                "the product",
                "You multiplied the sizes of A and B. They are stored apart, and their "
                "sizes are added: that is the whole saving.",
                (
                    lambda i, o, k, r: r * i * k * k * o * r,
                    lambda i, o, k, r: r * i * k * k * o,
                ),
            ),
            Misconception(
                "biases added",
                "A and B are matrices without a bias.",
                (
                    lambda i, o, k, r: r * i * k * k + o * r + o,
                    lambda i, o, k, r: r * i * k * k + o * r + r + o,
                ),
            ),
        ),
        differ=numbers_differ,
    )


# ------------------------------------------------------------------------------ 04.3
def macro_recall(confusion):
    pictures = confusion.sum(axis=1)  # of each true class
    there = pictures > 0
    return (confusion.diagonal()[there] / pictures[there]).mean()


def _share(confusion: Any, axis: int = 1, empty: float | None = None) -> np.ndarray:
    """Diagonal over the sums of an axis; 0/0 is worth `empty`, or left out."""
    hits, size = confusion.diagonal(), confusion.sum(axis=axis)
    shares = np.full(len(hits), math.nan if empty is None else float(empty))
    np.divide(hits, size, out=shares, where=size > 0)
    return shares[size > 0] if empty is None else shares


def _f1(confusion):
    size = confusion.sum(axis=0) + confusion.sum(axis=1)
    there = size > 0
    return (2 * confusion.diagonal()[there] / size[there]).mean()


def _one_against_rest(confusion):
    total, hits = confusion.sum(), confusion.diagonal()
    wrong = confusion.sum(axis=0) + confusion.sum(axis=1) - 2 * hits
    return (1 - wrong / total).mean()


def _score_differs(got: Any, want: Any) -> str | None:
    """Compare two numbers, or two rows of them where no number was returned."""
    if np.ndim(got) == np.ndim(want) == 0:
        return _dice_differs(got, want)
    if np.shape(got) == np.shape(want) and np.allclose(got, want, equal_nan=True):
        return None
    return f"one number is asked for, got {describe(got)}"


def _table(said: str, rows: str) -> Case:
    """A confusion matrix from its rows, separated by bars."""
    counts = [[int(n) for n in row.split()] for row in rows.split("|")]
    return Case(said, lambda: (np.array(counts),))


def _macro() -> Exercise:
    return Exercise(
        id="04.3",
        title="a mean in which every class counts the same",
        ask="Write macro_recall(confusion), from a NumPy array of counts (classes, "
        "classes) in which rows are the true classes and columns the predicted ones: "
        "the recall of each class, averaged over classes with equal weight. A class "
        "without a picture in the test set has no recall: leave it out of the mean.",
        difficulty=2,
        minutes=5,
        hints=(
            "Of all gliomas, how many were called glioma? Where in the table is each "
            "of the two numbers?",
            "confusion.diagonal() holds the hits, confusion.sum(axis=1) the pictures "
            "of each true class. Which classes may be divided?",
            "there = confusion.sum(axis=1) > 0; then (confusion.diagonal()[there] / "
            "confusion.sum(axis=1)[there]).mean().",
        ),
        solution_function=macro_recall,
        explanation="Also called balanced accuracy. Whoever always says meningioma is "
        "right for 115 of the 394 published test pictures, 29.19 %; the macro recall "
        "is 0.25, as for any constant answer among four classes. Weighting each recall "
        "by its pictures cancels the division and is the accuracy again, and so are "
        "micro-averaged recall and micro-averaged precision: three names, one number.",
        cases=(
            _table("a rare class", "50 6 2 2|10 70 5 15|1 3 8 2|0 4 1 21"),
            _table("one answer for all", "0 100 0 0|0 115 0 0|0 105 0 0|0 74 0 0"),
            _table("a class without a picture", "8 1 2|2 5 1|0 0 0"),
            _table("a class in neither rows nor columns", "6 0 3|0 0 0|1 0 9"),
            _table("two classes", "9 1|5 15"),
        ),
        misconceptions=(
            Misconception(
                "accuracy",
                "That is the accuracy, under one of its other names: micro-averaged "
                "recall, or recall weighted by the pictures of each class. Large "
                "classes decide it. Average the recalls with equal weight.",
                (
                    lambda c: np.trace(c) / c.sum(),
                    lambda c: np.average(_share(c, empty=0), weights=c.sum(axis=1)),
                ),
            ),
            Misconception(
                "precision",
                "You divided by the columns: of all pictures called glioma, how many "
                "were? That is precision. Recall asks the rows, sum(axis=1).",
                (
                    lambda c: _share(c, axis=0).mean(),
                    lambda c: _share(c, axis=0, empty=0).mean(),
                    lambda c: _share(c, axis=0, empty=math.nan).mean(),
                ),
            ),
            Misconception(
                "divided by zero",
                "A class without a picture gave 0/0, and one NaN makes the mean NaN. "
                "Leave that class out before you average.",
                (lambda c: _share(c, empty=math.nan).mean(),),
            ),
            Misconception(
                "absent class counted",
                "A class without a picture stands in your mean as 0 (or 1). Nothing "
                "was asked about it, so nothing was missed: divide by the number of "
                "classes that are there.",
                (
                    lambda c: _share(c, empty=0).mean(),
                    lambda c: _share(c, empty=1).mean(),
                ),
            ),
            Misconception(
                "one number for each class",
                "Those are the recalls. Their mean is asked for; report them beside "
                "it, for a mean hides the class that is missed.",
                (_share, lambda c: _share(c, empty=math.nan)),
            ),
            Misconception(
                "summed",
                "You added the recalls up. Divide by the number of classes that are "
                "there.",
                (lambda c: _share(c).sum(),),
            ),
            Misconception(
                "macro F1",
                "That is the mean F1, 2·hits / (row + column), which punishes false "
                "alarms as well. Another fair number, and not the recall.",
                (_f1,),
            ),
            Misconception(
                "true negatives counted",
                "You scored each class against the rest. Most pictures are none of one "
                "class and are rightly not called so: a constant answer among four "
                "classes scores more than 0.6 that way.",
                (_one_against_rest,),
            ),
            Misconception(
                "in percent",
                "That is the macro recall in percent. A share between 0 and 1 is asked "
                "for; the published table mixes the two (0.25 stands for 25 %).",
                (lambda c: 100 * _share(c).mean(),),
            ),
        ),
        differ=_score_differs,
    )


def make() -> list[Exercise]:
    """Return fresh exercises of lesson 04, in order."""
    return [_counting(), layout(), _macro(), prior()]
