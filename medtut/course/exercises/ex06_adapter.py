"""Exercise 06.3: an adapter that changes nothing until it has learned something.

Many modules are right, so one is judged by what it does: see `ex06_examine`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from medtut.course.exercises.engine import Case, Exercise, Misconception
from medtut.course.exercises.ex02_split import Probed
from medtut.course.exercises.ex05_attention import Answer, idea
from medtut.course.exercises.ex06_examine import probe_adapter, records_differ


# ------------------------------------------------------------------------------ 06.3
def spatial_adapter(width, kernel):
    class Adapter(torch.nn.Module):
        def __init__(self):
            super().__init__()
            how = {"padding": kernel // 2, "bias": False}
            self.first = torch.nn.Conv3d(width, width, kernel, **how)
            self.second = torch.nn.Conv3d(width, width, kernel, **how)
            torch.nn.init.zeros_(self.second.weight)  # this one alone

        def forward(self, x):
            return x + self.second(self.first(x).relu())

    return Adapter()


class _Wrong(nn.Module):
    """The adapter with one thing changed."""

    def __init__(
        self,
        width: int,
        kernel: int,
        zero: str = "second",
        bias: str = "",
        skip: bool = True,
        act: str = "between",
        pad: str | int = "same",
        groups: int = 1,
        small: float = 0.0,
    ) -> None:
        super().__init__()
        for name in ("first", "second"):
            here = name if bias == "both" else bias
            conv = nn.Conv3d(
                width, width, kernel, padding=pad, bias=name == here, groups=groups
            )
            if zero in (name, "both"):
                nn.init.normal_(conv.weight, std=small)
            setattr(self, name, conv)
        self.skip, self.act = skip, act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        h = self.second(h.relu() if self.act == "between" else h)
        h = h.relu() if self.act == "after" else h
        h = x + h if self.skip else h
        return h.relu() if self.act == "sum" else h


def _as(**changes: Any) -> Answer:
    return lambda width, kernel: _Wrong(width, kernel, **changes)


class _Gated(_Wrong):
    """Random kernels behind a number that starts at zero."""

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__(width, kernel, zero="none")
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.gate * (super().forward(x) - x)


class _Twice(_Wrong):
    """A way around each convolution."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x + self.first(x).relu()
        return h + self.second(h)


def _zero_bias(which: str) -> Answer:
    def answer(width, kernel):
        built = _Wrong(width, kernel, bias=which)
        for conv in (built.first, built.second):
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)
        return built

    return answer


def _frozen(width, kernel):
    return _Wrong(width, kernel).requires_grad_(False)


def _cut_off(width, kernel):
    built = _Wrong(width, kernel)
    built.forward = torch.no_grad()(built.forward)
    return built


def _one_convolution(width, kernel):
    built = _Wrong(width, kernel, zero="both")
    del built.first
    built.forward = lambda x: x + built.second(x)
    return built


class _Adapter(Probed):
    probe = staticmethod(probe_adapter)


def _idea(name: str, message: str, *wrong: Answer) -> Misconception:
    return idea(name, message, *map(probe_adapter, wrong))


