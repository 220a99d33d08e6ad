"""CT-CLIP as one published re-implementation runs it, beside what it describes.

Source: github.com/renjie-liang/CTCLIP_MODERN at 2babb98, written anew from what
``src/models/ctvit/{attention,layers,ctvit}.py`` and ``src/models/ct_clip/ct_clip.py``
do. What differs from `medtut.models.ctvit` is the point, and each is named below. Left
out: the codebook (no parameter of it is trained, and its straight-through output is
not needed to see any of this), dropout at rate 0, and profiling.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medtut.lora import Ledger, find_dead, ledger
from medtut.models.contrastive import LOG_SCALE
from medtut.models.ct_attention import Attention
from medtut.models.ctclip import CTCLIP
from medtut.models.ctvit import PEG, CTViT, FeedForward, PositionBias

BERT_BASE = 109_482_240  # parameters of a BERT-base with a vocabulary of 30,522
BERT_POOLER = 590_592  # of those, the pooler's: the first token's features go around it


class PublishedRMSNorm(nn.Module):
    """RMSNorm with its eps beside the root, in the precision of the input.

    In float16 1e-8 is 0, so zeros give 0 / 0; and squares above 65,504, of values from
    256 on, are infinite, so those become 0. CUDA's autocast, with which the source
    trains, takes powers in float32; it happens after ``.half()``.
    """

    def __init__(self, dim: int, eps: float = 1e-8) -> None:
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        root = x.square().mean(-1, keepdim=True).sqrt()
        return x * (self.weight / (root + self.eps))


class PublishedAttention(Attention):
    """Attention that takes a bias and leaves it out.

    With `flash` it is another function: no normalised queries and keys, no learned
    scales, 1 / sqrt(dim_head) in place of 8, float16 whatever the model's precision.
    The kernel itself, flash-attn's, is replaced by PyTorch's.
    """

    def __init__(self, dim: int, heads: int, dim_head: int, flash: bool, rms: bool):
        super().__init__(dim, heads, dim_head, "layer", "explicit")
        if flash:
            self.norm = nn.LayerNorm(dim)  # whatever `rms` says
            del self.q_scale, self.k_scale
        elif rms:
            self.norm = PublishedRMSNorm(dim)
        self.context_norm, self.flash = copy.deepcopy(self.norm), flash  # never used

    def forward(
        self, x: Tensor, bias: Tensor | None = None, rope: Tensor | None = None
    ) -> Tensor:
        q, k, v = self.project(x)
        if self.flash:
            y = F.scaled_dot_product_attention(q.half(), k.half(), v.half()).to(x.dtype)
        else:
            q = F.normalize(q, dim=-1) * self.q_scale
            k = F.normalize(k, dim=-1) * self.k_scale
            y = (q @ k.mT * self.scale).softmax(-1) @ v
        return self.to_out(y.transpose(1, 2).flatten(2))


class PublishedFeedForward(FeedForward):
    """The gate is the second half of the weights in GEGLU, the first in SwiGLU.

    Its norm is a LayerNorm, also where the switch says RMSNorm.
    """

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.to_gate_value(self.norm(x)).chunk(2, -1)
        return self.to_out(F.silu(a) * b if self.kind == "swiglu" else F.gelu(b) * a)


class PublishedDepthPEG(PEG):
    """The convolution of the layers in depth, over tokens taken for another order.

    They come as (rows, columns, depth) and are viewed as (depth, rows, columns). With
    24 of each that only renames the axes, so "below" means in front; else neighbours
    in the view are no neighbours in the body.
    """

    def forward(self, x: Tensor) -> Tensor:
        columns = x.permute(0, 2, 3, 1, 4)
        y = super().forward(columns.reshape(x.shape))
        return y.reshape(columns.shape).permute(0, 3, 1, 2, 4)


class PublishedPositionBias(PositionBias):
    """The bias network run on all (h w)^2 pairs instead of the offsets among them."""

    def forward(self, h: int, w: int) -> Tensor:
        axes = (torch.arange(n, device=self.net[0].weight.device) for n in (h, w))
        where = torch.cartesian_prod(*axes)
        return self.offsets(where[:, None] - where).permute(2, 0, 1)


class PublishedCTViT(CTViT):
    """The image tower with its three switches, and the decoder that nothing calls.

    Parameters
    ----------
    flash, rms, swiglu : bool
        The switches; `rms` reaches the last norm of each stack and, without `flash`,
        those inside the attention.
    **size
        dim, image, patch, spatial_depth, temporal_depth, heads, dim_head of `CTViT`.
    """

    def __init__(
        self, flash: bool = False, rms: bool = False, swiglu: bool = False, **size: Any
    ) -> None:
        ffn = "swiglu" if swiglu else "geglu"
        super().__init__(norm="layer", ffn=ffn, ffn_multiple=None, **size)
        dim, heads, dim_head = (self.config[k] for k in ("dim", "heads", "dim_head"))
        self.bias = PublishedPositionBias(heads, dim)
        for stack in (self.spatial, self.temporal):
            for layer in stack.layers:
                layer.attention = PublishedAttention(dim, heads, dim_head, flash, rms)
                layer.ffn = PublishedFeedForward(dim, ffn, "layer", None)
                if not layer.plane:
                    layer.peg = PublishedDepthPEG(dim)
            if rms:
                stack.norm = PublishedRMSNorm(dim)
        self.decoder_temporal = copy.deepcopy(self.temporal)
        self.decoder_spatial = copy.deepcopy(self.spatial)
        self.to_pixels = nn.Linear(dim, math.prod(self.patch))


class PublishedCTCLIP(CTCLIP):
    """Both towers' heads, each with a second copy that no loss reaches.

    Parameters
    ----------
    image_tower : PublishedCTViT
    text_width, latent : int
    loss : {"softmax", "sigmoid"}
        The logarithm of the temperature starts at 1 for the first (2.72) and at
        log(10) for the second.
    """

    def __init__(
        self, image_tower: CTViT, text_width=768, latent=512, loss="softmax"
    ) -> None:
        start = {"log_scale": 1.0 if loss == "softmax" else LOG_SCALE}
        super().__init__(image_tower, text_width, latent, "published", loss, **start)
        self.to_image_extra = copy.deepcopy(self.to_image)
        self.to_text_extra = copy.deepcopy(self.to_text)


def published_ledger(**switches: bool) -> Ledger:
    """Parameters at the published size, by whether the loss reaches them.

    A small model of the same layers is run backwards to see which; those are counted
    in the large one, which is never filled with numbers. Without the text tower, which
    brings `BERT_BASE` more, `BERT_POOLER` of them out of reach.

    Parameters
    ----------
    **switches : bool
        flash, rms, swiglu of `PublishedCTViT`; loss of `PublishedCTCLIP` is "softmax".
    """
    small = {
        "dim": 8,
        "image": (2, 2, 2),
        "patch": (1, 1, 1),
        "heads": 1,
        "dim_head": 4,
    }
    with torch.random.fork_rng(devices=[]):
        model = PublishedCTCLIP(PublishedCTViT(**switches, **small), 4, 8)
        image, text = model(torch.randn(2, 1, 2, 2, 2), torch.randn(2, 4))
        dead = find_dead(model, model.loss(image, text))
    with torch.device("meta"):
        full = PublishedCTCLIP(PublishedCTViT(**switches))
    return ledger(full, dead=dead)


def norms_by_type(model: nn.Module) -> dict[str, int]:
    """Norms inside the layers and at the ends of the encoder's two stacks, by class.

    The two of the patch embedding, always LayerNorm in the published code, are not
    counted.
    """
    counts: dict[str, int] = {}
    for name, module in model.named_modules():
        kind = type(module).__name__.removeprefix("Published")
        if kind.endswith("Norm") and name.startswith(("spatial.", "temporal.")):
            counts[kind] = counts.get(kind, 0) + 1
    return counts


def temperature_reach(
    lr: float = 1.25e-6, steps: int = 9_320, warmup: int = 300, floor: float = 0.01
) -> float:
    """How far Adam can move one number in a run: the sum of its learning rates.

    A step of Adam is at most about the rate long (its betas being 0.9 and 0.99), and
    that only while every gradient has the same sign.

    Parameters
    ----------
    lr, steps, warmup, floor
        Peak rate; 7,463 volumes in batches of 16, 20 times (the last, smaller batch of
        an epoch left out); linear warm-up; then half a cosine down to `floor` times
        the peak.
    """
    t = torch.arange(steps, dtype=torch.float64)
    cosine = (1 + ((t - warmup) / (steps - warmup) * math.pi).cos()) / 2
    factor = torch.where(t < warmup, (t + 1) / warmup, floor + (1 - floor) * cosine)
    return lr * float(factor.sum())
