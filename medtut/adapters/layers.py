"""The small modules that methods hang beside layers of a frozen network.

They hang by forward hooks, as a child ``hung_adapter``: no module is replaced, so
the base keeps its parameter names, and what surrounds a layer (drop path, gradient
checkpointing, window shifts) goes on as before. Hooks and children survive
``copy.deepcopy``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHILD = "hung_adapter"


class SpatialAdapter(nn.Module):
    """``x + conv(relu(conv(x)))`` on the last feature map, without biases.

    Parameters
    ----------
    width : int
        Channels of the map.
    kernel : int
        Odd edge length. ``2 kernel**dims width**2`` parameters.
    dims : {1, 2, 3}

    Notes
    -----
    The second convolution starts at zero: the identity (arXiv 2303.17051;
    upstream fseft/modeling/blackbox/Adapter.py:47).
    """

    def __init__(self, width: int, kernel: int = 3, dims: int = 3) -> None:
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        self.down = conv(width, width, kernel, padding=kernel // 2, bias=False)
        self.up = conv(width, width, kernel, padding=kernel // 2, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, width, ...) -> the same shape."""
        return x + self.up(F.relu(self.down(x)))


class Bottleneck(nn.Module):
    """AdaptFormer's branch ``s (W2 relu(W1 x + b1) + b2)``, zero at the start.

    ``2 width rank + rank + width`` parameters (Chen et al. 2022, arXiv 2205.13535).
    """

    def __init__(self, width: int, rank: int = 16, scale: float = 0.1) -> None:
        super().__init__()
        self.scale = scale
        self.down, self.up = nn.Linear(width, rank), nn.Linear(rank, width)
        for tensor in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(tensor)

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> the same shape."""
        return self.scale * self.up(F.relu(self.down(x)))


class PHMLinear(nn.Module):
    r"""Compacter's linear map ``x H + b`` with ``H = sum_i rule_i (x) W_i``.

    ``n**3 + width**2 / n + width`` parameters, where a dense map has ``width**2 +
    width`` (Karimi Mahabadi et al. 2021, arXiv 2106.04647). ``W`` and ``b``
    start at zero, so the branch does; the rule from N(0, 1/n), which gives ``H`` the
    size of ``W``.
    """

    def __init__(self, width: int, n: int = 4) -> None:
        super().__init__()
        self.rule = nn.Parameter(torch.randn(n, n, n) * n**-0.5)
        self.weight = nn.Parameter(torch.zeros(n, width // n, width // n))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> the same shape."""
        H = torch.einsum("iab,icd->acbd", self.rule, self.weight)
        return x @ H.reshape(x.shape[-1], -1) + self.bias


def parallel(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
    """Forward hook: ``layer(x) + adapter(x)``."""
    return out + module.hung_adapter(args[0])


def residual(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
    """Forward hook: ``y + adapter(y)`` of the layer's output."""
    return out + module.hung_adapter(out)


def inside(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
    """Forward hook: ``layer(adapter(x))`` for a convolution, in place of ``layer(x)``.

    Not a pre-hook, which would change what other hooks see: who records the map that
    the head reads, for a cache, must get it as it is before the adapter. The head's
    own output is wasted, which costs little beside the adapter.
    """
    x = module.hung_adapter(args[0])
    return module._conv_forward(x, module.weight, module.bias)


def hang(module: nn.Module, adapter: nn.Module, hook: Any) -> None:
    """Give a layer its adapter, on the layer's device and in its dtype."""
    module.add_module(CHILD, adapter.to(next(module.parameters())))
    module.register_forward_hook(hook)
