"""What can be set about a training run, checked when it is set."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from medtut.errors import MedtutError


class TrainError(MedtutError):
    """A run cannot start or go on; the message says why and what to do."""


CHOICES = {
    "optimizer": ("adamw", "sgd"),
    "schedule": ("cosine", "constant"),
    "precision": ("fp32", "bf16", "fp16"),
    "mode": ("max", "min"),
    "device": ("auto", "cpu"),
}
# Numbers below these, or equal to one of the second kind, are refused.
AT_LEAST = {"steps": 1, "batch_size": 1, "accumulate": 1}  # others: 0
GREATER_THAN = {"lr": 0}
# These may differ between the run that was cut off and the one that goes on.
FREE_ON_RESUME = ("device", "num_workers", "checkpoint_every")


@dataclass(frozen=True)
class TrainConfig:
    """Settings of `medtut.train.fit`.

    Attributes
    ----------
    steps : int
        Optimizer steps. One step sees ``batch_size * accumulate`` samples.
    batch_size : int
        Samples in one forward pass, over all processes together.
    lr : float
        Peak learning rate.
    weight_decay : float
        Decoupled for "adamw", an L2 term for "sgd"; on every trained tensor.
    optimizer : {"adamw", "sgd"}
        "sgd" has a momentum of 0.9.
    schedule : {"cosine", "constant"}
        After a linear ``warmup``: half a cosine down to 0 at ``steps``, or flat.
    warmup : int
        Steps.
    precision : {"fp32", "bf16", "fp16"}
        Autocast; the weights stay as they are. "fp16" needs a GPU.
    accumulate : int
        Forward passes whose gradients are averaged before one step.
    clip_norm : float
        Largest norm of the whole gradient; 0 turns clipping off.
    eval_every : int
        Steps between validations; 0 validates at the end only.
    patience : int
        Stop after so many validations in a row without a better ``monitor``; 0: never.
    monitor, mode : str, {"max", "min"}
        Which number of ``validate`` says what is best, and which way.
    checkpoint_every : int
        Steps between checkpoints; 0 writes one at the end only.
    seed : int
        Data order, dropout and augmentation follow from it.
    device : {"auto", "cpu"}
    num_workers : int
        Processes that load data.
    groups : dict of str to float
        Regular expression searched in a parameter's name -> factor on its learning
        rate. The first that matches counts.

    Raises
    ------
    TrainError
        If a value is of the wrong type or out of range.
    """

    steps: int = 100
    batch_size: int = 8
    lr: float = 1e-3
    weight_decay: float = 0.0
    optimizer: str = "adamw"
    schedule: str = "cosine"
    warmup: int = 0
    precision: str = "fp32"
    accumulate: int = 1
    clip_norm: float = 1.0
    eval_every: int = 0
    patience: int = 0
    monitor: str = "score"
    mode: str = "max"
    checkpoint_every: int = 100
    seed: int = 0
    device: str = "auto"
    num_workers: int = 0
    groups: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                raise TrainError(
                    f"TrainConfig.{name} is {value!r}; choose one of "
                    f"{', '.join(allowed)}."
                )
        for one in dataclasses.fields(self):
            if one.type in ("int", "float"):
                low = AT_LEAST.get(one.name, 0)
                where, value = f"TrainConfig.{one.name}", getattr(self, one.name)
                _number(where, value, one.type, low, one.name not in GREATER_THAN)
        if self.warmup >= self.steps:
            raise TrainError(
                f"TrainConfig.warmup is {self.warmup} of {self.steps} steps; it must "
                "be smaller than steps."
            )
        if not isinstance(self.monitor, str) or not self.monitor:
            raise TrainError("TrainConfig.monitor must name a number of validate().")
        if not isinstance(self.groups, Mapping):
            raise TrainError("TrainConfig.groups must map patterns to factors.")
        object.__setattr__(self, "groups", dict(self.groups))
        for pattern, factor in self.groups.items():
            _number(f"TrainConfig.groups[{pattern!r}]", factor, "float", 0, False)
            try:
                re.compile(pattern)
            except (re.error, TypeError) as error:
                raise TrainError(
                    f"TrainConfig.groups: {pattern!r} is no regular expression "
                    f"({error})."
                ) from error

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain values."""
        return dataclasses.asdict(self)

    def lr_factor(self, step: int) -> float:
        """Return the factor on the learning rate of step ``step`` (0 is the first).

        A function of the step alone, so there is no scheduler to save.
        """
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.schedule == "constant":
            return 1.0
        done = (step - self.warmup) / (self.steps - self.warmup)
        return 0.5 * (1 + math.cos(math.pi * done))


def _number(where: str, value: Any, kind: str, low: float, closed: bool) -> None:
    whole = kind == "int"
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        kind = "a number (in YAML, write 1.0e-4: 1e-4 is text)"
        kind = "a whole number" if whole else kind
        raise TrainError(f"{where} is {value!r}; it must be {kind}.")
    if not math.isfinite(value) or value < low or (value == low and not closed):
        bound = "at least" if closed else "greater than"
        raise TrainError(f"{where} is {value!r}; it must be {bound} {low}.")
