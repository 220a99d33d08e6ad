"""Exercises of lesson 06: Dice, partial labels, an adapter, and a rank that is found.

The first three are in `ex06_dice`, `ex06_partial` and `ex06_adapter`; what an adapter
does is found out in `ex06_examine`.
"""

from __future__ import annotations

from typing import Any

import torch

from medtut.course.exercises.engine import Case, Exercise, describe, tensors_differ
from medtut.course.exercises.ex05_attention import Answer, idea
from medtut.course.exercises.ex06_adapter import adapter
from medtut.course.exercises.ex06_dice import dice
from medtut.course.exercises.ex06_partial import partial


# ------------------------------------------------------------------------------ 06.4
def proximal_step(d, gradient, lr, weight):
    moved = d - lr * gradient  # the loss, without its penalty
    return moved.sign() * (moved.abs() - lr * weight).clamp(min=0)


def _step(
    move: Answer = lambda d, g, lr, w: d - lr * g,
    shrink: Answer = lambda z, t: z.sign() * (z.abs() - t).clamp(min=0),
    threshold: Answer = lambda lr, w: lr * w,
) -> Answer:
    """Make the solution from three steps, one of which may be another."""

    def answer(d, gradient, lr, weight):
        moved = move(d, gradient, lr, weight)
        return shrink(moved, threshold(lr, weight))

    return answer


def _steps_differ(got: Any, want: torch.Tensor) -> str | None:
    """Compare which entries are exactly zero, which is the rank, then the values."""
    if not isinstance(got, torch.Tensor) or got.shape != want.shape:
        return f"expected {describe(want)}, got {describe(got)}"
    zeros, wanted = (int((one == 0).sum()) for one in (got, want))
    if zeros != wanted or not torch.equal(got == 0, want == 0):
        return f"{zeros} entries are exactly zero, and {wanted} have to be"
    return tensors_differ(got, want)


def _subgradient(d, gradient, lr, weight):
    return d - lr * (gradient + weight * d.sign())


def _before(d, gradient, lr, weight):
    return d.sign() * (d.abs() - lr * weight).clamp(min=0) - lr * gradient


def _old_signs(d, gradient, lr, weight):
    moved = d - lr * gradient
    return d.sign() * (d.sign() * moved - lr * weight).clamp(min=0)


def _old_signs_kept(d, gradient, lr, weight):
    moved = d - lr * gradient
    return d.sign() * (moved.abs() - lr * weight).clamp(min=0)


