"""Exercise 06.2: a loss for volumes in which some organs were outlined and some not.

What a loss teaches is its gradient, so that is compared besides its value.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from medtut.course.exercises.engine import (
    Case,
    Exercise,
    Misconception,
    describe,
    numbers_differ,
)
from medtut.course.exercises.ex02_split import Probed
from medtut.course.exercises.ex05_attention import Answer, idea


# ------------------------------------------------------------------------------ 06.2
def partial_loss(logits, target, annotated):
    p, t = logits.sigmoid().flatten(2), target.flatten(2)
    loss = 1 - (2 * (p * t).sum(2) + 1) / (p.sum(2) + t.sum(2) + 1)  # (B, C)
    counts = annotated.sum(1)  # organs that each volume speaks about
    each = (loss * annotated).sum(1) / counts.clamp(min=1)
    return each[counts > 0].mean()


@dataclass(frozen=True)
class Taught:
    """A loss, and its gradient with respect to the logits, if there is one."""

    loss: float
    gradient: torch.Tensor | None
    annotated: torch.Tensor


def _probe_loss(answer: Callable[..., Any]) -> Callable[..., Any]:
    """Call an answer with logits that ask for a gradient, and fetch it."""
    if hasattr(answer, "__wrapped__"):
        return answer

    @functools.wraps(answer)
    def run(logits, target, annotated):
        with torch.enable_grad():
            leaf = logits.clone().requires_grad_()
            loss = answer(leaf * 1, target, annotated)  # may be changed in place
            if isinstance(loss, float | int):
                loss = torch.tensor(float(loss))
            if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
                return loss
            gradient = None
            if loss.requires_grad:
                (gradient,) = torch.autograd.grad(loss.sum(), leaf, allow_unused=True)
        return Taught(float(loss.detach()), gradient, annotated)

    return run


def _size(gradient: torch.Tensor, mask: torch.Tensor) -> float:
    """The largest gradient in the classes of a mask (B, C)."""
    found = gradient.abs().flatten(2).amax(2)[mask]
    return float(found.max()) if found.numel() else 0.0


def _taught_differ(got: Any, want: Taught) -> str | None:
    """Compare losses, then gradients, first where there must be none."""
    if not isinstance(got, Taught):
        return f"one number is asked for, got {describe(got)}"
    here, there = got.loss, want.loss
    if math.isfinite(here) and math.isfinite(there):
        if fault := numbers_differ(here, there, rtol=1e-4):
            return fault
    elif math.isnan(here) != math.isnan(there):
        return f"expected {there:.6g}, got {here:.6g}"
    if got.gradient is None or want.gradient is None:
        if got.gradient is want.gradient:
            return None
        return "the value is right, and no gradient reaches the logits"
    silent = ~want.annotated.bool()
    wrong, right = (_size(one.gradient, silent) for one in (got, want))
    if (wrong == 0) != (right == 0):
        return f"classes that nobody annotated get a gradient of up to {wrong:.3g}"
    top = float(want.gradient.nan_to_num().abs().max())
    if torch.allclose(
        got.gradient, want.gradient, rtol=1e-3, atol=1e-4 * top, equal_nan=True
    ):
        return None
    return "the value is right, and its gradient is not"


def _each(
    p: torch.Tensor, t: torch.Tensor, above: float = 1, below: float = 1
) -> torch.Tensor:
    """Soft Dice loss of probabilities (B, C, ...): (B, C)."""
    p, t = p.flatten(2), t.flatten(2)
    return 1 - (2 * (p * t).sum(2) + above) / (p.sum(2) + t.sum(2) + below)


def _per_volume(each: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    counts = mask.sum(1)
    mean = (each * mask).sum(1) / counts.clamp(min=1)
    return mean[counts > 0].mean()


def _made(
    call: Answer = lambda z, m: z.sigmoid(),
    each: Answer = _each,
    mask: Answer = lambda m, t: m,
    gather: Answer = _per_volume,
) -> Answer:
    """Make the solution from four steps, one of which may be another."""

    def answer(logits, target, annotated):
        wide = annotated[..., None, None, None]
        loss = each(call(logits, wide), target)
        return gather(loss, mask(annotated, target))

    return answer


def _pooled(each: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    return (each * m).sum() / m.sum()


def _by_class(each: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    counts = m.sum(0)
    mean = (each * m).sum(0) / counts.clamp(min=1)
    return mean[counts > 0].mean()


def _over_classes(each: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    """Mean over all classes, with or without the volumes that have no label."""
    return (each * m).mean()


def _over_classes_kept(each: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    return (each * m).mean(1)[m.any(1)].mean()


def _whole_batch(logits, target, annotated):
    """One sum for all voxels of all annotated classes."""
    wide = annotated[..., None, None, None]
    p = (logits.sigmoid() * wide).flatten()
    t = (target * wide).flatten()
    return 1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)


def _present(m: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return t.flatten(2).any(2)


def _all_of_them(m: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(m)


def _nan_volume(each: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    return ((each * m).sum(1) / m.sum(1)).mean()


def _nan_skipped(each: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    return ((each * m).sum(1) / m.sum(1)).nanmean()


def _zero_volume(each: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    return ((each * m).sum(1) / m.sum(1).clamp(min=1)).mean()


def _entropy(logits, target, annotated):
    from torch.nn import functional as F

    loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return _per_volume(loss.flatten(2).mean(2), annotated)


def _frozen(logits, target, annotated):
    return partial_loss(logits.detach(), target, annotated)


def _hospitals(said: str, masks: str, absent: tuple[int, int] | None = None) -> Case:
    """Volumes with the annotated classes of `masks`, as "1100 0111"."""
    rows = [[int(one) for one in row] for row in masks.split()]

    def draw() -> tuple[torch.Tensor, ...]:
        generator = torch.Generator().manual_seed(len(said))
        annotated = torch.tensor(rows, dtype=torch.bool)
        shape = (*annotated.shape, 3, 4, 2)
        logits = 1.5 * torch.randn(shape, generator=generator)
        target = (torch.rand(shape, generator=generator) > 0.6).float()
        target[~annotated] = 0  # what the files hold where nobody drew anything
        if absent is not None:
            target[absent] = 0  # looked for, and not there
        return logits, target, annotated

    return Case(said, draw)


class _Partial(Probed):
    probe = staticmethod(_probe_loss)


def _idea(name: str, message: str, *wrong: Answer) -> Misconception:
    return idea(name, message, *map(_probe_loss, wrong))


def partial() -> Exercise:
    return _Partial(
        id="06.2",
        title="what nobody outlined teaches nothing",
        ask="Write partial_loss(logits, target, annotated): logits and target are "
        "(B, C, X, Y, Z), annotated (B, C) says by True which organs a volume's "
        "labels speak about; elsewhere the target is 0, which means nothing. The loss "
        "of an organ is its soft Dice loss, 1 - (2·Σpt + 1) / (Σp + Σt + 1) with p the "
        "sigmoid of the logits, the sums over its voxels. Average it over the "
        "annotated organs of a volume, then over the volumes that have any. Organs "
        "without annotation get a gradient of exactly 0.",
        difficulty=2,
        minutes=9,
        hints=(
            "Work out a loss for every volume and organ first, a matrix (B, C). Which "
            "of its entries may you use, and by how many do you divide?",
            "The mask multiplies losses, neither logits nor probabilities: a logit of "
            "0 is a probability of one half, in every voxel. Divide by the number of "
            "annotated organs of the volume; a volume with none is left out.",
            "p, t = logits.sigmoid().flatten(2), target.flatten(2); loss = 1 - (2 * (p "
            "* t).sum(2) + 1) / (p.sum(2) + t.sum(2) + 1); counts = annotated.sum(1); "
            "each = (loss * annotated).sum(1) / counts.clamp(min=1); return "
            "each[counts > 0].mean().",
        ),
        solution_function=_probe_loss(partial_loss),
        explanation="One set outlines livers, another kidneys: in each most organs are "
        "there and not drawn. Taken for background, most volumes teach that an organ "
        "does not exist, which is what the network then says. The published loss "
        "masks as here (upstream utils/losses.py:17-18), but for a volume without any "
        "annotated organ, where it is 0 / 0. An organ that was looked for and is "
        "absent stays in: its loss punishes false alarms. The package's PartialDice "
        "sets unannotated logits to 0 before the sigmoid besides, since 0 times NaN "
        "is NaN.",
        cases=(
            _hospitals("two hospitals", "1000 0111"),
            _hospitals("everything annotated", "111 111"),
            _hospitals(
                "an organ that was looked for and is absent", "1101 0110", (0, 1)
            ),
            _hospitals("one volume", "01100"),
            _hospitals("a volume without labels", "1101 0000 0010"),
        ),
        misconceptions=(
            _idea(
                "unlabelled is background",
                "You took every organ as annotated. Where nobody drew, the target is 0 "
                "because there is no label, and your loss teaches that there is no "
                "organ. Use the mask.",
                _made(mask=_all_of_them),
            ),
            _idea(
                "mean over all classes",
                "You divided by C, or masked probabilities, whose loss is then 0 and "
                "still counted. A volume with one outlined organ of 29 weighs 29 times "
                "less. Divide by the number of annotated organs.",
                _made(gather=_over_classes),
                _made(gather=_over_classes_kept),
                _made(lambda z, m: z.sigmoid() * m, mask=_all_of_them),
            ),
            _idea(
                "mask on the logits",
                "You multiplied the logits by the mask. sigmoid(0) is one half, so an "
                "unannotated organ is predicted at one half everywhere and its loss "
                "is counted, although its gradient is 0. The mask belongs on the "
                "losses.",
                _made(lambda z, m: (z * m).sigmoid(), mask=_all_of_them),
            ),
            _idea(
                "present, not annotated",
                "You took the organs that have voxels in the target. One that was "
                "looked for and is absent is annotated too, and its false alarms have "
                "to cost something.",
                _made(mask=_present),
            ),
            _idea(
                "all annotated organs alike",
                "You averaged over all annotated organs of the batch together, so a "
                "volume with three counts three times as much as one with one. First "
                "over the organs of a volume, then over volumes.",
                _made(gather=_pooled),
            ),
            _idea(
                "first over volumes",
                "You averaged each organ over the volumes, then over organs. The other "
                "way round is asked for: a volume is what was drawn.",
                _made(gather=_by_class),
            ),
            _idea(
                "0 / 0 for a volume without labels",
                "A volume in which nothing is annotated divides 0 by 0, and one NaN "
                "spoils the batch. The published loss does so too. Leave it out of "
                "the mean.",
                _made(gather=_nan_volume),
            ),
            _idea(
                "NaN left out of the mean",
                "nanmean leaves the 0 / 0 out of the value, and not out of the "
                "gradient: behind it stands 0 / 0 again, and the logits of that volume "
                "get NaN. Leave the volume out before you divide.",
                _made(gather=_nan_skipped),
            ),
            _idea(
                "a volume without labels counted",
                "It counts as a loss of 0 in your mean, and makes the others smaller. "
                "Divide by the number of volumes that have an annotated organ.",
                _made(gather=_zero_volume),
            ),
            _idea(
                "softmax",
                "A softmax over organs ties them together: raising one lowers the "
                "rest, so a gradient reaches organs that nobody annotated. Each organ "
                "is a question by itself: sigmoid.",
                _made(lambda z, m: z.softmax(1)),
            ),
            _idea(
                "mask upside down",
                "You kept what was not annotated.",
                _made(mask=lambda m, t: ~m),
            ),
            _idea(
                "no gradient",
                "The value is right, but it was cut off from the logits (detach, "
                ".item(), .data or a new tensor), so nothing is learned.",
                _frozen,
            ),
            _idea(
                "one Dice for all",
                "You summed over organs, or volumes, before you divided: the largest "
                "organ then decides. Each organ of each volume has its own ratio.",
                _whole_batch,
            ),
            _idea(
                "Dice, not its loss",
                "You returned the Dice. Made small, it teaches to miss: 1 - Dice.",
                _made(each=lambda p, t: 1 - _each(p, t)),
            ),
            _idea(
                "smoothed below only",
                "You added 1 below the bar and not above: even an organ that is absent "
                "and not predicted then costs 1, and a gradient.",
                _made(each=lambda p, t: _each(p, t, 0, 1)),
            ),
            _idea(
                "not smoothed",
                "Without the 1 on both sides an absent organ costs 1 whatever is "
                "predicted, with no gradient at all.",
                _made(each=lambda p, t: _each(p, t, 0, 0)),
                _made(each=lambda p, t: _each(p, t, 1e-6, 1e-6)),
                _made(each=lambda p, t: _each(p, t, 0, 1e-6)),
            ),
            _idea(
                "no sigmoid",
                "You put logits where probabilities belong.",
                _made(lambda z, m: z),
            ),
            _idea(
                "cross entropy",
                "That is a cross entropy, and well masked. The soft Dice loss is asked "
                "for.",
                _entropy,
            ),
            _idea(
                "summed",
                "You summed over the organs or the volumes. Means are asked for, or "
                "the learning rate has to change with what was outlined.",
                _made(gather=lambda each, m: (each * m).sum()),
                _made(gather=lambda each, m: (each * m).sum(1).mean()),
                _made(gather=lambda each, m: (each * m).sum(1)[m.any(1)].mean()),
            ),
        ),
        differ=_taught_differ,
    )
