"""Exercises of lesson 03: adapters of a SAM, a loss, a prompt, a patient's Dice."""

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
from medtut.course.exercises.ex02 import _dice_differs
from medtut.course.exercises.ex03_box import box
from medtut.course.exercises.ex03_loss import loss


# ------------------------------------------------------------------------------ 03.1
def adapter_parameters(d, blocks, r, roles="qv"):
    pair = r * d + d * r  # A is (r, d), B is (d, r)
    return blocks * len(roles) * pair


def _count_case(said: str, d: int, blocks: int, r: int, roles: str) -> Case:
    numbers = f"width {d}, {blocks} blocks, rank {r}, roles {roles!r}"
    return Case(f"{said} ({numbers})", lambda: (d, blocks, r, roles))


def _counting() -> Exercise:
    return Exercise(
        id="03.1",
        title="what LoRA adds to a SAM",
        ask="Write adapter_parameters(d, blocks, r, roles): how many numbers LoRA of "
        "rank r adds to an image encoder of so many blocks and width d. In every "
        "block one linear layer maps d to 3·d, with query, key and value one after "
        "the other. Each role in roles, a string such as 'qv', gets a pair A and B of "
        "its own, which updates its own third of the outputs.",
        difficulty=1,
        minutes=4,
        hints=(
            "How many inputs does the fused layer have, and how many outputs does one "
            "role own?",
            "A leads from d to r and B from r to d. The number of roles and the number "
            "of blocks multiply a pair; the other thirds of the layer get nothing.",
            "blocks * len(roles) * (r * d + d * r).",
        ),
        solution_function=adapter_parameters,
        explanation="ViT-B has 12 blocks of width 768: 36,864·r on query and value, so "
        "the published ranks 64, 128 and 256 add 2.4, 4.7 and 9.4 million numbers. "
        "One pair over the whole fused layer has r·(d + 3·d) numbers, by chance as "
        "many as two pairs on query and value; it is another update, which moves the "
        "key too. A count alone cannot tell the two apart.",
        cases=(
            _count_case("ViT-B as published", 768, 12, 64, "qv"),
            _count_case("ViT-H", 1280, 32, 4, "qv"),
            _count_case("the query alone", 768, 12, 8, "q"),
            _count_case("all three roles", 96, 4, 8, "qkv"),
            _count_case("one block, rank 1", 96, 1, 1, "qv"),
        ),
        misconceptions=(
            Misconception(
                "the fused layer as one",
                "You counted 4·d·r in a block whatever the roles, as for one pair over "
                "the whole layer, d to 3·d. For query and value that number is right "
                "by coincidence, but the pair also changes the key. One pair for each "
                "role that is named.",
                (lambda d, n, r, roles="qv": n * (r * d + 3 * d * r),),
            ),
            Misconception(
                "one pair for all roles",
                "You let the roles share one A (and one B). Then query and value are "
                "updated from the same r directions; here each role has its own pair.",
                (lambda d, n, r, roles="qv": n * (r * d + len(roles) * d * r),),
            ),
            Misconception(
                "the value forgotten",
                "You counted one pair in a block. With roles 'qv' there are two: one "
                "for the query, one for the value.",
                (lambda d, n, r, roles="qv": n * 2 * d * r,),
            ),
            Misconception(
                "the key adapted too",
                "You counted three pairs in a block. Only the roles that are named get "
                "one; the layer is fused, its thirds are not.",
                (lambda d, n, r, roles="qv": n * 3 * 2 * d * r,),
            ),
            Misconception(
                "only A",
                "You counted one matrix of each pair. A brings d down to r, B brings r "
                "back up to d, and both are trained.",
                (lambda d, n, r, roles="qv": n * len(roles) * d * r,),
            ),
            Misconception(
                "B as wide as the fused layer",
                "Your B leads to all 3·d outputs. A role owns d of them.",
                (lambda d, n, r, roles="qv": n * len(roles) * (r * d + 3 * d * r),),
            ),
            Misconception(
                "one block",
                "That is one block. Each attention block has a fused layer of its own.",
                (lambda d, n, r, roles="qv": len(roles) * 2 * d * r,),
            ),
            Misconception(
                "the frozen weight counted",
                "d·d numbers of each role are the pretrained weight. It stays as it "
                "was, and LoRA adds only A and B beside it.",
                (
                    lambda d, n, r, roles="qv": n * len(roles) * (d * d + 2 * d * r),
                    lambda d, n, r, roles="qv": n * len(roles) * d * d,
                ),
            ),
            Misconception(
                "biases added",
                "A and B are matrices without a bias.",
                (
                    lambda d, n, r, roles="qv": n * len(roles) * (2 * d * r + d),
                    lambda d, n, r, roles="qv": n * len(roles) * (2 * d * r + r + d),
                ),
            ),
        ),
        differ=numbers_differ,
    )


