"""The image tower of CT-CLIP: a transformer over 3-D patches, in plane, then in depth.

Source: Hamamci et al., arXiv:2403.17834, whose CT-ViT is the encoder of Phenaki's
C-ViViT (Villegas et al. 2022, arXiv:2210.02399). Here is that encoder alone: no decoder
and no codebook, which training against reports does not use. Each switch changes all of
what its name says.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from medtut.errors import MedtutError
from medtut.models.ct_attention import Attention, choose, make_norm, rope_table
from medtut.models.ct_stem import HistogramStem

GATES = {"geglu": F.gelu, "swiglu": F.silu}


def ffn_width(dim: int, multiple: int | None = 64) -> int:
    """Hidden width of the gated network: 8/3 of `dim`, rounded up.

    Parameters
    ----------
    dim : int
    multiple : int or None
        512 becomes 1408 with 64, which matrix units like; None cuts to an integer as
        published, 1365.
    """
    width = int(4 * (2 / 3) * dim)
    return width if multiple is None else multiple * math.ceil(width / multiple)


class FeedForward(nn.Module):
    """A gated perceptron, GEGLU or SwiGLU (Shazeer 2020, arXiv:2002.05202).

    Notes
    -----
    The first half of `to_gate_value` is the gate in both, so weights of one are
    weights of the other. ``(..., dim)`` to the same.
    """

    def __init__(self, dim: int, kind: str, norm: str, multiple: int | None) -> None:
        super().__init__()
        choose("ffn", kind, GATES)
        self.kind, inner = kind, ffn_width(dim, multiple)
        self.norm = make_norm(norm, dim, bias=True)
        self.to_gate_value = nn.Linear(dim, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.to_gate_value(self.norm(x)).chunk(2, -1)
        return self.to_out(GATES[self.kind](gate) * value)


class PEG(nn.Module):
    """Positions from neighbours: a depth-wise 3 x 3 x 3 convolution (Chu et al. 2021).

    Along the body it sees the slab itself and the two below, never those above.
    ``(B, d, h, w, dim)`` to the same.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(dim, dim, 3, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        # The same sum, slab by slab: PyTorch has no quick depth-wise kernel in three
        # dimensions, and a plane with its channels last needs no copy.
        padded = F.pad(x, (0, 0, 1, 1, 1, 1, 2, 0))
        dim, depth = self.conv.in_channels, x.shape[1]
        y = 0.0
        for k, weight in enumerate(self.conv.weight.unbind(2)):
            planes = padded[:, k : k + depth].flatten(0, 1).permute(0, 3, 1, 2)
            y = y + F.conv2d(planes, weight, groups=dim)
        y = y + self.conv.bias.to(y.dtype)[:, None, None]
        return y.permute(0, 2, 3, 1).view(x.shape)


class PositionBias(nn.Module):
    """A bias on the logits from the log-distance of two patches of a plane.

    The network of Swin V2 (Liu et al. 2022, arXiv:2111.09883), 2 -> hidden -> hidden ->
    heads; 268,296 parameters at 512 and 8. A plane of h x w patches has (hw)^2 pairs
    but only (2h - 1)(2w - 1) offsets: the network sees each offset once.
    """

    def __init__(self, heads: int, hidden: int = 512) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(2, hidden), nn.LeakyReLU(0.1), nn.Linear(hidden, hidden),
            nn.LeakyReLU(0.1), nn.Linear(hidden, heads),
        )  # fmt: skip

    def offsets(self, offset: Tensor) -> Tensor:
        """Bias (..., heads) of offsets (..., 2), counted in patches."""
        offset = offset.to(self.net[0].weight.dtype)
        return self.net(offset.sign() * offset.abs().log1p())

    def forward(self, h: int, w: int) -> Tensor:
        """The bias of every pair, (heads, h * w, h * w)."""
        device = self.net[0].weight.device
        rows, columns = (torch.arange(1 - n, n, device=device) for n in (h, w))
        table = self.offsets(torch.cartesian_prod(rows, columns))
        y, x = torch.cartesian_prod(rows[h - 1 :], columns[w - 1 :]).unbind(-1)
        dy, dx = y[:, None] - y + h - 1, x[:, None] - x + w - 1
        return table.T[:, dy * (2 * w - 1) + dx]


class Layer(nn.Module):
    """PEG, attention and feed-forward, each added to the tokens (B, d, h, w, dim).

    Attention sees the patches of one plane, or those above each other.
    """

    def __init__(self, plane: bool, peg: bool, attention: Attention, ffn: FeedForward):
        super().__init__()
        self.plane, self.attention, self.ffn = plane, attention, ffn
        self.peg = PEG(attention.to_out.out_features) if peg else None

    def forward(self, x: Tensor, bias: Tensor | None, rope: Tensor | None) -> Tensor:
        if self.peg is not None:
            x = x + self.peg(x)
        if self.plane:
            tokens = x.flatten(2, 3).flatten(0, 1)
            x = x + self.attention(tokens, bias, rope).view(x.shape)
        else:
            columns = x.permute(0, 2, 3, 1, 4)
            y = self.attention(columns.flatten(0, 2), bias, rope)
            x = x + y.view(columns.shape).permute(0, 3, 1, 2, 4)
        return x + self.ffn(x)


class Stack(nn.Module):
    """Layers and a last norm; with `checkpoint`, inner results are computed twice."""

    def __init__(self, layers: Sequence[Layer], norm: nn.Module, again: bool) -> None:
        super().__init__()
        self.layers, self.norm, self.checkpoint = nn.ModuleList(layers), norm, again

    def forward(self, x: Tensor, bias: Tensor | None, rope: Tensor | None) -> Tensor:
        again = self.checkpoint and torch.is_grad_enabled()
        for layer in self.layers:
            args = layer, x, bias, rope
            x = checkpoint(*args, use_reentrant=False) if again else layer(*args[1:])
        return self.norm(x)


