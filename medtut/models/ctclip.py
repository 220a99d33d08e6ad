"""CT-CLIP: a CT and its report as two vectors of length one.

After Hamamci et al., arXiv:2403.17834. The text tower is outside: `CTCLIP` takes its
features, so they can be computed once, and the tower be frozen, adapted or exchanged.
Every parameter here is reached by the loss.
"""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medtut.data.cache import write_by_rename
from medtut.errors import MedtutError
from medtut.models.contrastive import BIAS, LOG_SCALE, sigmoid_loss, softmax_loss
from medtut.models.ct_attention import choose
from medtut.models.ctvit import CTViT


class MeanPool(nn.Module):
    """Mean of tokens (B, d, h, w, dim) over some axes, the rest flat."""

    def __init__(self, *axes: int) -> None:
        super().__init__()
        self.axes = axes

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens.mean(self.axes).flatten(1)


class AttentionPool(nn.Module):
    """One vector from tokens (B, d, h, w, dim), each head with a query of its own."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.query = nn.Linear(dim, heads, bias=False)
        self.value = nn.Linear(dim, dim, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens.flatten(1, 3)
        weight = self.query(tokens).softmax(1)
        value = self.value(tokens).unflatten(-1, (weight.shape[-1], -1))
        return torch.einsum("bnh,bnhc->bhc", weight.to(value.dtype), value).flatten(1)


def make_projection(
    kind: str, tower: CTViT, latent: int, rank: int, heads: int | None = None
) -> nn.Sequential:
    """From tokens (B, d, h, w, dim) to (B, latent).

    Parameters
    ----------
    kind : {"published", "low_rank", "attention", "mean"}
        "published": mean over depth, all h w dim numbers into one matrix; 150,994,944
        parameters at 24 x 24 x 512 and 512. "low_rank": that matrix as a product of
        rank `rank`; 18,907,136 at 64. "attention": `AttentionPool` over all tokens;
        528,384. "mean": the mean token; 262,144.
    tower : CTViT
    latent, rank : int
    heads : int, optional
        Of "attention"; by default as many as the tower has.

    Raises
    ------
    MedtutError
        For another kind, or a width that the heads cannot share.
    """
    choose("projection", kind, ("published", "low_rank", "attention", "mean"))
    dim, flat = tower.dim, math.prod(tower.grid[1:])
    heads = heads or tower.config["heads"]
    if kind == "attention" and dim % heads:
        raise MedtutError(f"projection='attention': {heads} heads cannot share {dim}.")
    pool = MeanPool(1, 2, 3) if kind == "mean" else MeanPool(1)
    pool = AttentionPool(dim, heads) if kind == "attention" else pool
    widths = {"published": (flat * dim,), "low_rank": (flat * dim, rank)}
    steps = pairwise((*widths.get(kind, (dim,)), latent))
    return nn.Sequential(pool, *(nn.Linear(a, b, bias=False) for a, b in steps))


class CTCLIP(nn.Module):
    """Two towers and a loss.

    Parameters
    ----------
    image_tower : CTViT
    text_width : int
        Of the text tower's features.
    latent : int
    projection : {"attention", "low_rank", "mean", "published"}
        See `make_projection`.
    loss : {"sigmoid", "softmax"}
        Only the first has a ``logit_bias``.
    rank : int
        Of "low_rank".
    pool_heads : int, optional
        Of "attention".
    log_scale, bias : float
        Where the temperature (its logarithm) and SigLIP's bias start. -10 suits large
        batches; in a batch of B, ``-log(B - 1)`` says what share of the pairs match.

    Attributes
    ----------
    log_scale, logit_bias : nn.Parameter, ()
        ``logit_bias`` is None for "softmax".
    config : dict
        All of the above and the tower's, enough to build the model again.
    """

    def __init__(
        self,
        image_tower: CTViT,
        text_width: int,
        latent: int = 512,
        projection: str = "attention",
        loss: str = "sigmoid",
        rank: int = 64,
        pool_heads: int | None = None,
        log_scale: float = LOG_SCALE,
        bias: float = BIAS,
    ) -> None:
        own = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__()
        choose("loss", loss, ("sigmoid", "softmax"))
        self.config = own | {"image_tower": image_tower.config}
        self.image_tower, self.kind = image_tower, loss
        sizes = latent, rank, pool_heads
        self.to_image = make_projection(projection, image_tower, *sizes)
        self.to_text = nn.Linear(text_width, latent, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(float(log_scale)))
        sigmoid = nn.Parameter(torch.tensor(float(bias))) if loss == "sigmoid" else None
        self.register_parameter("logit_bias", sigmoid)

    def encode_image(self, volumes: Tensor) -> Tensor:
        """Vectors (B, latent) of length one from volumes (B, 1, D, H, W) in [-1, 1]."""
        tokens = self.image_tower(volumes.to(self.log_scale.device))
        return F.normalize(self.to_image(tokens).float(), dim=-1)

    def encode_text(self, features: Tensor) -> Tensor:
        """Vectors (B, latent) of length one from features (B, text_width)."""
        own = self.to_text(features.to(self.log_scale.device))
        return F.normalize(own.float(), dim=-1)

    def forward(self, volumes: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """Both kinds of vectors."""
        return self.encode_image(volumes), self.encode_text(features)

    def loss(self, image: Tensor, text: Tensor, **how: Any) -> Tensor:
        """The loss chosen when the model was made, of vectors from `forward`.

        `how`: ``gather``, and for "sigmoid" ``chunk``; see `medtut.models.contrastive`.
        """
        if self.kind == "softmax":
            return softmax_loss(image, text, self.log_scale, **how)
        return sigmoid_loss(image, text, self.log_scale, self.logit_bias, **how)


def relevance(clip: CTCLIP, volume: Tensor, direction: Tensor) -> Tensor:
    """How much each token speaks for a direction (latent,) of the common space.

    The pooled vector is a sum over tokens, so the map (d, h, w) sums to the product of
    volume vector and direction, before the vector is given its length; nothing is
    estimated. For a model with ``projection="attention"``.
    """
    with torch.no_grad():
        tokens = clip.image_tower(volume[None, None].to(clip.log_scale))
        pool, out = clip.to_image[0], clip.to_image[1]
        flat = tokens.flatten(1, 3)
        weight = pool.query(flat).softmax(1)
        value = pool.value(flat).unflatten(-1, (weight.shape[-1], -1))
        spoken = (out.weight.T @ direction.to(out.weight)).view(value.shape[2:])
        parts = (weight[..., None] * value * spoken).sum((-2, -1))
    return parts.view(tokens.shape[1:4]).cpu()


def save_ctclip(model: CTCLIP, path: Path | str, **note: object) -> Path:
    """Write a model as float16 safetensors with its config in the file's metadata.

    Parameters
    ----------
    model : CTCLIP
    path : path
    **note
        More metadata, as text: the command, seed, steps.

    Raises
    ------
    MedtutError
        If a number is not finite in float16; nothing is written.
    """
    from safetensors.torch import save_file

    state = {k: v.cpu().contiguous() for k, v in model.state_dict().items()}
    state = {k: v.half() if v.dim() else v for k, v in state.items()}
    if bad := [k for k, v in state.items() if not v.isfinite().all()]:
        raise MedtutError(f"{path} not written: {bad[0]} is not finite in float16.")
    meta = {"config": json.dumps(model.config)} | {k: str(v) for k, v in note.items()}
    return write_by_rename(Path(path), lambda p: save_file(state, p, meta))


def load_ctclip(path: Path | str) -> CTCLIP:
    """A model that `save_ctclip` wrote, in float32 and for use (``eval``).

    Raises
    ------
    MedtutError
        If the file is missing, damaged, or holds another kind of model.
    """
    from safetensors import safe_open

    try:
        with safe_open(path, "pt") as file:
            config = json.loads(file.metadata()["config"])
            state = {k: file.get_tensor(k).float() for k in file.keys()}  # noqa: SIM118
        model = CTCLIP(CTViT(**config.pop("image_tower")), **config)
        model.load_state_dict(state)
    except Exception as error:  # of many kinds, by what is wrong with the file
        raise MedtutError(
            f"{path} cannot be read as a CT-CLIP of this course ({str(error)[:120]}). "
            "It is missing, damaged, or another model; fetch or make it again."
        ) from error
    return model.eval()