# ------------------------------------------------------------------------------ 03.4
def volume_dice(slices_pred, slices_truth):
    both = size = 0
    for found, true in zip(slices_pred, slices_truth, strict=True):
        both += int((found & true).sum())
        size += int(found.sum() + true.sum())
    return 2 * both / size if size else math.nan  # nothing there, nothing found


def _over(pred: Any, true: Any, factor: float = 2.0, smooth: float = 0.0) -> float:
    """Dice of what is given, in one piece; NaN where there is nothing."""
    both, size = int((pred & true).sum()), int(pred.sum() + true.sum())
    if size + smooth == 0:
        return math.nan
    return (factor * both + smooth) / (size + smooth)


def _mean_of(empty: float | None = None, keep: str = "either", none: float = math.nan):
    """A mean over slices: `keep` says which count, `empty` what 0/0 is worth."""

    def wrong(slices_pred, slices_truth):
        scores = []
        for found, true in zip(slices_pred, slices_truth, strict=True):
            there = {"either": found.any() | true.any(), "truth": true.any()}[keep]
            if there:
                scores.append(_over(found, true))
            elif empty is not None and not found.any():
                scores.append(empty)
        return sum(scores) / len(scores) if scores else none

    return wrong


def _only(choose):
    """The volume's Dice over the slices that `choose` keeps."""

    def wrong(slices_pred, slices_truth):
        kept = choose(slices_pred.flatten(1), slices_truth.flatten(1))
        return _over(slices_pred[kept], slices_truth[kept])

    return wrong


def _pasted(slices_pred, slices_truth):
    """One predicted slice in an empty volume, against the whole truth."""
    volume = torch.zeros_like(slices_pred)
    first = int(slices_truth.flatten(1).any(1).int().argmax())
    volume[first] = slices_pred[first]
    return _over(volume, slices_truth)


def _jaccard(slices_pred, slices_truth):
    union = int((slices_pred | slices_truth).sum())
    return int((slices_pred & slices_truth).sum()) / union if union else math.nan


def _stack(said: str, pred: str, truth: str) -> Case:
    """A case from two volumes drawn as rows of digits; a bar starts a new slice."""

    def read(text: str) -> torch.Tensor:
        levels = [level.split() for level in text.split("|")]
        drawn = [[[int(digit) for digit in row] for row in level] for level in levels]
        return torch.tensor(drawn, dtype=torch.bool)

    return Case(said, lambda: (read(pred), read(truth)))


