"""Exercise 03.2: a soft Dice loss, judged by its value and by what flows back."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from medtut.course.exercises.engine import Case, Exercise, Misconception, describe
from medtut.course.exercises.ex02_split import Probed


# ------------------------------------------------------------------------------ 03.2
def soft_dice_loss(logits, target):
    p, t = logits.sigmoid().flatten(1), target.flatten(1)  # one row for each image
    both, size = (p * t).sum(1), p.sum(1) + t.sum(1)
    dice = (2 * both + 1e-5) / (size + 1e-5)
    return (1 - dice).mean()


@dataclass(frozen=True)
class Loss:
    """A loss and its gradient by the logits; None when nothing flows back."""

    value: torch.Tensor
    grad: torch.Tensor | None


def _probe_loss(answer: Callable[..., Any]) -> Callable[..., Any]:
    """Call an answer with logits that ask for a gradient, and take it."""
    if hasattr(answer, "__wrapped__"):
        return answer

    @functools.wraps(answer)
    def run(logits, target):
        with torch.enable_grad():
            leaf = logits.clone().requires_grad_()
            value = answer(leaf, target)
            if not isinstance(value, torch.Tensor | float | int):
                return value
            value = torch.as_tensor(value)
            grad = None
            if value.requires_grad and value.numel() == 1:
                (grad,) = torch.autograd.grad(value.sum(), leaf, allow_unused=True)
        return Loss(value.detach(), grad)

    return run


def _close(got: torch.Tensor, want: torch.Tensor, rtol: float) -> bool:
    """Whether two tensors agree within rtol of the largest wanted entry."""
    size = float(want.nan_to_num().abs().max())
    got, want = got.double(), want.double()
    return torch.allclose(got, want, rtol=0, atol=rtol * size + 1e-6, equal_nan=True)


def _loss_differs(got: Any, want: Any) -> str | None:
    """Compare value, then gradient."""
    if not (isinstance(got, Loss) and isinstance(want, Loss)):
        return f"expected a scalar tensor, got {describe(got)}"
    if got.value.shape != want.value.shape:
        said = "one loss for the whole batch is asked for"
        return f"{said}, got {describe(got.value)}"
    if not _close(got.value, want.value, 1e-4):
        return f"expected {float(want.value):.6g}, got {float(got.value):.6g}"
    if want.grad is None or got.grad is None:
        if want.grad is got.grad:
            return None
        return "the value is right, but no gradient reaches the logits"
    if got.grad.isnan().any() and not want.grad.isnan().any():
        said = "does exp overflow? torch.sigmoid is safe for any logit"
        return f"the value is right, but its gradient holds NaN: {said}"
    if not _close(got.grad, want.grad, 1e-3):
        return "the value is right, its gradient is not: is something detached?"
    return None


def _rows(logits: Any, target: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return logits.sigmoid().flatten(1), target.flatten(1)


def _like(
    rows: Callable[..., tuple] = _rows,
    above: float = 1e-5,
    below: float = 1e-5,
    factor: float = 2.0,
    power: int = 1,
    union: bool = False,
    finish: Callable[[Any], Any] = lambda dice: (1 - dice).mean(),
) -> Callable[..., Any]:
    """A soft Dice with one thing changed: the wrong ideas differ in one each."""

    def wrong(logits, target):
        p, t = rows(logits, target)
        both, size = (p * t).sum(-1), (p**power).sum(-1) + (t**power).sum(-1)
        return finish((factor * both + above) / (size - union * both + below))

    return wrong


def _itself(logits, target):
    p = logits.sigmoid().flatten(1)
    return p, p


def _itself_detached(logits, target):
    p = logits.sigmoid().flatten(1)
    return p, p.detach()


def _itself_hard(logits, target):
    p = logits.sigmoid().flatten(1)
    return p, (p > 0.5).float()


def _no_sigmoid(logits, target):
    return logits.flatten(1), target.flatten(1)


def _sigmoid_twice(logits, target):
    return logits.sigmoid().sigmoid().flatten(1), target.flatten(1)


def _sigmoid_of_target(logits, target):
    return logits.sigmoid().flatten(1), target.sigmoid().flatten(1)


def _hard(logits, target):
    return (logits > 0).float().flatten(1), target.flatten(1)


def _whole_batch(logits, target):
    return logits.sigmoid().flatten(), target.flatten()


def _lines(logits, target):
    return logits.sigmoid(), target  # the sum over the last axis is over one row


def _entropy(logits, target):
    return torch.nn.functional.binary_cross_entropy_with_logits(logits, target)


def _doubled(logits, target):
    return _like(above=2e-5)(logits, target)


def _batch(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and masks (N, 1, 24, 32) with a lesion of 140 and one of 4 pixels."""
    generator = torch.Generator().manual_seed(3)
    target = torch.zeros(2, 1, 24, 32)
    target[0, 0, 6:16, 8:22] = 1
    target[1, 0, 3:5, 27:29] = 1
    noise = torch.randn(target.shape, generator=generator)
    logits = 3 * (2 * target - 1) + 1.5 * noise
    logits[1] = noise[1] - 3  # the small lesion is missed
    if kind == "empty":
        target[1], logits[1] = 0, -200  # so sure that the sigmoid is exactly 0
    if kind == "alarm":
        target[1] = 0
    if kind == "sure":
        logits = 12 * (2 * target - 1)
    keep = slice(1, 2) if kind == "alarm" else slice(0, 1 if kind == "one" else 2)
    return logits[keep].clone(), target[keep].clone()


