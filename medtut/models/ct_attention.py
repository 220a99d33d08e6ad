"""One attention module for the CT-ViT, computed in three ways that agree.

The function is that of CT-CLIP's image tower (Hamamci et al., arXiv:2403.17834):
queries and keys are brought to length one and multiplied by learned scales (Henry et
al. 2020, arXiv:2010.04245), their products by 8, and a learned bias that depends on
the distance of two patches may be added. Queries come from the normalised input, keys
and values from the input as it is, which is how CT-CLIP has it.

How it is computed is another matter: written out, by PyTorch's fused kernels, or by the
flash-attn package. A backend that cannot compute the function says so; none replaces
it by another one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medtut.errors import MedtutError


def choose(name: str, value: str, allowed: Iterable[str]) -> None:
    """Raise a `MedtutError` that names the choices, unless `value` is one of them."""
    if value not in allowed:
        raise MedtutError(f"{name}={value!r}: choose one of {', '.join(allowed)}.")


class RMSNorm(nn.RMSNorm):
    """PyTorch's, which takes the weight's precision; LayerNorm does under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


def make_norm(kind: str, dim: int, bias: bool = False) -> nn.Module:
    """The one place that decides what a norm of the image tower is.

    Parameters
    ----------
    kind : {"layer", "rms"}
        LayerNorm (Ba et al. 2016) or RMSNorm (Zhang and Sennrich 2019).
    dim : int
    bias : bool
        For "layer" only; RMSNorm has none.

    Notes
    -----
    PyTorch computes both in float32 whatever the input's precision, with eps under the
    root, so zeros stay zeros and 1e4 stays finite in float16.
    """
    choose("norm", kind, ("layer", "rms"))
    return nn.LayerNorm(dim, bias=bias) if kind == "layer" else RMSNorm(dim, 1e-6)


