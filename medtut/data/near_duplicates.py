"""When two pictures are the same picture: thumbnails that agree, detail included."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

SIDE = 32


def thumbnails(images: Tensor) -> Tensor:
    """(N, H, W) of any type -> (N, 1, 32, 32) float32, NaN as 0."""
    return F.adaptive_avg_pool2d(images.float().nan_to_num()[:, None], SIDE)


def _unit(x: Tensor) -> Tensor:
    flat = x.flatten(1) - x.flatten(1).mean(1, keepdim=True)
    size = flat.norm(dim=1, keepdim=True)
    # A blank image resembles every other blank one and says nothing.
    return torch.where(size > 1e-6, flat / size.clamp_min(1e-6), 0)


def agreement(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Correlation of every thumbnail of `a` with every one of `b`.

    Parameters
    ----------
    a, b : (N, 1, h, w), (M, 1, h, w) float

    Returns
    -------
    two (N, M) : of the intensities, and of the detail, that is of each pixel less the
        mean of its 3 × 3 neighbourhood. Unlike pictures of one kind, such as two
        heads, agree in the first and not in the second.
    """
    c, d = (x - F.avg_pool2d(x, 3, 1, 1, count_include_pad=False) for x in (a, b))
    return _unit(a) @ _unit(b).T, _unit(c) @ _unit(d).T


def alike(a: Tensor, b: Tensor, close: float, detail: float) -> Tensor:
    """Correlation (N, M) where both agreements pass their threshold, else 0."""
    whole, fine = agreement(a, b)
    return torch.where((whole > close) & (fine > detail), whole, 0)
