"""Tokens from the densities in a patch: an embedding that knows what HU mean.

A linear map of raw voxels has to learn from its few examples that -980 is a hole in the
lung, 10 is water and 600 is calcium, and to learn it anew for every place in the patch.
Hounsfield units are a scale that never changes, so the shares of a patch in each range
can be written down: a histogram, with soft borders so that it has a gradient (Peeples
et al. 2022, doi 10.1109/TAI.2021.3135804). It holds only for volumes that are in HU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medtut.models.ct_attention import make_norm

# HU, closer where tissues are: air, emphysema, lung, fat, water, blood, contrast, bone.
CENTRES = (
    -1000, -975, -950, -925, -890, -850, -800, -700, -500, -300, -110, -60, -20, 0, 15,
    30, 45, 60, 80, 110, 160, 250, 400, 600, 800, 1000,
)  # fmt: skip


def soft_histogram(values: Tensor, centres: Tensor) -> Tensor:
    """Shares of values near each centre; a value between two counts for both.

    Parameters
    ----------
    values : (..., V)
    centres : (K,), ascending
        A value beyond the ends counts for the end.

    Returns
    -------
    (..., K), sums to 1
    """
    above = torch.bucketize(values.detach(), centres).clamp(1, len(centres) - 1)
    low, high = centres[above - 1], centres[above]
    share = ((values - low) / (high - low)).clamp(0, 1)
    counts = values.new_zeros(*values.shape[:-1], len(centres))
    counts = counts.scatter_add(-1, above - 1, 1 - share).scatter_add(-1, above, share)
    return counts / values.shape[-1]


class HistogramStem(nn.Module):
    """Soft histograms of parts of a patch, and a convolution that joins them.

    Parameters
    ----------
    dim : int
        Of the tokens.
    patch : (int, int, int)
        Voxels in depth, rows, columns. An even side is halved: eight parts, whose
        neighbours in other patches are seen too.
    norm : {"rms", "layer"}
        Of the tokens.

    Notes
    -----
    ``(B, 1, D, H, W)`` in [-1, 1], 1000 HU being 1, to ``(B, d, h, w, dim)``.
    """

    def __init__(self, dim: int, patch: Sequence[int], norm: str) -> None:
        super().__init__()
        stride = [2 - n % 2 for n in patch]
        self.part = tuple(n // s for n, s in zip(patch, stride, strict=True))
        centres = torch.tensor(CENTRES) / 1000
        self.register_buffer("centres", centres, persistent=False)
        self.inner = nn.Linear(len(CENTRES) + 6, dim // 2)
        self.join = nn.Conv3d(dim // 2, dim, 3, stride, 1)
        self.out = nn.Linear(dim, dim)
        self.norm = make_norm(norm, dim, bias=True)

    def describe(self, x: Tensor) -> Tensor:
        """Roots of the shares, mean, least and largest value, and place of every part.

        ``(B, 1, D, H, W)`` to ``(B, d', h', w', 32)``. The place, -1 to 1 along each
        axis, is told because every volume shows a chest in the same position (Liu et
        al. 2018, arXiv:1807.03247).
        """
        for axis, size in zip((2, 4, 6), self.part, strict=True):
            x = x.unflatten(axis, (-1, size))
        values = x[:, 0].permute(0, 1, 3, 5, 2, 4, 6).flatten(4).float()
        # The root makes one voxel of calcium in a hundred a number to be reckoned with.
        shares = (soft_histogram(values, self.centres) + 1e-4).sqrt()
        ends = torch.stack((values.mean(-1), values.amin(-1), values.amax(-1)), -1)
        axes = [torch.linspace(-1, 1, n, device=x.device) for n in shares.shape[1:4]]
        place = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)
        place = place.expand(*shares.shape[:4], 3)
        return torch.cat((shares, ends, place), -1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.gelu(self.inner(self.describe(x))).permute(0, 4, 1, 2, 3)
        return self.norm(self.out(F.gelu(self.join(y)).permute(0, 2, 3, 4, 1)))
