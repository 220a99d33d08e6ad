"""What the loop refuses, and in which words."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from medtut.train.config import TrainConfig, TrainError
from medtut.train.order import sample_at


def check(model: nn.Module, train_set: Any, config: TrainConfig, validate: Any) -> None:
    """Refuse what cannot be trained, before anything is touched."""
    if not hasattr(train_set, "__len__") or not hasattr(train_set, "__getitem__"):
        raise TrainError("train_set needs len() and [index]; a stream has no order.")
    if len(train_set) == 0:
        raise TrainError("train_set is empty: check the folder or the split.")
    if not any(p.requires_grad for p in model.parameters()):
        raise TrainError(
            "No parameter of the model requires a gradient: nothing would be trained. "
            "Inject adapters, or unfreeze what should learn."
        )
    if config.patience and validate is None:
        raise TrainError("patience is set, but there is no validate to wait for.")
    if config.patience and not config.eval_every:
        raise TrainError("patience is set, but eval_every is 0: set eval_every too.")
    if config.precision == "fp16" and (
        config.device == "cpu" or not torch.cuda.is_available()
    ):
        raise TrainError('precision "fp16" needs a GPU; use "bf16" or "fp32" here.')


def check_loss(loss: Any, step: int) -> None:
    """Refuse a loss that is no scalar or reaches no trained parameter."""
    if not isinstance(loss, Tensor) or loss.ndim != 0:
        got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise TrainError(
            f"loss_fn must return one number as a tensor; at step {step + 1} it "
            f"returned {got}. Take the mean over the batch."
        )
    if not loss.requires_grad:
        raise TrainError(
            f"The loss of step {step + 1} does not depend on any trained parameter. "
            "Is there a no_grad or a detach on the way, or is the adapter not used?"
        )


def not_finite(
    step: int, lr: float, size: int, config: TrainConfig, what: str
) -> TrainError:
    """Return the error that names the step and its samples."""
    batch = config.batch_size * config.accumulate
    positions = range(step * batch, (step + 1) * batch)
    samples = [sample_at(i, size, config.seed) for i in positions]
    shown = ", ".join(map(str, samples[:16])) + (" ..." if len(samples) > 16 else "")
    half = " or precision fp32" if config.precision != "fp32" else ""
    return TrainError(
        f"The {what} at step {step + 1} (learning rate {lr:.3g}, samples "
        f"{shown}); the weights are those of step {step}. Look at these samples for "
        f"NaN or empty targets, then try a smaller lr, a warmup{half}."
    )
