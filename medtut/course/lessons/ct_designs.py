"""Lesson 05: the arms of its sweep on the source, as designs of switches."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Design:
    """One arm: what its switches say. A batch of 0 is that of the settings.

    `projection` is a kind of `medtut.models.ctclip.make_projection`; `text` is
    "frozen", or "lora" for `medtut.course.lessons.ct_text`.
    """

    norm: str = "rms"
    ffn: str = "swiglu"
    loss: str = "sigmoid"
    batch: int = 0
    projection: str = "attention"
    text: str = "frozen"


LOSSES = ("softmax", "sigmoid")
CUBE = {
    f"{norm}_{ffn}_{loss}": Design(norm, ffn, loss)
    for norm in ("layer", "rms") for ffn in ("geglu", "swiglu") for loss in LOSSES
}  # fmt: skip
BATCHES = {f"{loss}_b{n}": Design(loss=loss, batch=n)
           for loss in LOSSES for n in (4, 8, 32, 64)}  # fmt: skip
# One thing differs from rms_swiglu_sigmoid.
SINGLE = {
    "text_lora": Design(text="lora"), "low_rank": Design(projection="low_rank"),
    "full_projection": Design(projection="published"),
}  # fmt: skip
DESIGNS = CUBE | BATCHES | SINGLE