def _singular(said: str, size: int, lr: float, weight: float, drift: float) -> Case:
    """Entries of both signs, some small, with gradients that turn a few of them."""

    def draw() -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(size)
        d = torch.randn(size, generator=generator)
        gradient = drift * torch.randn(size, generator=generator)
        d[size // 2], gradient[size // 2] = 0.0, 0.0  # zero stays zero
        small = size // 3
        d[small] = 0.3 * lr * weight
        gradient[small] = d[small] * 0.1 / lr
        d[0], gradient[0] = 0.2, 1.5 / lr  # goes far below zero: the sign turns
        return d, gradient, lr, weight

    return Case(said, draw)


def rank() -> Exercise:
    return Exercise(
        id="06.4",
        title="a rank that is found",
        ask="Write proximal_step(d, gradient, lr, weight): one step of proximal "
        "gradient descent on loss(d) + weight·Σ|d|, for the diagonal d (r,) between "
        "LoRA's factors. gradient is that of the loss without its penalty. First the "
        "usual step of size lr, then the soft threshold: every entry moves by "
        "lr·weight toward zero and, where it arrives, stops at exactly 0. Return the "
        "new d; the old one stays as it is. The entries that are not zero in the end "
        "count the rank.",
        difficulty=2,
        minutes=7,
        hints=(
            "|d| has a kink at zero, and the kink is the point: a gradient of it would "
            "step over zero and back for ever. What does the minimum of "
            "(x - z)²/2 + t·|x| over x do with a small z?",
            "Two steps. z = d - lr·gradient knows nothing of the penalty. Then, with "
            "t = lr·weight: z - t where z > t, z + t where z < -t, and 0 between.",
            "moved = d - lr * gradient; return moved.sign() * (moved.abs() - lr * "
            "weight).clamp(min=0). torch.nn.functional.softshrink is the second line.",
        ),
        solution_function=proximal_step,
        explanation="ARENA (Baklouti et al. 2025, arXiv 2507.15793) writes LoRA's "
        "update as B·diag(d)·A and finds the rank so: with a weight of 1 and a rate of "
        "0.1, a direction whose gradient is 0 goes from 1 to 0 in ten steps, and stays "
        "while its gradient is smaller than the weight. Weight decay would leave "
        "0.9 to the power of 10, which is 0.35, and never a zero. The rank is still "
        "chosen, though by another knob: the weight. And B and A may grow while d "
        "shrinks, so the penalty orders directions more than it bounds the update.",
        cases=(
            _singular("twelve directions", 12, 0.1, 2.0, 1.0),
            _singular("a weak penalty", 9, 0.5, 0.1, 1.0),
            _singular("a small rate and a strong penalty", 16, 0.02, 20.0, 3.0),
            _singular("no penalty", 7, 0.3, 0.0, 1.0),
            _singular("a rate above one", 10, 1.5, 0.3, 0.5),
        ),
        misconceptions=(
            idea(
                "gradient of the penalty",
                "You added weight·sign(d) to the gradient. That steps over zero and "
                "back, so hardly an entry is ever exactly zero, and there is no rank "
                "to count. Step with the loss alone, then threshold.",
                _subgradient,
            ),
            idea(
                "stepped over zero",
                "Entries smaller than the threshold came out on the other side of "
                "zero. They stop there: clamp(min=0) before the sign goes back on.",
                _step(shrink=lambda z, t: z - t * z.sign()),
            ),
            idea(
                "threshold before the step",
                "You shrank d first and then took the step of the loss, after which "
                "nothing is exactly zero any more. The threshold comes last.",
                _before,
            ),
            idea(
                "no learning rate in the threshold",
                "You shrank by the weight. The penalty takes a step of size lr as the "
                "loss does: by lr·weight. Else its strength changes when the rate is "
                "lowered.",
                _step(threshold=lambda lr, w: w),
            ),
            idea(
                "rate left out of the step",
                "You subtracted the whole gradient. The step of the loss is "
                "lr·gradient.",
                _step(move=lambda d, g, lr, w: d - g),
            ),
            idea(
                "threshold of the rate",
                "You shrank by lr, whatever the weight. The threshold is lr·weight.",
                _step(threshold=lambda lr, w: lr),
            ),
            idea(
                "hard threshold",
                "You set small entries to zero and left the others alone. The soft "
                "threshold moves all of them by the same amount: that is what the "
                "slope of |d| does.",
                _step(shrink=lambda z, t: torch.where(z.abs() > t, z, z * 0)),
                _step(shrink=lambda z, t: z * (z.abs() >= t)),
            ),
            idea(
                "negative entries lost",
                "You cut off everything below zero. A direction may count with either "
                "sign, so the threshold works on |z|.",
                _step(shrink=lambda z, t: (z - t).clamp(min=0)),
            ),
            idea(
                "sign lost",
                "You returned |z| - t without the sign of z.",
                _step(shrink=lambda z, t: (z.abs() - t).clamp(min=0)),
            ),
            idea(
                "sign of the old d",
                "You took the sign of d from before the step. An entry that the loss "
                "has carried across zero has the other sign now: use that of "
                "d - lr·gradient.",
                _old_signs,
                _old_signs_kept,
            ),
            idea(
                "weight decay",
                "You multiplied by a factor. That is the step for d², which makes "
                "entries small and none of them zero.",
                _step(shrink=lambda z, t: z * (1 - t)),
                _step(shrink=lambda z, t: z / (1 + t)),
                _step(shrink=lambda z, t: z * (1 - 2 * t)),
                lambda d, g, lr, w: d - lr * (g + w * d),
                lambda d, g, lr, w: d - lr * (g + 2 * w * d),
            ),
            idea(
                "uphill",
                "You added the gradient. A loss falls against it.",
                _step(move=lambda d, g, lr, w: d + lr * g),
            ),
            idea(
                "the threshold alone",
                "You left out the step of the loss. Nothing then speaks for a "
                "direction, and all of them go to zero.",
                _step(move=lambda d, g, lr, w: d),
            ),
            idea(
                "the step alone",
                "You left out the threshold: that is gradient descent without a "
                "penalty.",
                _step(shrink=lambda z, t: z),
            ),
            idea(
                "clipped",
                "You clipped entries to ±lr·weight: that is what the soft threshold "
                "takes away, not what it leaves.",
                _step(shrink=lambda z, t: z.clamp(-t, t)),
            ),
            idea(
                "rank returned",
                "That is the number of directions left. The new d is asked for.",
                lambda *args: int(proximal_step(*args).count_nonzero()),
                lambda *args: proximal_step(*args).count_nonzero(),
            ),
        ),
        differ=_numbers_too,
    )


def _numbers_too(got: Any, want: Any) -> str | None:
    """`_steps_differ`, also for wrong answers that are whole numbers."""
    if not isinstance(want, torch.Tensor) or want.dim() == 0:
        alike = type(got) is type(want) and bool(got == want)
        return None if alike else f"got {describe(got)}"
    return _steps_differ(got, want)


def make() -> list[Exercise]:
    """Return fresh exercises of lesson 06, in order."""
    return [dice(), partial(), adapter(), rank()]
