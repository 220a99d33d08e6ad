"""The loop's dealings with the machine: device, processes, folder, Ctrl-C."""

from __future__ import annotations

import contextlib
import re
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from medtut.train.config import TrainConfig, TrainError

if TYPE_CHECKING:
    from accelerate import Accelerator


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Make an Accelerator for this run, whatever an earlier run in here asked for."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    gpu = torch.cuda.is_available() or torch.backends.mps.is_available()
    return Accelerator(
        mixed_precision={"fp32": "no"}.get(config.precision, config.precision),
        cpu=config.device == "cpu" or not gpu,
    )


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Make the optimizer: only what requires a gradient, grouped by learning rate."""
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    left, settings = dict(trained), []
    for pattern, factor in config.groups.items():
        found = [left.pop(name) for name in list(left) if re.search(pattern, name)]
        settings.append({"params": found, "factor": float(factor)})
        if not found:
            raise TrainError(
                f"TrainConfig.groups: {pattern!r} matches no trained parameter (or an "
                "earlier pattern took them all). Trained are: "
                f"{', '.join([*trained][:20])}{' ...' if len(trained) > 20 else ''}."
            )
    if left:
        settings.append({"params": list(left.values()), "factor": 1.0})
    shared = {"lr": config.lr, "weight_decay": config.weight_decay}
    if config.optimizer == "sgd":
        return torch.optim.SGD(settings, momentum=0.9, **shared)
    return torch.optim.AdamW(settings, **shared)


def make_folder(folder: Path, accelerator: Accelerator) -> Path:
    """Make the out folder, once."""
    if accelerator.is_main_process:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TrainError(
                f"The out folder {folder} cannot be made ({error}). Choose another."
            ) from error
    accelerator.wait_for_everyone()
    return folder


@torch.no_grad()
def same_everywhere(
    model: nn.Module, accelerator: Accelerator, buffers_only: bool = False
) -> None:
    """Give every process the weights and buffers of the first one."""
    if accelerator.num_processes == 1:
        return
    tensors = list(model.buffers())
    for tensor in tensors if buffers_only else [*model.parameters(), *tensors]:
        torch.distributed.broadcast(tensor.data, src=0)


@torch.no_grad()
def average_gradients(parameters: list[nn.Parameter], accelerator: Any) -> None:
    """Replace each gradient by its mean over the processes.

    Each process saw an equal share of the batch, so the mean of their means is the mean
    over the whole batch. Done here rather than by wrapping the model: a wrapper would
    only notice calls of ``forward``, and it would hide the model's own methods.
    """
    if accelerator.num_processes == 1:
        return
    for p in parameters:
        if p.grad is None:  # another process may have one
            p.grad = torch.zeros_like(p)
    flat = torch.cat([p.grad.reshape(-1).float() for p in parameters])
    flat = accelerator.reduce(flat, "mean")
    for p in parameters:
        mean, flat = flat.tensor_split([p.numel()])
        p.grad.copy_(mean.view_as(p))


@contextlib.contextmanager
def ctrl_c() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into a flag, so that no step is torn in the middle."""
    flag = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield flag  # signals reach the main thread only
        return

    def note(number: int, frame: Any) -> None:
        if flag.is_set():
            raise KeyboardInterrupt
        flag.set()

    before = signal.signal(signal.SIGINT, note)
    try:
        yield flag
    finally:
        signal.signal(signal.SIGINT, before or signal.default_int_handler)
