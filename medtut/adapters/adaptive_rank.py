r"""Low-rank updates that choose their own rank (ARENA).

Between the two factors stands a diagonal: ``delta W = s B diag(d) A``. The training
loss is :math:`L + \lambda \|d\|_1`; its smooth part is minimised by the usual step,
the other by the proximal operator of the l1 norm, the soft threshold, which makes
entries exactly zero (Baklouti et al. 2025, arXiv 2507.15793). What is left of ``d``
is the rank. A step is::

    loss.backward(); optimizer.step(); proximal_step(model, lr * lam)

With an adaptive optimizer the step along ``d`` is not ``lr`` times the gradient, so
there ``lam`` is no longer the weight of the penalty, only a pace. And since ``B`` and
``A`` can grow while ``d`` shrinks, the penalty orders the directions, more than it
bounds the update. The start, ``d = 1`` and ``B = 0``, is ours.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from medtut.adapters.parts import AdapterError
from medtut.lora.core import name as lora_name
from medtut.lora.inject import adapted_layers


class Diagonal(nn.Module):
    """Multiplies row i of a factor ``A`` (r, ...) by ``d[i]``; ``d`` starts at one."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.d = nn.Parameter(torch.ones(rank))

    def forward(self, A: Tensor) -> Tensor:
        return A * self.d.view(-1, *[1] * (A.dim() - 1))


def add_diagonals(model: nn.Module) -> None:
    """Put a trainable diagonal between the factors of every LoRA slot, once.

    The layers stay what they were: merging, and :func:`medtut.lora.save_adapter`, see
    ``diag(d) A`` in the place of ``A``, so a finished adapter is exported as plain
    LoRA. With ``B = 0`` the start remains the identity.
    """
    for layer in adapted_layers(model).values():
        for slot in layer.slots():
            key, scale = lora_name("A", slot.part), Diagonal(len(slot.A)).to(slot.A)
            parametrize.register_parametrization(layer, key, scale)


def diagonals(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(layer name, d) of every slot."""
    for name, layer in adapted_layers(model).items():
        for module in layer.modules():
            if isinstance(module, Diagonal):
                yield name, module.d


@torch.no_grad()
def proximal_step(model: nn.Module, threshold: float) -> None:
    r"""Soft threshold of all diagonals: the proximal operator of ``t |d|_1``.

    ``d <- sign(d) max(|d| - t, 0)``, the minimiser of ``(x - d)^2 / 2 + t |x|``.

    Parameters
    ----------
    model : nn.Module
    threshold : float
        Learning rate times the weight of the penalty; 0 changes nothing.

    Raises
    ------
    AdapterError
        If the threshold is negative or there is no diagonal.
    """
    found = [d for _, d in diagonals(model)]
    if not found or not threshold >= 0:
        raise AdapterError("adapt with adaptive=True, and set a threshold of 0 or more")
    for d in found:
        d.copy_(nn.functional.softshrink(d, threshold))


def effective_ranks(model: nn.Module) -> dict[str, int]:
    """Non-zero entries of the diagonals, by layer (summed over q, k and v)."""
    ranks: dict[str, int] = {}
    for name, d in diagonals(model):
        ranks[name] = ranks.get(name, 0) + int(d.detach().count_nonzero())
    return ranks
