"""A small vision transformer with a dense head, the running example of lesson 01.

The blocks are those of the vision transformer (Dosovitskiy et al., ICLR 2021,
arXiv:2010.11929): pre-norm, multi-head self-attention, GELU perceptron, learned
positions, no class token. Query, key and value are separate linear layers so that an
adapter can be put on one of them by hand. The head gives every token the logits of
the pixels under it, as a linear decoder of Segmenter does (Strudel et al., ICCV 2021).
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medtut.errors import MedtutError

WEIGHTS = Path(__file__).parent / "weights" / "dense_vit_t1.safetensors"


class Attention(nn.Module):
    """Multi-head self-attention with separate projections, (batch, tokens, width)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape

        def split(y: Tensor) -> Tensor:
            return y.view(batch, tokens, self.heads, width // self.heads).transpose(
                1, 2
            )

        mixed = F.scaled_dot_product_attention(
            split(self.query(x)), split(self.key(x)), split(self.value(x))
        )
        return self.proj(mixed.transpose(1, 2).reshape(batch, tokens, width))


class Mlp(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, int(width * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class DenseViT(nn.Module):
    """Vision transformer that labels every pixel.

    Parameters
    ----------
    image : side of the square input, in pixels; a multiple of `patch`.
    patch : side of a patch, in pixels.
    width, depth, heads, mlp_ratio : size of the transformer.
    classes : number of labels, background included.

    Notes
    -----
    Input ``(batch, 1, image, image)``, output ``(batch, classes, image, image)``.
    """

    def __init__(
        self,
        image: int = 96,
        patch: int = 12,
        width: int = 256,
        depth: int = 4,
        heads: int = 4,
        mlp_ratio: float = 2.0,
        classes: int = 4,
    ) -> None:
        super().__init__()
        if image % patch:
            raise MedtutError(
                f"DenseViT: the image side {image} is not a multiple of the patch "
                f"side {patch}; choose e.g. {image - image % patch}."
            )
        self.patch, self.classes = patch, classes
        self.embed = nn.Conv2d(1, width, patch, stride=patch)
        self.position = nn.Parameter(torch.zeros(1, (image // patch) ** 2, width))
        self.blocks = nn.ModuleList(
            Block(width, heads, mlp_ratio) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes * patch * patch)
        nn.init.trunc_normal_(self.position, std=0.02)

    def tokens(self, x: Tensor) -> Tensor:
        """Features of the patches, ``(batch, tokens, width)``."""
        y = self.embed(x).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            y = block(y)
        return self.norm(y)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.shape[-2] // self.patch
        y = self.head(self.tokens(x)).transpose(1, 2)
        y = y.reshape(x.shape[0], self.classes * self.patch**2, rows, -1)
        return F.pixel_shuffle(y, self.patch)


def load_dense_vit(path: Path | None = None) -> DenseViT:
    """The model with the project's own weights, pretrained on T1 slices.

    They were trained from scratch on the embedded MNI152 template under its real T1
    contrast; ``data_scripts/pretrain_dense_vit.py`` makes them again and
    ``medtut/data/cards/dense-vit-t1.md`` is their card.
    """
    from safetensors.torch import load_file

    path = path or WEIGHTS
    if not path.is_file():
        raise MedtutError(
            f"{path.name} is missing from {path.parent}. Reinstall medtut, "
            "or make them with: python data_scripts/pretrain_dense_vit.py"
        )
    model = DenseViT()
    model.load_state_dict({k: v.float() for k, v in load_file(path).items()})
    return model.eval()
