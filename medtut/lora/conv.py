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

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medtut.lora.core import AdapterSpec, LoRAError, LoRALayer, row_ratio

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class _LoRAConv(LoRALayer):
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

    dims = 2

    def __init__(
        self,
        base: nn.Module,
        r: int = 8,
        alpha: float = 16.0,
        *,
        scaling: str = "alpha/r",
        dropout: float = 0.0,
        variant: str = "lora",
        _check: bool = True,
    ) -> None:
        if base.weight.dim() != self.dims + 2:
            raise LoRAError(
                f"{type(self).__name__} wraps an nn.Conv{self.dims}d, not "
                f"{type(base).__name__}"
            )
        self._adopt(base, AdapterSpec(r, alpha, scaling, dropout, variant))
        a_shape = (r, *self.weight.shape[1:])
        b_shape = (self.out_channels, r, *[1] * self.dims)
        self._add_slot("all", "weight", None, a_shape, b_shape, _check)

    @property
    def A(self) -> Tensor:
        """(r, in/groups, *kernel) down-projection."""
        return self.lora_A

    @property
    def B(self) -> Tensor:
        """(out, r, 1, ...) up-projection."""
        return self.lora_B

    def factors(self) -> tuple[Tensor, Tensor]:
        """One pair (A, B) with ``delta = scale * B @ A`` on flattened weights."""
        if self.spec.variant != "pissa":
            return self.lora_A, self.lora_B
        A = torch.cat([self.lora_A, self.lora_A0])
        return A, torch.cat([self.lora_B, -self.lora_B0], dim=1)

    def _branch(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """Unscaled low-rank branch."""
        if self.groups > 1:
            A = A.repeat(self.groups, *[1] * (self.dims + 1))
        return _CONV[self.dims](self._conv_forward(x, A, None), B, groups=self.groups)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in, *space) -> (N, out, *space'), as the base layer."""
        if self._pristine:
            return self._conv_forward(x, self.weight, self.bias)
        spec = self.spec
        A, B = self.factors()
        dora = spec.variant == "dora"
        y = self._conv_forward(x, self.weight, None if dora else self.bias)
        if spec.dropout and self.training:
            x = F.dropout(x, spec.dropout)
        if y.dtype == A.dtype and not torch.is_autocast_enabled(x.device.type):
            y = y.add_(self._branch(x, A, B), alpha=spec.scale)
        elif torch.is_autocast_enabled(x.device.type):
            y = y + spec.scale * self._branch(x, A, B)
        else:
            y = (y + spec.scale * self._branch(x.to(A.dtype), A, B)).to(y.dtype)
        if dora:
            dtype, shape = y.dtype, (-1, *[1] * self.dims)
            y = y * self._row_scale().view(shape)
            if self.bias is not None:
                y = y + self.bias.view(shape)
            y = y.to(dtype)
        return y

    def _row_scale(self) -> Tensor:
        """DoRA's ``m / ||W + s B A||`` per output channel."""
        (slot,) = self.slots()
        with torch.no_grad():
            base = self.weight.to(slot.A.dtype).flatten(1)
            norm = (base + self._low_rank(slot)).norm(dim=1)
        return row_ratio(slot.magnitude, norm)


class LoRAConv1d(_LoRAConv, nn.Conv1d):
    dims = 1
    __doc__ = _LoRAConv.__doc__


class LoRAConv2d(_LoRAConv, nn.Conv2d):
    dims = 2
    __doc__ = _LoRAConv.__doc__


class LoRAConv3d(_LoRAConv, nn.Conv3d):
    dims = 3
    __doc__ = _LoRAConv.__doc__