class _SoftDice(Probed):
    probe = staticmethod(_probe_loss)


def loss() -> Exercise:
    def idea(name: str, message: str, *wrong: Callable[..., Any]) -> Misconception:
        return Misconception(name, message, tuple(_probe_loss(one) for one in wrong))

    def case(said: str, kind: str) -> Case:
        return Case(said, lambda: _batch(kind))

    return _SoftDice(
        id="03.2",
        title="a Dice loss that looks at the target",
        ask="Write soft_dice_loss(logits, target) for two float tensors (N, 1, height, "
        "width), target 0 or 1. The Dice of an image is (2·Σpt + 1e-5) / (Σp + Σt + "
        "1e-5) with p the sigmoid of its logits. Return 1 minus it, averaged over the "
        "N images, as a scalar tensor that can be differentiated.",
        difficulty=2,
        minutes=8,
        hints=(
            "What has to be added up within an image, and what is averaged between "
            "images?",
            "Sigmoid first. flatten(1) keeps the batch axis and makes one row of each "
            "image; sums over dim 1 are then sums within an image.",
            "p, t = logits.sigmoid().flatten(1), target.flatten(1); both = (p * "
            "t).sum(1); dice = (2 * both + 1e-5) / (p.sum(1) + t.sum(1) + 1e-5); "
            "(1 - dice).mean().",
        ),
        solution_function=_probe_loss(soft_dice_loss),
        explanation="The batch axis stays apart, so a lesion of 4 pixels pulls as hard "
        "as one of 140. The constant stands above and below the bar: an empty image in "
        "which nothing is found is right, and costs 0. And the target is the mask. In "
        "the public code it was the prediction's own sigmoid; such a loss falls as the "
        "model becomes surer of whatever it says.",
        cases=(
            case("a large lesion and a small one", "two"),
            case("one image", "one"),
            case("an empty image in which nothing is found", "empty"),
            case("a false alarm in an empty image", "alarm"),
            case("a confident and perfect answer", "sure"),
        ),
        misconceptions=(
            idea(
                "the target is never used",
                "Your loss compares the prediction with itself. It falls when the "
                "model becomes surer of what it already says, right or wrong: the "
                "defect of the public code.",
                _like(_itself),
                _like(_itself_detached),
                _like(_itself_hard),
            ),
            idea(
                "no sigmoid",
                "Logits run from minus to plus infinity. Sums of them can be negative, "
                "and the quotient anything. Take the sigmoid first.",
                _like(_no_sigmoid),
            ),
            idea(
                "sigmoid twice",
                "You took the sigmoid twice. A probability between 0 and 1 becomes one "
                "between 0.5 and 0.73, so background can never vanish.",
                _like(_sigmoid_twice),
            ),
            idea(
                "sigmoid of the target",
                "The target is a mask already. Its sigmoid turns 0 into 0.5 and 1 into "
                "0.73, so not even a perfect answer is right.",
                _like(_sigmoid_of_target),
            ),
            idea(
                "thresholded",
                "Pixels that are cut to 0 or 1 have no gradient, so nothing is "
                "learned. A loss needs the soft probabilities.",
                _like(_hard),
            ),
            idea(
                "no gradient",
                "The value is right, but it was cut off from the logits (.item(), "
                "float(), detach() or no_grad), so nothing is learned. Return the "
                "tensor.",
                lambda logits, target: _like()(logits, target).detach(),
            ),
            idea(
                "batch flattened",
                "You summed over the whole batch, images and all. A large lesion then "
                "hides a small one: the four pixels of the second image hardly count. "
                "Sum within an image, average between images.",
                _like(_whole_batch),
            ),
            idea(
                "rows as images",
                "You summed along one axis only, so that every row of pixels is an "
                "image of its own, and rows without lesion count fully. That happens "
                "too when an axis is lost on the way and the rest move up.",
                _like(_lines),
            ),
            idea(
                "Dice returned",
                "That is the Dice, which is largest when all is right. An optimizer "
                "that makes it small would unlearn; return 1 minus it.",
                _like(finish=lambda dice: dice.mean()),
            ),
            idea(
                "minus Dice",
                "The gradient is right. But a loss of 0 should mean perfect, so that "
                "it can be read and added to another: return 1 minus Dice.",
                _like(finish=lambda dice: -dice.mean()),
            ),
            idea(
                "summed over the batch",
                "You added up the images. A larger batch then has a larger loss, and "
                "the learning rate means something else. Average.",
                _like(finish=lambda dice: (1 - dice).sum()),
            ),
            idea(
                "one loss for each image",
                "You return N numbers. backward() needs one: their mean.",
                _like(finish=lambda dice: 1 - dice),
            ),
            idea(
                "no smoothing",
                "In an empty image where nothing is found your Dice is 0/0, and the "
                "NaN spreads to every weight in one step. Add 1e-5 above and below.",
                _like(above=0, below=0),
            ),
            idea(
                "smoothing below the bar only",
                "In an empty image where nothing is found your Dice is 0 and the loss "
                "1, though the answer is right. The constant belongs above the bar "
                "too.",
                _like(above=0),
            ),
            idea(
                "smoothing doubled",
                "You multiply the constant by 2 with the overlap, so an empty image "
                "scores a Dice of 2. It stands outside: 2·Σpt + 1e-5.",
                _doubled,
            ),
            idea(
                "a large constant",
                "A constant of 1 counts like a pixel that is right, which small "
                "lesions feel: use 1e-5.",
                _like(above=1, below=1),
            ),
            idea(
                "factor 2 forgotten",
                "Without the 2 the best Dice is one half, and the loss never falls "
                "below 0.5.",
                _like(factor=1),
            ),
            idea(
                "intersection over union",
                "That is the soft IoU (Jaccard) loss, which divides by the union. Here "
                "the sum of both sizes is below the bar.",
                _like(factor=1, union=True),
            ),
            idea(
                "squares below the bar",
                "Σp² + Σt² is the form of V-Net (squared_pred in MONAI), a fair "
                "choice, and another number. Here the sums are plain.",
                _like(power=2),
            ),
            idea(
                "cross-entropy",
                "That is the cross-entropy, the other half of Dice-CE. It counts "
                "pixels one by one, and most of them are background.",
                _entropy,
            ),
        ),
        differ=_loss_differs,
    )
