"""Exercise 05.1: attention in blocks, without ever holding a row of logits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from medtut.course.exercises.engine import (
    Case,
    Exercise,
    Misconception,
    tensors_differ,
)

Answer = Callable[..., Any]


def tensors_may_be_wild(got: Any, want: Any, rtol: float = 1e-3) -> str | None:
    """`tensors_differ` for answers, right and wrong ones, that may hold NaN."""
    alike = isinstance(got, torch.Tensor) and got.shape == want.shape
    if not alike or (got.isfinite().all() and want.isfinite().all()):
        return tensors_differ(got, want, rtol)
    if torch.allclose(got.double(), want.double(), rtol=0.01, equal_nan=True):
        return None
    count = int((~got.isfinite()).sum())
    return f"{count} of {got.numel()} numbers are NaN or infinite"


def idea(name: str, message: str, *wrong: Answer) -> Misconception:
    return Misconception(name, message, wrong)


# ------------------------------------------------------------------------------ 05.1
def online_softmax(q, keys, values, block):
    top, total, mixed = torch.tensor(-math.inf), 0.0, 0.0
    for k, v in zip(keys.split(block), values.split(block), strict=True):
        logits = k @ q / math.sqrt(len(q))
        highest = torch.maximum(top, logits.max())
        shrink = (top - highest).exp()  # what was summed below an older maximum
        weights = (logits - highest).exp()
        total = shrink * total + weights.sum()
        mixed = shrink * mixed + weights @ v
        top = highest
    return mixed / total


class WholeRowError(RuntimeError):
    """An answer held as many numbers as there are keys."""


class _Rows(torch.Tensor):
    """Keys or values that refuse every operation with one number for each row.

    Their number is a prime larger than the widths, so that no other tensor of the
    exercise has as many entries.
    """

    rows, block = 0, 0

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        got = super().__torch_function__(func, types, args, kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            seen = [t for t in (*args, got) if isinstance(t, torch.Tensor)]
            whole = any(t.numel() == cls.rows for t in seen)
            if "scaled_dot_product" in getattr(func, "__name__", ""):
                whole |= any(cls.rows in t.shape for t in seen)
        if whole and cls.rows > cls.block:
            raise WholeRowError(
                f"{cls.rows} numbers at once, one for each key, where a block has "
                f"{cls.block}"
            )
        return got


def _row(said: str, rows: int, block: int, first: float = 0, last: float = 0) -> Case:
    """Random keys whose logits lie, within one or two, on a line from first to last."""

    def draw() -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(rows + block)
        q, keys, values = (
            torch.randn(shape, generator=generator)
            for shape in (4, (rows, 4), (rows, 3))
        )
        along = q / q.norm()
        keys = keys + torch.linspace(first, last, rows)[:, None] * along
        watched = type("Rows", (_Rows,), {"rows": rows, "block": block})
        args = keys.as_subclass(watched), values.as_subclass(watched)
        return 2 * along, *args, block  # of length √d, so its logit is keys · along

    return Case(f"{said} ({rows} keys in blocks of {block})", draw)


def _walk(
    scale: Answer = lambda d: d**-0.5,
    start: float = -math.inf,
    highest: Answer = lambda top, logits: torch.maximum(top, logits.max()),
    total_shrinks: bool = True,
    mixed_shrinks: bool = True,
    upside_down: bool = False,
    divide: str = "end",
    whole_blocks: bool = False,
) -> Answer:
    """Make the solution with one thing or another done wrongly."""

    def answer(q, keys, values, block):
        top, total = torch.tensor(float(start)), torch.tensor(0.0)
        mixed = torch.zeros(values.shape[1])
        for k, v in zip(keys.split(block), values.split(block), strict=True):
            if whole_blocks and len(k) < block:
                break
            logits = k @ q * scale(len(q))
            new = highest(top, logits)
            shrink = (top - new).exp()
            if upside_down and top.isfinite():
                shrink = 1 / shrink
            weights = (logits - new).exp()
            total = (shrink if total_shrinks else 1) * total + weights.sum()
            mixed = (shrink if mixed_shrinks else 1) * mixed + weights @ v
            mixed = mixed / total if divide in ("block", "both") else mixed
            top = new
        return mixed / total if divide in ("end", "both") else mixed

    return answer


def _block_by_block(gather: Answer) -> Answer:
    def answer(q, keys, values, block):
        pairs = zip(keys.split(block), values.split(block), strict=True)
        return gather([(k @ q / len(q) ** 0.5).softmax(0) @ v for k, v in pairs])

    return answer


def _whole(q, keys, values, block):
    return (keys @ q / len(q) ** 0.5).softmax(0) @ values


def _library(q, keys, values, block):
    return F.scaled_dot_product_attention(q[None], keys, values)[0]


def _block_top(top: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    return logits.max()


def _first_top(top: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    return top if top.isfinite() else logits.max()


def attention() -> Exercise:
    return Exercise(
        id="05.1",
        title="attention without the row",
        ask="Write online_softmax(q, keys, values, block): attention of one query q "
        "(d,) over keys (N, d) and values (N, e), that is softmax(keys·q / √d) · "
        "values, of shape (e,). Go through the keys in blocks of `block`, the last of "
        "which may be smaller, and keep three things only: the largest logit so far, "
        "the sum of the weights, and the weighted sum of the values. More than `block` "
        "logits at once are refused, and logits may lie anywhere between -300 and 300.",
        difficulty=3,
        minutes=10,
        hints=(
            "exp(300) is infinite in float32, so the largest logit is subtracted "
            "first. It may come in the last block. What do the weights that you have "
            "summed by then have too much of?",
            "When the maximum rises from top to highest, everything so far was "
            "measured against top: multiply by exp(top - highest). The sum needs it, "
            "and so does the weighted sum of the values. Divide once, at the end.",
            "For each block: logits = k @ q / √d; highest = max(top, logits.max()); "
            "shrink = exp(top - highest); weights = exp(logits - highest); total = "
            "shrink·total + weights.sum(); mixed = shrink·mixed + weights @ v; top = "
            "highest. Start with top = -inf and zeros, return mixed / total.",
        ),
        solution_function=online_softmax,
        explanation="Milakov and Gimelshein 2018 (arXiv:1805.02867) for the sum, Rabe "
        "and Staats 2021 (arXiv:2112.05682) for the values; with tiles that fit a "
        "GPU's fast memory it is FlashAttention. It is exact: another order of the "
        "same sums, whatever the logits are. A scale, normalised queries and keys, or "
        "a bias, change the logits and not the trick. So a fast path has no reason to "
        "leave them out. The first shrink is exp(-inf) = 0, times sums that are 0.",
        cases=(
            _row("ordinary logits", 13, 4),
            _row("the largest logits last", 17, 5, -100, 100),
            _row("the largest logits first", 19, 6, 100, -100),
            _row("all logits around -130", 13, 5, -130, -130),
            _row("blocks of two", 11, 2),
            _row("one block for all", 5, 5),
        ),
        misconceptions=(
            idea(
                "the whole row",
                "The value is right, from a row with a logit for every key. That row "
                "is what runs out of memory: 576 for each of 576 queries, 8 heads and "
                "24 planes of a volume. Take one block after the other.",
                _whole,
                _library,
            ),
            idea(
                "old sum not rescaled",
                "You rescaled the values and not the sum. Both were measured against "
                "the old maximum: exp(top - highest)·total + …",
                _walk(total_shrinks=False),
            ),
            idea(
                "old values not rescaled",
                "You rescaled the sum and not the values collected so far. Both were "
                "measured against the old maximum: exp(top - highest)·mixed + …",
                _walk(mixed_shrinks=False),
            ),
            idea(
                "nothing rescaled",
                "The maximum rises, and what was summed below the old one stays as it "
                "is: early blocks count too much. Multiply both sums by "
                "exp(top - highest).",
                _walk(total_shrinks=False, mixed_shrinks=False),
            ),
            idea(
                "a maximum for each block",
                "Every block is measured against its own maximum, so a block of small "
                "logits weighs as much as one of large ones. One maximum has to hold "
                "for all: the largest so far.",
                _walk(highest=_block_top, total_shrinks=False, mixed_shrinks=False),
            ),
            idea(
                "the last block's maximum",
                "You went down to a lower maximum when a block had one. What was "
                "summed before is then multiplied by exp of a large number, and that "
                "is infinite. Take the larger of old and new.",
                _walk(highest=_block_top),
            ),
            idea(
                "the first block's maximum",
                "The maximum of the first block stays yours to the end. A later logit "
                "may lie 100 above it, and exp(100) is infinite in float32.",
                _walk(highest=_first_top),
            ),
            idea(
                "no maximum",
                "exp of the logit as it is: above 88 it is infinite in float32, below "
                "-104 it is 0, and inf / inf or 0 / 0 is NaN. Subtract the largest "
                "logit so far.",
                _walk(start=0, highest=lambda top, logits: top),
            ),
            idea(
                "starts at zero",
                "Your maximum starts at 0 and stays there when every logit is far "
                "below, where exp gives 0 / 0. Start at -inf.",
                _walk(start=0),
            ),
            idea(
                "rescaled the wrong way",
                "You multiplied by exp(highest - top), which makes old weights larger "
                "when a larger logit comes. They must shrink: exp(top - highest).",
                _walk(upside_down=True),
            ),
            idea(
                "each block by itself",
                "You took a softmax in each block. Its weights sum to 1 there, however "
                "small the block's logits are. The sum is taken over all blocks, and "
                "divided by once, at the end.",
                _block_by_block(sum),
                _block_by_block(lambda found: sum(found) / len(found)),
                _block_by_block(lambda found: found[-1]),
            ),
            idea(
                "divided in every block",
                "You divided by the sum in each block, so what the next one rescales "
                "is no longer a sum. Divide once, at the end.",
                _walk(divide="block"),
                _walk(divide="both"),
            ),
            idea(
                "not divided",
                "Weights of a softmax sum to 1: divide by their sum at the end.",
                _walk(divide="never"),
            ),
            idea(
                "no scale",
                "The logits are keys·q / √d. Without √d the softmax is sharper.",
                _walk(scale=lambda d: 1),
            ),
            idea(
                "another scale",
                "The logits are keys·q / √d: the root of the width, below the bar.",
                _walk(scale=lambda d: 1 / d),
                _walk(scale=lambda d: d**0.5),
            ),
            idea(
                "the last block left out",
                "The last block is smaller, and you left it out. split(block) and "
                "range(0, N, block) keep it; N // block does not count it.",
                _walk(whole_blocks=True),
            ),
        ),
        differ=lambda got, want: tensors_may_be_wild(_plain(got), _plain(want)),
    )


def _plain(value: Any) -> Any:
    watched = isinstance(value, _Rows)
    return value.as_subclass(torch.Tensor) if watched else value
