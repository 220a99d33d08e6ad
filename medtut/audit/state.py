"""Leave a model exactly as it was: every bit, flag, gradient and random state."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_PLAIN = (bool, int, float, str, type(None))


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal bit for bit (NaN equals the same NaN)."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if torch.equal(a, b):  # quick, and right except for NaN and the sign of zero
        return a.is_floating_point() is False or torch.equal(a.signbit(), b.signbit())
    flat_a, flat_b = (t.detach().contiguous().reshape(-1) for t in (a, b))
    return torch.equal(flat_a.view(torch.uint8), flat_b.view(torch.uint8))


def _tensors(module: nn.Module) -> Iterator[tuple[dict, str, Tensor]]:
    for store in (module._parameters, module._buffers, vars(module)):
        for name, value in store.items():
            if isinstance(value, Tensor):
                yield store, name, value


@contextmanager
def preserved(model: nn.Module, optimizer: Any | None = None) -> Iterator[None]:
    """Restore everything a detector may touch when the block ends, or fails.

    Covers parameters, buffers and tensor attributes (the objects and their bits),
    gradients, `requires_grad`, plain attributes of every module such as `training` or
    a layer's `merged` flag, the optimiser, and the random states of Python, NumPy and
    torch. Costs one copy of the model's memory.
    """
    tensors = [
        (store, name, value, value.detach().clone(), value.requires_grad)
        for module in model.modules()
        for store, name, value in _tensors(module)
    ]
    grads = [
        (p, p.grad, None if p.grad is None else p.grad.detach().clone())
        for p in model.parameters()
    ]
    plain = [
        (module, {k: v for k, v in vars(module).items() if isinstance(v, _PLAIN)})
        for module in model.modules()
    ]
    stepped = copy.deepcopy(optimizer.state_dict()) if optimizer is not None else None
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            with torch.no_grad():
                for store, name, value, bits, wants in tensors:
                    store[name] = value
                    if not same_bits(value, bits):
                        value.data.copy_(bits)
                    if value.is_leaf:
                        value.requires_grad_(wants)
            for parameter, grad, bits in grads:
                parameter.grad = grad
                if grad is not None:
                    grad.data.copy_(bits)
            for module, values in plain:
                vars(module).update(values)
            if stepped is not None:
                optimizer.load_state_dict(stepped)
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def set_training(model: nn.Module, training: bool) -> None:
    """Set the flag alone, without `train()`: some layers merge weights in there."""
    for module in model.modules():
        module.training = training
