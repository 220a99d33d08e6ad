"""Low-rank branches for convolutions in one, two and three dimensions.

The weight (out, in/groups, *k) is read as a matrix of ``out`` rows: ``A`` is a
convolution with the base's kernel, stride, padding, dilation and padding mode into r
channels, ``B`` a 1x1 convolution back. This is peft's form; loralib's reshaping works
for two dimensions only.

With groups, all groups share one ``A`` (r, in/groups, *k), and ``B`` (out, r) keeps
each group's outputs on that group's channels. The update then has exactly the shape
of the grouped weight, so it can be merged, and any rank up to
min(out, in/groups * prod(k)) works, depthwise layers included. As a peft adapter it
is one of rank groups * r whose ``A`` is block-diagonal. (peft itself trains an ``A``
across all groups, which no grouped weight can hold: it cannot be merged.)
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from medtut.lora.layers import LowRankBranch


def block_diagonal(A: Tensor, groups: int) -> Tensor:
    """The ``A`` of rank groups * r, across all channels, that a shared one stands for.

    (r, width, *k) -> (groups * r, groups * width, *k).
    """
    wide = A.new_zeros(groups, len(A), groups, *A.shape[1:])
    for i in range(groups):
        wide[i, :, i] = A
    return wide.flatten(2, 3).flatten(0, 1)


_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class _LoRAConv(LowRankBranch):
    """Common part of the three; ``y = conv(x, W) + b + s B(A(dropout(x)))``.

    Parameters
    ----------
    base : nn.Conv1d, nn.Conv2d or nn.Conv3d
        The layer to adapt; its parameters are shared and frozen.
    r, alpha, scaling, dropout, variant
        See :class:`medtut.lora.core.AdapterSpec`.

    Attributes
    ----------
    A : Parameter, (r, in/groups, *kernel)
    B : Parameter, (out, r, 1, ...)

    Raises
    ------
    LoRAError
        If a setting is out of range or r exceeds min(out, in/groups * prod(k)).
    """

    def _base(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._conv_forward(x, weight, bias)

    def _branch(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        if self.groups > 1:
            A = A.repeat(self.groups, *[1] * (self.dims + 1))
        return _CONV[self.dims](self._conv_forward(x, A, None), B, groups=self.groups)


class LoRAConv1d(_LoRAConv, nn.Conv1d):
    kind, dims = nn.Conv1d, 1
    __doc__ = _LoRAConv.__doc__


class LoRAConv2d(_LoRAConv, nn.Conv2d):
    kind, dims = nn.Conv2d, 2
    __doc__ = _LoRAConv.__doc__


class LoRAConv3d(_LoRAConv, nn.Conv3d):
    kind, dims = nn.Conv3d, 3
    __doc__ = _LoRAConv.__doc__