def _volume() -> Exercise:
    return Exercise(
        id="03.4",
        title="one Dice for one patient",
        ask="Write volume_dice(slices_pred, slices_truth): the Dice of a patient, from "
        "two boolean tensors (slices, height, width), the predicted and the true "
        "masks. All slices count, as one volume; when no slice holds anything in "
        "either, return NaN.",
        difficulty=2,
        minutes=6,
        hints=(
            "A tumour is one thing. Is a slice through its tip, with four pixels, "
            "worth as much as one through its middle?",
            "Dice is 2·|overlap| / (|predicted| + |true|). Count all three over all "
            "slices first and divide once. What does a false alarm in an empty slice "
            "then do?",
            "both = (slices_pred & slices_truth).sum(), size = slices_pred.sum() + "
            "slices_truth.sum(); 2 * both / size, or math.nan where size is 0.",
        ),
        solution_function=volume_dice,
        explanation="A mean over slices gives the small end slices, which are hardest, "
        "as much weight as the middle, so it is another number. Slices without tumour "
        "have to stay: a box prompt drawn from the truth exists only where there is "
        "tumour, so a score over those slices never sees a false alarm. The published "
        "validation compared one slice with the whole mask: a perfect one of a tumour "
        "of thirty slices reaches a few hundredths.",
        cases=(
            _stack(
                "a large and a small slice",
                "00000 01110 01110|00000 01000 00000",
                "00000 01111 01111|00000 00110 00000",
            ),
            _stack(
                "a false alarm outside the tumour",
                "0000 0110|0110 0000|0111 0110|0000 0000",
                "0000 0000|0110 0110|0111 0111|0000 0000",
            ),
            _stack(
                "a slice that is missed",
                "0000 0110|0000 0000|0110 0111",
                "0000 0010|0000 0111|0111 0111",
            ),
            _stack("one slice only", "0110 0100", "0111 0000"),
            _stack("nothing to find", "0000 0000|0110 0000", "0000 0000|0000 0000"),
            _stack("nothing at all", "000 000|000 000", "000 000|000 000"),
        ),
        misconceptions=(
            Misconception(
                "mean over slices",
                "You scored every slice and averaged. A slice of four pixels then "
                "weighs as much as the middle of the tumour. Add up overlap and sizes "
                "over all slices, and divide once.",
                (_mean_of(), _mean_of(none=0.0), _mean_of(none=1.0)),
            ),
            Misconception(
                "empty slices count as 1",
                "Your mean holds a 1 for each slice with nothing in either mask. Most "
                "of a head has no tumour, so this lifts every score: fill the volume "
                "up with empty slices and a bad model looks perfect.",
                (_mean_of(empty=1.0),),
            ),
            Misconception(
                "empty slices count as 0",
                "Your mean holds a 0 for each slice with nothing in either mask, where "
                "the model was right.",
                (_mean_of(empty=0.0),),
            ),
            Misconception(
                "empty slices skipped",
                "You leave out slices without tumour in the truth, so a false alarm "
                "there costs nothing. That is what a score over tumour slices hides.",
                (
                    _only(lambda found, true: true.any(1)),
                    _mean_of(keep="truth"),
                    _mean_of(keep="truth", none=0.0),
                    _mean_of(keep="truth", none=1.0),
                ),
            ),
            Misconception(
                "misses skipped",
                "You leave out slices where nothing was predicted, so a slice that is "
                "missed costs nothing.",
                (
                    _only(lambda found, true: found.any(1)),
                    _only(lambda found, true: found.any(1) & true.any(1)),
                ),
            ),
            Misconception(
                "one slice compared",
                "You compared a single slice, the first or the largest. The other "
                "slices of this patient are never looked at.",
                (
                    _only(lambda found, true: torch.arange(1)),
                    _only(lambda found, true: true.any(1).int().argmax()[None]),
                    _only(lambda found, true: true.sum(1).argmax()[None]),
                ),
            ),
            Misconception(
                "one slice against the volume",
                "That is the published validation: one predicted slice in an empty "
                "volume, against the mask of all slices. Even a perfect slice then "
                "scores next to nothing.",
                (_pasted,),
            ),
            Misconception(
                "empty patient scored",
                "The volume is right; but with nothing to find and nothing found there "
                "is no score to give. Return NaN, and report such patients apart.",
                (
                    lambda pred, true: _over(pred, true) if (pred | true).any() else 0,
                    lambda pred, true: _over(pred, true) if (pred | true).any() else 1,
                ),
            ),
            Misconception(
                "intersection over union",
                "That is IoU (Jaccard), which divides by the union. Dice divides twice "
                "the overlap by the sum of the two sizes and is never smaller.",
                (_jaccard,),
            ),
            Misconception(
                "factor 2 forgotten",
                "Overlap over the sum of both sizes is at most one half; Dice has a 2 "
                "above the bar.",
                (lambda pred, true: _over(pred, true, factor=1.0),),
            ),
            Misconception(
                "smoothing added",
                "A constant above and below the bar is for losses: it gives a patient "
                "without tumour a score and lifts small lesions.",
                (
                    lambda pred, true: _over(pred, true, smooth=1.0),
                    lambda pred, true: _over(pred, true, smooth=1e-5),
                ),
            ),
        ),
        differ=_dice_differs,
    )


def make() -> list[Exercise]:
    """Return fresh exercises of lesson 03, in order."""
    return [_counting(), loss(), box(), _volume()]
