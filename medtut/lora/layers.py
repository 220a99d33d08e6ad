"""Low-rank linear layers, plain and for the parts of a fused projection."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medtut.lora.core import AdapterSpec, LoRAError, LoRALayer, row_ratio


class LowRankBranch(LoRALayer):
    """A layer whose update runs beside the base: ``y = f(x, W) + s f(f(x, A), B) + b``.

    A subclass says what ``f`` is: a linear map or a convolution over ``dims`` axes.
    """

    kind: type[nn.Module]  # what it wraps
    dims = 0

    def __init__(
        self,
        base: nn.Module,
        r: int = 8,
        alpha: float = 16.0,
        *,
        _check: bool = True,
        **settings: Any,
    ) -> None:
        if not isinstance(base, self.kind):
            raise LoRAError(
                f"{type(self).__name__} wraps an nn.{self.kind.__name__}, not "
                f"{type(base).__name__}"
            )
        self._adopt(base, AdapterSpec(r, alpha, **settings))
        out, *inside = self.weight.shape
        shapes = (r, *inside), (out, r, *[1] * self.dims)
        self._add_slot("all", "weight", None, *shapes, _check)

    def _base(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        raise NotImplementedError

    def _branch(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """Unscaled low-rank branch."""
        raise NotImplementedError

    def _add_branch(self, y: Tensor, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """Add the scaled branch into an output we own."""
        return y.add_(self._branch(x, A, B), alpha=self.spec.scale)

    @property
    def A(self) -> Tensor:
        """Down-projection, r first; the only one if there is one."""
        return self.slots()[0].A

    @property
    def B(self) -> Tensor:
        """Up-projection, (out, r) first; the only one if there is one."""
        return self.slots()[0].B

    def factors(self) -> tuple[Tensor, Tensor]:
        """One pair (A, B) with ``delta = scale * B @ A``, exact for every variant."""
        if self.spec.variant != "pissa":
            return self.lora_A, self.lora_B
        return self.slots()[0].pair()

    def _row_scale(self) -> Tensor:
        """DoRA's ``m / ||W + s B A||`` per output, 1 where a row is not adapted."""
        slots = self.slots()
        scale = slots[0].magnitude.new_ones(len(self.weight))
        for slot in slots:
            with torch.no_grad():
                base = slot.take(self.weight).to(slot.A.dtype).flatten(1)
                norm = (base + self._low_rank(slot)).norm(dim=1)
            scale = slot.put(scale, row_ratio(slot.magnitude, norm))
        return scale

    def forward(self, x: Tensor) -> Tensor:
        """Input and output shapes are those of the base layer."""
        if self._pristine:  # merged: nothing but the base layer
            return self._base(x, self.weight, self.bias)
        spec = self.spec
        A, B = self.factors()
        dora = spec.variant == "dora"
        y = self._base(x, self.weight, None if dora else self.bias)
        if spec.dropout and self.training:
            x = F.dropout(x, spec.dropout)
        if torch.is_autocast_enabled(x.device.type):
            y = y + spec.scale * self._branch(x, A, B)
        elif y.dtype == A.dtype:
            y = self._add_branch(y, x, A, B)
        else:
            y = (y + spec.scale * self._branch(x.to(A.dtype), A, B)).to(y.dtype)
        if dora:
            dtype, column = y.dtype, (-1, *[1] * self.dims)  # one number per output
            y = y * self._row_scale().view(column)
            bias = 0 if self.bias is None else self.bias.view(column)
            y = (y + bias).to(dtype)
        return y


