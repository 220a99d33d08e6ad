"""What an adapter of exercise 06.3 does, as a record of its faults.

It is built, run, given known weights and trained a little.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from medtut.course.exercises.engine import describe


class Record(dict):
    """Faults of an adapter by name, each with a sentence."""


def _count(width: int, kernel: int) -> int:
    return 2 * kernel**3 * width**2


def _formula(x: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> Any:
    """The adapter asked for, with given kernels."""
    hidden = F.conv3d(x, first, padding="same").relu()
    return x + F.conv3d(hidden, second, padding="same")


def _weights(built: nn.Module) -> list[nn.Parameter]:
    return [p for p in built.parameters() if p.dim() == 5]


def _moves(built: nn.Module, x: torch.Tensor) -> list[bool]:
    """Whether each parameter has moved after a few steps toward another map."""
    target = x.flip(2).roll(1, 1)
    before = [p.detach().clone() for p in built.parameters()]
    for _ in range(3):
        loss = (built(x) - target).square().mean()
        found = [p for p in built.parameters() if p.requires_grad]
        if not found or not loss.requires_grad:
            break
        gradients = torch.autograd.grad(loss, found, allow_unused=True)
        with torch.no_grad():
            for p, gradient in zip(found, gradients, strict=True):
                if gradient is not None:
                    p -= 0.1 * gradient
    pairs = zip(built.parameters(), before, strict=True)
    return [not torch.equal(p.detach(), old) for p, old in pairs]


def examine(built: nn.Module, width: int, kernel: int) -> Record:
    """Say what is wrong with one adapter, from what it does."""
    found = Record()
    generator = torch.Generator().manual_seed(width + kernel)
    x = torch.randn((2, width, 5, 6, 4), generator=generator)
    with torch.no_grad():
        y = built(x)
    if not isinstance(y, torch.Tensor) or y.shape != x.shape:
        said = f"a map {tuple(x.shape)} goes in, and out comes {describe(y)}"
        return Record(shape=said)
    change = float((y - x).norm() / x.norm())
    if not change <= 1e-6:
        found[_kind(x, y)] = (
            f"as made, it changes features by {change:.3g} of their size"
        )
    if (count := sum(p.numel() for p in built.parameters())) != _count(width, kernel):
        said = (
            f"{count:,} parameters, and 2·kernel³·width² is {_count(width, kernel):,}"
        )
        found[f"{count - _count(width, kernel):+d} parameters"] = said
    kernels = _weights(built)
    start = [bool(p.any()) for p in kernels]
    moved = _moves(built, x)
    if not built(x).requires_grad:
        found["frozen"] = "no gradient reaches its parameters"
    elif not all(moved):
        which = "both" if not any(start) else "one" if not all(start) else "none"
        said = f"{moved.count(False)} of {len(moved)} tensors do not learn"
        found[f"dead, {which} at zero"] = said
    if len(kernels) != 2 or any(p.shape != kernels[0].shape for p in kernels):
        said = f"two kernels of {kernel}³ are asked for, and there are {len(kernels)}"
        found["kernels"] = said
    elif fault := _another_map(built, x, kernels):
        found["map"] = fault
    return found


def _kind(x: torch.Tensor, y: torch.Tensor) -> str:
    """Name the change at the start: each wrong idea leaves another trace."""
    change = y - x
    if not y.any():
        return "silent"
    if torch.equal(y, x.relu()):
        return "cut"
    if (change - change[:, :, :1, :1, :1]).abs().max() < 1e-5:
        return "shifted"  # by one number for each channel, as a bias does
    return "raised" if (change > -1e-6).all() else "start"


def _another_map(
    built: nn.Module, x: torch.Tensor, kernels: list[nn.Parameter]
) -> str | None:
    """Give both kernels known numbers, and compare with the formula."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in built.parameters():
            p.zero_()  # a bias has been reported already
        for p in kernels:
            p.copy_(torch.randn(p.shape, generator=generator) / p[0].numel() ** 0.5)
        y = built(x)
        try:
            wants = [_formula(x, *pair) for pair in (kernels, kernels[::-1])]
        except RuntimeError:
            return "its kernels do not map `width` channels to `width` channels"
    if any(torch.allclose(y, want, rtol=1e-3, atol=1e-4) for want in wants):
        return None
    gap = min(float((y - want).norm() / want.norm()) for want in wants)
    said = "with other weights it is not x + second(relu(first(x)))"
    return f"{said}: off by {gap:.2g} of its size"


def probe_adapter(answer: Callable[..., Any]) -> Callable[..., Any]:
    """Build an adapter, and record what it does wrong."""
    if hasattr(answer, "__wrapped__"):
        return answer

    @functools.wraps(answer)
    def run(width, kernel):
        torch.manual_seed(3)
        built = answer(width, kernel)
        if not isinstance(built, nn.Module):
            return built
        with torch.enable_grad():
            return examine(built, width, kernel)

    return run


def records_differ(got: Any, want: Any) -> str | None:
    """Compare the names of the faults."""
    if not isinstance(got, Record):
        return f"a torch.nn.Module is asked for, got {describe(got)}"
    if got.keys() == want.keys():
        return None
    return next((said for key, said in got.items() if key not in want), "it is right")