# -- rotary positions ------------------------------------------------------------------
def rope_table(grid: Sequence[int], dim_head: int, base: float = 100.0) -> Tensor:
    """Angles by which a position turns the pairs of a head (Su et al. 2021, RoPE).

    Parameters
    ----------
    grid : sequence of int
        ``(depth,)`` for positions along the body, ``(rows, columns)`` for a plane, in
        which case each axis turns half of the pairs (Heo et al. 2024).
    dim_head : int
        A multiple of ``2 * len(grid)``.
    base : float
        Slowest pair: about one turn in ``2 pi * base`` steps. 100 suits grids of tens.

    Returns
    -------
    Tensor, (2, N, dim_head / 2)
        Cosine and sine; N is the product of the grid, last axis fastest.
    """
    pairs, rest = divmod(dim_head, 2 * len(grid))
    if rest:
        raise MedtutError(
            f"dim_head={dim_head} cannot be shared among {len(grid)} axes of RoPE; "
            f"choose a multiple of {2 * len(grid)}."
        )
    speed = base ** (-torch.arange(pairs) / pairs)
    where = torch.cartesian_prod(*map(torch.arange, grid)).view(-1, len(grid))
    angles = (where[:, :, None] * speed).flatten(1)
    return torch.stack((angles.cos(), angles.sin()))


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn ``x`` (..., N, dim_head) by a `rope_table`; lengths stay."""
    cos, sin = table.to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)


# -- three ways to compute softmax(scale * q k^T + bias) v -----------------------------
# q, k, v are (batch, heads, N, dim_head), a bias (heads, N, N).
def explicit(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None):
    """Written out. The N x N matrix is kept for the backward pass."""
    logits = scale * q @ k.mT
    if bias is not None:
        logits = logits + bias
    wide = torch.promote_types(q.dtype, torch.float32)
    return logits.softmax(-1, dtype=wide).to(v.dtype) @ v


def fused(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None):
    """PyTorch's scaled_dot_product_attention, the same function.

    It keeps no N x N matrix, unless the bias itself is trained and the device has no
    kernel for that; then PyTorch writes it out.
    """
    mask = None if bias is None else bias.to(q.dtype)[None]  # 4-D, or no fast kernel
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def flash(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None):
    """The flash-attn package (Dao 2023), float16 or bfloat16 on CUDA, without bias.

    Raises
    ------
    MedtutError
        For a bias, another precision, or where the package is not installed.
    """
    if bias is not None:
        raise MedtutError(
            "attention='flash': flash-attn adds no bias to the logits, and leaving it "
            "out would be another function. Use 'fused', or position='rope' or 'none'."
        )
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise MedtutError(
            f"attention='flash' needs float16 or bfloat16, got {q.dtype}; run under "
            "autocast, or use attention='fused'."
        )
    try:
        from flash_attn import flash_attn_func
    except ImportError as error:
        raise MedtutError(
            "attention='flash' needs the flash-attn package and a CUDA GPU (pip "
            "install 'medtut[gpu]'); attention='fused' computes the same without it."
        ) from error
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # its layout: heads after tokens
    return flash_attn_func(q, k, v, softmax_scale=scale).transpose(1, 2)


BACKENDS = {f.__name__: f for f in (explicit, fused, flash)}


class Attention(nn.Module):
    """Self-attention with normalised queries and keys.

    Parameters
    ----------
    dim, heads, dim_head : int
    norm : {"layer", "rms"}
        Of the queries' input.
    backend : {"explicit", "fused", "flash"}
    scale : float
        Factor on the cosines; 8 as published.

    Notes
    -----
    (batch, N, dim) to the same. At 512, 8 and 32: 524,864 parameters. The published
    one has 512 more, a norm for a context that self-attention never has.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        dim_head: int = 32,
        norm: str = "rms",
        backend: str = "fused",
        scale: float = 8.0,
    ) -> None:
        super().__init__()
        choose("attention", backend, BACKENDS)
        self.heads, self.scale, self.backend = heads, scale, backend
        self.norm = make_norm(norm, dim)
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_kv = nn.Linear(dim, 2 * heads * dim_head, bias=False)
        self.q_scale = nn.Parameter(torch.ones(dim_head))
        self.k_scale = nn.Parameter(torch.ones(dim_head))
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values by head, (batch, heads, N, dim_head), not scaled."""
        flat = self.to_q(self.norm(x)), *self.to_kv(x).chunk(2, -1)
        return tuple(t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in flat)

    def forward(
        self, x: Tensor, bias: Tensor | None = None, rope: Tensor | None = None
    ) -> Tensor:
        q, k, v = self.project(x)
        dim_head = q.shape[-1]
        # rms_norm makes vectors of length sqrt(dim_head) in one kernel and float32;
        # the factor goes into the scale. The eps is there for zeros only.
        # Scales of another dtype, as under autocast, would split the kernel.
        unit = partial(F.rms_norm, normalized_shape=(dim_head,), eps=1e-12)
        q = unit(q, weight=self.q_scale.to(q.dtype)).to(v.dtype)
        k = unit(k, weight=self.k_scale.to(k.dtype)).to(v.dtype)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        y = BACKENDS[self.backend](q, k, v, self.scale / dim_head, bias)
        return self.to_out(y.transpose(1, 2).flatten(2))


# -- what it costs ---------------------------------------------------------------------
def attention_memory(
    backend: str, tokens: int, bias: str = "none", batch: int = 1, **like: Any
) -> int:
    """Bytes that one attention of 8 heads of 32 needs for its gradient.

    Parameters
    ----------
    backend : {"explicit", "fused", "flash"}
    tokens : int
        N.
    bias : {"none", "fixed", "trained"}
        An additive (8, N, N): none, without or with a gradient of its own.
    batch : int
    **like
        device and dtype, as for `torch.empty`; float32 on the CPU.

    Returns
    -------
    int
        On a CPU: the storage that autograd keeps for the backward pass, inputs and
        bias included; it follows from the shapes and is the same in every run. On
        CUDA: the most allocated during forward and backward, beyond the inputs.
    """
    choose("bias", bias, ("none", "fixed", "trained"))
    q, k, v = torch.zeros(3, batch, 8, tokens, 32, **like).requires_grad_().unbind()
    added = torch.zeros(8, tokens, tokens, **like).requires_grad_(bias == "trained")
    kept = {}

    def keep(t: Tensor) -> Tensor:  # holding the storage, its address stays its own
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage()
        return t

    if q.is_cuda:
        torch.cuda.reset_peak_memory_stats(q.device)
        before = torch.cuda.memory_allocated(q.device)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = BACKENDS[backend](q, k, v, 0.25, None if bias == "none" else added)
    if not q.is_cuda:
        return sum(storage.nbytes() for storage in kept.values())
    kept.clear()
    y.sum().backward()
    return torch.cuda.max_memory_allocated(q.device) - before