def adapter() -> Exercise:
    return _Adapter(
        id="06.3",
        title="an adapter that begins by doing nothing",
        ask="Write spatial_adapter(width, kernel): return a torch.nn.Module that maps "
        "features x (B, width, X, Y, Z) to x + second(relu(first(x))), with two 3-D "
        "convolutions of width to width channels, an odd window of kernel³, no bias, "
        "and zeros around the volume so that the shape stays. As made, it returns x "
        "itself, and both convolutions learn when it is trained. For 48 channels and "
        "3³ it has 124,416 parameters.",
        difficulty=2,
        minutes=8,
        hints=(
            "x + 0 is x. Which of the two convolutions can be zero and still let a "
            "gradient through: to itself at once, and to the other a step later?",
            "The gradient of a convolution is made of its input and of what comes back "
            "through the next one. With first at zero the input of second is "
            "relu(0) = 0, and where relu is given 0 it hands nothing back. So first "
            "stays random.",
            "In __init__: two torch.nn.Conv3d(width, width, kernel, padding=kernel // "
            "2, bias=False), then torch.nn.init.zeros_(self.second.weight). In "
            "forward: return x + self.second(self.first(x).relu()).",
        ),
        solution_function=probe_adapter(spatial_adapter),
        explanation="An adapter that begins at the identity begins at the pretrained "
        "network: whatever it does later, it has learned. LoRA does the same with B at "
        "zero and A random, AdaptFormer with its second linear. The published "
        "Compacter does not: its map is almost zero and there is no way around it, so "
        "what attention and MLP had learned is gone before the first step. Here the "
        "second convolution learns in step 1, from relu(first(x)), and the first in "
        "step 2. With 1³ in place of 3³ it sees single voxels: 4,608 parameters.",
        cases=(
            Case("4 channels, 3³", lambda: (4, 3)),
            Case("6 channels, 1³", lambda: (6, 1)),
            Case("3 channels, 5³", lambda: (3, 5)),
        ),
        misconceptions=(
            _idea(
                "second convolution random",
                "The second convolution starts as PyTorch makes it, so the features "
                "change before anything was learned, and the head reads noise. Set "
                "its weight to zero. (Small numbers are not zero.)",
                _as(zero="none"),
                _as(small=1e-3),
            ),
            _idea(
                "no way around",
                "You return the branch without x. With its second convolution at zero "
                "every feature is gone, and so is the pretrained network. Add x.",
                _as(skip=False),
                _as(skip=False, zero="none"),
                _as(skip=False, bias="both"),
            ),
            _idea(
                "a bias that shifts",
                "Conv3d has a bias unless you say bias=False, and it starts random: "
                "with the weights at zero it still shifts every channel.",
                _as(bias="both"),
                _as(bias="second"),
            ),
            _idea(
                "a bias too many",
                "It starts as the identity and has a bias, which is not asked for: a "
                "shift of a channel is what the head's own bias can do.",
                _as(bias="first"),
                _zero_bias("both"),
                _zero_bias("second"),
            ),
            _idea(
                "both at zero",
                "It starts as the identity and stays there: second gets relu(0) = 0 as "
                "its input, first gets nothing back through second, and no gradient "
                "ever reaches either. One of the two has to be random.",
                _as(zero="both"),
            ),
            _idea(
                "first at zero",
                "You set the first convolution to zero. relu hands nothing back where "
                "it is given 0, and second gets zeros as its input: neither learns. "
                "Zero belongs into the second.",
                _as(zero="first"),
            ),
            _idea(
                "frozen",
                "The adapter is what trains, and no gradient reaches yours: "
                "requires_grad is False, or it runs under torch.no_grad().",
                _frozen,
                _cut_off,
            ),
            _idea(
                "relu at the end",
                "A relu after the second convolution gives 0 at the start, where it "
                "hands nothing back; and it could only ever add. It belongs between "
                "the two.",
                _as(act="after"),
            ),
            _idea(
                "relu after the sum",
                "relu(x + …) cuts off every negative feature, at the start too.",
                _as(act="sum"),
            ),
            _idea(
                "no relu",
                "Two convolutions with nothing between are one convolution.",
                _as(act="none"),
            ),
            _idea(
                "no padding",
                "Without padding a convolution takes a rim of kernel // 2 voxels off "
                "each side, and x no longer fits. padding=kernel // 2, or 'same'.",
                _as(pad=0),
            ),
            _idea(
                "padding of one",
                "Padding 1 fits a window of 3 only. kernel // 2, or 'same', fits any.",
                _as(pad=1),
            ),
            _idea(
                "a convolution for each channel",
                "With groups=width the channels stay apart, and the adapter cannot mix "
                "what they know.",
                lambda width, kernel: _Wrong(width, kernel, groups=width),
            ),
            _idea(
                "one convolution",
                "One convolution beside x is a linear map. Two, with a relu between.",
                _one_convolution,
            ),
            _idea(
                "a gate",
                "A factor that starts at zero gives the identity too, and learns. It "
                "is one parameter more than asked for: a kernel at zero needs none.",
                _Gated,
            ),
            _idea(
                "a way around each",
                "You added x after the first convolution as well, which is random: the "
                "way around has to lead past both.",
                _Twice,
            ),
        ),
        differ=records_differ,
    )
