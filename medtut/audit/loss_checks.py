"""Detectors that ask a loss, and an evaluation, about cases of known answer."""

from __future__ import annotations

import warnings
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from medtut.audit.report import Finding
from medtut.audit.subject import Subject, SubjectError

LEARNED, HALF, TOP = 0.95, 0.5, 0.05  # Dice to reach; part of a miss; off the top
SLACK = 1e-3  # relative, for rounding

_SAID = {
    "target": "Two different targets give the same gradient, or none: the loss does "
    "not look at them. Set against its own output, it falls while Dice stands still.",
    "order": "A perfect output must cost less than half found, this less than nothing "
    "found or the inverse. Does the loss take logits? Is it finite on sure ones, and "
    "where a target is empty?",
    "axes": "Height and width exchanged in output and target change the value: rows "
    "are read as channels. Is the batch or channel axis lost? MONAI takes BCHW.",
    "floor": "Perfect costs more than half of nothing found. A sigmoid applied twice?",
    "overfit": "Free logits trained with this loss do not reach the target of one "
    "batch. Are output and target broadcast, or images left out?",
    "top": "A perfect model does not reach the top (1 for a score, 0 for a loss), or "
    "one that finds nothing comes close. Is the whole volume predicted, put back in "
    "its place and compared in one coding?",
}


def loss_misbehaves(subject: Subject) -> tuple[list[Finding], list[str]]:
    """Find a segmentation loss that does not teach the target.

    `subject.segmentation_loss` is called as ``segmentation_loss(logits, target) ->
    scalar tensor`` with float tensors (B, 1, 24, 32), B 1 to 3, target 0 or 1, one of
    three images without lesion. The gradient must depend on the target; a perfect
    output must cost least, and little; height and width must be alike; one batch must
    overfit. (Distance losses that are no loss by themselves may fail by themselves.)

    Raises
    ------
    SubjectError
        If the loss fails on such tensors or returns no single number.
    """
    if subject.segmentation_loss is None:
        return [], []
    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")
        found, notes = _ask(subject.segmentation_loss)
    kind = {"floor": "warning"}
    return [
        Finding("loss_misbehaves", kind.get(key, "error"), key, _SAID[key], numbers)
        for key, numbers in found.items()
    ], notes


def _called(name: str, function: Any, *args: Any) -> Tensor:
    try:
        return torch.as_tensor(function(*args)).reshape(())
    except Exception as error:
        what = f"{name} failed on input of shape {tuple(args[-1].shape)}, or gave no "
        raise SubjectError(f"{what}number: {type(error).__name__}: {error}") from error


def _ask(function: Any) -> tuple[dict[str, dict[str, Any]], list[str]]:
    def loss(logits: Tensor, target: Tensor) -> Tensor:
        value = _called("segmentation_loss", function, logits.clone(), target.clone())
        return value + 0 * logits.sum()  # a constant has gradient 0

    def slope(target: Tensor) -> Tensor:
        free = noise.clone().requires_grad_()
        return torch.autograd.grad(loss(free, target), free)[0]

    target = torch.zeros(3, 1, 24, 32)  # a fifth is lesion; the last stays empty
    target[0, 0, 4:16, 6:18] = target[1, 0, 10:20, 12:30] = 1
    half, nothing = target * (torch.arange(24)[:, None] < 14), 0 * target
    noise = torch.randn(target.shape, generator=torch.Generator().manual_seed(0))
    pull, other = slope(target), slope(target.flip(-1))
    (_, *first), *_, (_, *last) = free_course(loss, noise[:2], target[:2])
    names = "loss_before", "dice_before", "loss_after", "dice_after"
    learned = dict(zip(names, first + last, strict=True))
    if torch.allclose(pull, other, rtol=SLACK, atol=0):
        apart = {"gradient_difference": float((pull - other).abs().max())}
        return {"target": apart | learned}, []

    found, notes = {}, []
    for size in (1, 20):  # unsure logits, then sure ones, which the rest reads
        masks = target, half, nothing, 1 - target
        cost = [loss(size * (2 * one - 1), target).item() for one in masks]
        names = "perfect", "half_found", "nothing_found", "inverted"
        numbers = {"logits": size} | dict(zip(names, cost, strict=True))
        if not cost[0] < cost[1] < min(cost[2:]):
            found["order"] = numbers
    one, wanted = noise[:1], target[:1]  # alone: squeeze(0) harms no larger batch
    value, turned = loss(one, wanted).item(), loss(one.mT, wanted.mT).item()
    if abs(turned - value) > SLACK * abs(value):
        found["axes"] = {"value": value, "axes_exchanged": turned} | numbers
    elif not found and cost[0] > HALF * cost[2]:
        found["floor"] = numbers
    if not found and not learned["dice_after"] > LEARNED:
        found["overfit"] = learned
    with suppress(Exception):  # to raise is the best answer to a missing axis
        flat = float(function(one[0].clone(), wanted[0].clone()))
        if abs(flat - value) > SLACK * abs(value):
            said = f"{flat:.4g}, with the channel axis {value:.4g}: keep it"
            notes = [f"the loss takes (B, H, W) without complaint and gives {said}"]
    return found, notes


