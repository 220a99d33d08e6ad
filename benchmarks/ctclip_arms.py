"""The rows of ``medtut bench ctclip``: what is built for each, and at which sizes."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from typing import Any

import torch

from medtut.errors import MedtutError
from medtut.models.ctclip import CTCLIP
from medtut.models.ctvit import CTViT
from medtut.models.published_ctclip import (
    PublishedCTCLIP,
    PublishedCTViT,
    PublishedDepthPEG,
)

TEXT_WIDTH = 768


@dataclass(frozen=True)
class Shape:
    """Sizes of a run; ``batch`` is where a GPU begins to halve."""

    tower: dict[str, Any]
    latent: int
    batch: int
    rounds: int
    steps: int  # measured in a turn
    warmup: int  # thrown away before, in each turn
    tokens: tuple[int, ...]


SHAPES = {
    "published": Shape({}, 512, 32, 3, 5, 3, (144, 576, 2304)),
    "quick": Shape(
        {"dim": 128, "image": (48, 96, 96), "patch": (4, 8, 8), "heads": 4},
        128, 4, 7, 1, 1, (36, 144, 576),
    ),
    "test": Shape(
        {"dim": 16, "image": (4, 8, 8), "patch": (2, 4, 4), "heads": 2,
         "dim_head": 8, "spatial_depth": 1, "temporal_depth": 1},
        8, 2, 1, 1, 1, (4, 16),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Arm:
    """One row. ``tower`` says what differs from the published function."""

    published: bool = False
    own: bool = False  # ours as it is: convolves the body as it lies, width by 64
    tower: dict[str, Any] = field(default_factory=dict)
    head: dict[str, Any] = field(default_factory=dict)
    loss: str = "softmax"
    bf16: bool = False
    compiled: bool = False


ON = {"norm": "rms", "ffn": "swiglu", "position": "none"}
ALL = {"own": True, "tower": ON, "loss": "sigmoid", "bf16": True}
BASE, SAME, ALL_ON = "published as it was", "same function, fused", "all on"
ARMS: dict[str, Arm] = {
    BASE: Arm(published=True),
    "same function, written out": Arm(tower={"attention": "explicit"}),
    SAME: Arm(),
    "same, fused, bias used": Arm(tower={"position": "bias"}),
    "rms alone": Arm(tower={"attention": "explicit", "norm": "rms"}),
    "swiglu alone": Arm(tower={"attention": "explicit", "ffn": "swiglu"}),
    "sigmoid alone": Arm(tower={"attention": "explicit"}, loss="sigmoid"),
    "bf16 alone": Arm(tower={"attention": "explicit"}, bf16=True),
    "width by 64 alone": Arm(tower={"attention": "explicit", "ffn_multiple": 64}),
    ALL_ON: Arm(**ALL),
    "all on, without bf16": Arm(**ALL | {"bf16": False}),
    "all on, bias used": Arm(**ALL | {"tower": ON | {"position": "bias"}}),
    "all on, rope": Arm(**ALL | {"tower": ON | {"position": "rope"}}),
    "all on, checkpointing": Arm(**ALL | {"tower": ON | {"checkpoint": True}}),
    "all on, attention pooling": Arm(**ALL, head={"projection": "attention"}),
    "all on, low rank 64": Arm(**ALL, head={"projection": "low_rank", "rank": 64}),
    "all on, compiled": Arm(**ALL, compiled=True),
    "all on, flash-attn": Arm(**ALL | {"tower": ON | {"attention": "flash"}}),
    # For the table by part and loss only.
    "published, sigmoid": Arm(published=True, loss="sigmoid"),
    "same function, fused, sigmoid": Arm(loss="sigmoid"),
    "all on, softmax": Arm(**ALL | {"loss": "softmax"}),
}
BY_LOSS = {  # title: (with softmax, with sigmoid)
    BASE: (BASE, "published, sigmoid"),
    SAME: (SAME, "same function, fused, sigmoid"),
    ALL_ON: ("all on, softmax", ALL_ON),
}
MAY_FAIL = ("all on, compiled", "all on, flash-attn")  # where they do not work


def build(name: str, shape: Shape, seed: int = 0) -> CTCLIP:
    """The model of an arm, random weights, on the CPU and not yet compiled."""
    arm = ARMS[name]
    torch.manual_seed(seed)
    if arm.published:
        tower = PublishedCTViT(**shape.tower)
        return PublishedCTCLIP(tower, TEXT_WIDTH, shape.latent, arm.loss)
    kind = {"projection": "published", "loss": arm.loss} | arm.head
    same = {"norm": "layer", "ffn": "geglu", "ffn_multiple": None, "position": "none"}
    tower = CTViT(**shape.tower | ({} if arm.own else same) | arm.tower)
    if not arm.own:
        for layer in tower.temporal.layers:
            layer.peg = PublishedDepthPEG(tower.dim)
    return CTCLIP(tower, TEXT_WIDTH, shape.latent, **kind)


def precision(arm: Arm, device: str) -> torch.dtype | None:
    """What autocast is asked for: bfloat16 by the switch, else as published."""
    if arm.bf16:
        return torch.bfloat16
    return torch.float16 if device == "cuda" else None


def prepare(name: str, shape: Shape) -> CTCLIP:
    """`build`, and compiled where the arm says so; it says why an arm cannot run."""
    arm = ARMS[name]
    if arm.tower.get("attention") == "flash":
        if not importlib.util.find_spec("flash_attn"):
            raise MedtutError("flash-attn is not installed")
        if not torch.cuda.is_available():
            raise MedtutError("flash-attn needs a CUDA GPU")
    model = build(name, shape)
    if arm.compiled:
        model.image_tower.compile()
    return model