class CTViT(nn.Module):
    """Tokens of a CT.

    Parameters
    ----------
    dim : int
    image, patch : (int, int, int)
        Voxels in depth, rows, columns; each side of `image` a multiple of `patch`'s.
    spatial_depth, temporal_depth : int
        Layers in plane, then in depth.
    heads, dim_head : int
    norm : {"rms", "layer"}
        Of all norms, those of the patches included.
    ffn : {"swiglu", "geglu"}
    attention : {"fused", "explicit", "flash"}
        How it is computed; see `medtut.models.ct_attention.attend`.
    position : {"bias", "rope", "none"}
        "bias": `PositionBias` in plane and none in depth, as in CT-CLIP. "rope":
        rotary, two axes in plane and one in depth.
    peg : bool
    ffn_multiple : int or None
        See `ffn_width`.
    patch_norm : bool
        Normalise the voxels of each patch first, as published. A LayerNorm there takes
        the mean and the spread of every patch away, so an even patch of water and one
        of air look alike; False keeps Hounsfield units.
    stem : {"linear", "histogram"}
        "linear": the patch embedding as published. "histogram": `HistogramStem`, which
        learns from fewer volumes and has no use for `patch_norm`.
    checkpoint : bool
        Keep only the input of each layer for the backward pass.

    Attributes
    ----------
    grid : (int, int, int)
        Patches in depth, rows, columns.
    config : dict
        The arguments.

    Notes
    -----
    ``(B, 1, D, H, W)`` to ``(B, d, h, w, dim)``. As published but for the dead norms
    (``norm="layer", ffn="geglu", ffn_multiple=None``): patch embedding 2,057,536
    parameters, 2,636,864 per layer, 24 x 24 x 24 x 512 tokens from 240 x 480 x 480.

    Raises
    ------
    MedtutError
        For sizes that do not fit, an unknown choice, or flash attention with a bias.
    """

    def __init__(
        self,
        dim: int = 512,
        image: Sequence[int] = (240, 480, 480),
        patch: Sequence[int] = (10, 20, 20),
        spatial_depth: int = 4,
        temporal_depth: int = 4,
        heads: int = 8,
        dim_head: int = 32,
        norm: str = "rms",
        ffn: str = "swiglu",
        attention: str = "fused",
        position: str = "bias",
        peg: bool = True,
        ffn_multiple: int | None = 64,
        patch_norm: bool = True,
        stem: str = "linear",
        checkpoint: bool = False,
    ) -> None:
        config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__()
        self.config, self.dim = config, dim
        self.image, self.patch = tuple(image), tuple(patch)
        pairs = list(zip(self.image, self.patch, strict=True))
        self.grid = tuple(n // p for n, p in pairs)
        if any(n % p for n, p in pairs):
            raise MedtutError(
                f"CTViT: a volume of {self.image} voxels is no whole number of patches "
                f"of {self.patch}; crop or pad it, or choose other patches."
            )
        choose("position", position, ("bias", "rope", "none"))
        if attention == "flash" and position == "bias":
            raise MedtutError(
                "attention='flash' adds no bias to the logits; use 'fused' with "
                "position='bias', or position='rope' with 'flash'."
            )
        choose("stem", stem, ("linear", "histogram"))
        voxels = math.prod(self.patch)
        self.embed = (
            HistogramStem(dim, self.patch, norm)
            if stem == "histogram"
            else nn.Sequential(
                make_norm(norm, voxels, bias=True) if patch_norm else nn.Identity(),
                nn.Linear(voxels, dim),
                make_norm(norm, dim, bias=True),
            )
        )
        self.bias = PositionBias(heads, dim) if position == "bias" else None
        for name, axes in (("plane", self.grid[1:]), ("depth", self.grid[:1])):
            table = rope_table(axes, dim_head) if position == "rope" else None
            self.register_buffer(f"{name}_rope", table, persistent=False)
        mix = dim, heads, dim_head, norm, attention
        gate = dim, ffn, norm, ffn_multiple

        def stack(depth: int, plane: bool) -> Stack:
            parts = [(Attention(*mix), FeedForward(*gate)) for _ in range(depth)]
            layers = [Layer(plane, peg, *pair) for pair in parts]
            return Stack(layers, make_norm(norm, dim), checkpoint)

        self.spatial = stack(spatial_depth, plane=True)
        self.temporal = stack(temporal_depth, plane=False)

    def patches(self, x: Tensor) -> Tensor:
        """Cut (B, 1, D, H, W) into (B, d, h, w, voxels of a patch)."""
        for axis, size in zip((2, 4, 6), self.patch, strict=True):
            x = x.unflatten(axis, (-1, size))
        return x[:, 0].permute(0, 1, 3, 5, 2, 4, 6).flatten(4)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 5 or tuple(x.shape[1:]) != (1, *self.image):
            raise MedtutError(
                f"CTViT: expected volumes (B, 1, {', '.join(map(str, self.image))}), "
                f"got {tuple(x.shape)}; crop or pad them first."
            )
        whole = self.config["stem"] == "histogram"
        return self.mix(self.embed(x if whole else self.patches(x)))

    def mix(self, tokens: Tensor) -> Tensor:
        """Both stacks on embedded tokens (B, d, h, w, dim)."""
        bias = None if self.bias is None else self.bias(*self.grid[1:])
        x = self.spatial(tokens, bias, self.plane_rope)
        return self.temporal(x, None, self.depth_rope)