def free_course(
    loss: Any, logits: Tensor, target: Tensor, steps: int = 200
) -> list[tuple[int, float, float]]:
    """Train free logits, no network, with a loss (Adam, learning rate 0.1).

    Parameters
    ----------
    loss : ``loss(logits, target) -> scalar tensor``.
    logits : tensor (B, 1, H, W) to start from; not changed.
    target : tensor (B, 1, H, W) of 0 and 1, lesion in every image.

    Returns
    -------
    list of (step, loss, lowest Dice of an image, cut at 0), steps 0 to `steps`.
    """
    free, course = logits.detach().clone().requires_grad_(), []
    optimizer = torch.optim.Adam([free], lr=0.1)
    for step in range(steps + 1):
        value, hit = loss(free, target), (free > 0).float()
        both, sizes = (one.sum((1, 2, 3)) for one in (hit * target, hit + target))
        course.append((step, value.item(), float((2 * both / sizes).min())))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    return course


class _Knowing(nn.Module):
    """Knows the answer: the bright is lesion, on whatever scale. Or finds nothing."""

    def __init__(self, level: float):
        super().__init__()
        self.level, self.seen = level, 0
        self.scale = nn.Parameter(torch.ones(()))  # for callers who ask for a device

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        if x.shape[1] <= 4:  # grey as RGB, or modalities
            x = x.float().mean(1, keepdim=True)
        share = (x - x.min()) / (x.max() - x.min()).clamp(min=1e-6)
        self.seen += int((share > 0.5).flatten(2).any(2).sum())
        return 20 * (share > self.level).float() - 10 * self.scale


def evaluation_misbehaves(subject: Subject) -> tuple[list[Finding], list[str]]:
    """Find an evaluation that a perfect model cannot pass.

    `subject.evaluation` is called as ``evaluation(model, image, label) -> number``
    with arrays (48, 40, 44), axes (X, Y, Z), a float image and a label of 0 and 1, and
    does what your validation does: slice, prepare, ``model(x)`` with tensors
    (B, C, H, W) or (B, C, X, Y, Z), C at most 4, put together, score. Two models answer
    with logits of -10 and 10 in one channel. The one that knows the lesion must reach
    1 (a score) or 0 (a loss), the one that finds nothing must not.

    Raises
    ------
    SubjectError
        If the evaluation fails or returns no number.
    """
    if subject.evaluation is None:
        return [], []
    x, y, z = np.ogrid[:48, :40, :44]
    label = (x - 22) ** 2 + (y - 19) ** 2 + (z - 20.2) ** 2 < 15.2**2
    image, numbers = (0.2 + 0.6 * label).astype(np.float32), {}
    for name, level in (("nothing_found", 2.0), ("perfect", HALF)):
        inputs = model, *_ = _Knowing(level), image.copy(), label.astype(np.int64)
        numbers[name] = _called("evaluation", subject.evaluation, *inputs).item()
    nothing, perfect = numbers.values()
    if min(abs(perfect - 1), abs(perfect)) < TOP and abs(perfect - nothing) > HALF:
        return [], []
    numbers |= {"lesion_slices_seen": model.seen, "of": int(label.any((0, 1)).sum())}
    name = "evaluation_misbehaves"
    return [Finding(name, "error", "top", _SAID["top"], numbers)], []