class LoRALinear(LowRankBranch, nn.Linear):
    r"""A linear layer with a low-rank branch.

    ``y = W x + b + s B A dropout(x)`` with ``s`` from ``scaling``. DoRA gives
    ``y = m * (W x + s B A dropout(x)) / ||W + s B A||_row + b`` with the norm held
    constant for the gradient (only the low-rank branch sees the dropout).

    PiSSA starts ``A0, B0`` at the top singular directions of ``W`` and trains copies
    of them: ``y = W x + s (B A - B0 A0) x``. The paper stores the residual
    ``W - s B0 A0`` in place of ``W``; we keep ``W`` as it is and the frozen pair
    beside it. That is the same function with the same gradients, and it leaves the
    base bit for bit intact, so that a saved adapter fits the original weights.

    Parameters
    ----------
    base : nn.Linear
        The layer to adapt; weight (out, in). Its parameters are shared and frozen.
    r, alpha, scaling, dropout, variant
        See :class:`AdapterSpec`.

    Attributes
    ----------
    A : Parameter, (r, in)
    B : Parameter, (out, r)

    Raises
    ------
    LoRAError
        If a setting is out of range or r exceeds min(in, out).
    """

    kind = nn.Linear

    def _base(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def _branch(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return F.linear(F.linear(x, A), B)

    def _add_branch(self, y: Tensor, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        # One fused multiply-add into the output we already own.
        return y.addmm_(F.linear(x, A), B.t(), alpha=self.spec.scale)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        y = super().forward(x.reshape(-1, self.in_features))
        return y.view(*x.shape[:-1], self.out_features)


class LoRAFusedLinear(LoRALinear):
    """Chosen parts of a fused projection, each part with its own (A, B).

    Parameters
    ----------
    base : nn.Linear
        Weight (n * d, in), n parts of d rows each.
    parts : sequence of str
        Parts to adapt, from ``order``.
    order : sequence of str
        The parts as they lie in the weight, by default query, key, value.
    layout : {"thirds", "per-head"}
        "thirds": whole parts one after another, ``[q | k | v]`` (timm, MONAI,
        segment-anything). "per-head": for each head its q, k and v.
    heads : int, optional
        Number of heads, for "per-head".

    Raises
    ------
    LoRAError
        If the rows do not divide, or a part is unknown.
    """

    def __init__(
        self,
        base: nn.Linear,
        r: int = 8,
        alpha: float = 16.0,
        *,
        parts: Iterable[str] = ("query", "value"),
        order: Iterable[str] = ("query", "key", "value"),
        layout: str = "thirds",
        heads: int | None = None,
        _check: bool = True,
        **settings: Any,
    ) -> None:
        self._adopt(base, AdapterSpec(r, alpha, **settings))
        self.order, self.layout, self.heads = tuple(order), layout, heads
        chosen = [p for p in self.order if p in set(parts)]
        if set(parts) - set(self.order) or not chosen:
            raise LoRAError(
                f"parts {sorted(parts)} do not fit a fused layer of "
                f"{', '.join(self.order)}."
            )
        for part in chosen:
            rows = part_rows(self.out_features, self.order, part, layout, heads)
            shapes = (r, self.in_features), (len(rows), r)
            self._add_slot(part, "weight", rows, *shapes, _check)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (R, in) stacked, B (out, R) with each part's block in its own rows."""
        As, Bs = [], []
        for slot in self.slots():
            A, B = slot.pair()
            As.append(A)
            Bs.append(slot.put(B.new_zeros(self.out_features, B.shape[1]), B))
        return torch.cat(As), torch.cat(Bs, dim=1)


def part_rows(
    rows: int,
    order: tuple[str, ...],
    part: str,
    layout: str = "thirds",
    heads: int | None = None,
) -> Tensor:
    """Row numbers of one part in a fused weight with ``rows`` rows."""
    n, index = len(order), order.index(part)
    if rows % n:
        raise LoRAError(f"a weight with {rows} rows does not split into {n} parts.")
    if layout == "thirds":
        return torch.arange(index * (rows // n), (index + 1) * (rows // n))
    if layout != "per-head":
        raise LoRAError(f"unknown layout {layout!r}; use 'thirds' or 'per-head'.")
    if not heads or rows % (n * heads):
        raise LoRAError(
            f"the per-head layout of {rows} rows needs the number of heads, got "
            f"{heads!r}; set qkv_heads in LoRAConfig."
        )
    table = torch.arange(rows).view(heads, n, rows // (n * heads))
    return table[:, index].reshape(-1)
