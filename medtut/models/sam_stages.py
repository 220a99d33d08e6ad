"""The image encoders of lesson 03 in stages; the cache is `medtut.models.prefix`."""

from __future__ import annotations

import torch
from torch import nn

from medtut.models.prefix import PrefixCache, Stage, first_trainable, run, stages

__all__ = ["PrefixCache", "first_trainable", "run", "sam_stages", "stages"]


def sam_stages(encoder: nn.Module) -> list[Stage]:
    """Named steps whose composition is the encoder's forward.

    Parameters
    ----------
    encoder : ImageEncoderViT or TinyViT
        Of segment-anything or of `medtut.models.litemedsam`.

    Returns
    -------
    list of (name, callable)
        ``patch_embed`` with the positions, every block (and, in TinyViT, every
        downsampling), ``neck``. A name is where the step's parameters lie.
    """
    if hasattr(encoder, "blocks"):
        blocks = [(f"blocks.{i}", block) for i, block in enumerate(encoder.blocks)]
        ends = (
            lambda x: encoder.patch_embed(x) + encoder.pos_embed,
            lambda x: encoder.neck(x.permute(0, 3, 1, 2)),
        )
    else:
        blocks = []
        nhwc = {"memory_format": torch.channels_last}
        ends = (lambda x: encoder.patch_embed(x.contiguous(**nhwc)), encoder.neck)
        for i, layer in enumerate(encoder.layers):
            inside = enumerate(layer.blocks)
            blocks += [(f"layers.{i}.blocks.{j}", block) for j, block in inside]
            if layer.downsample is not None:
                blocks.append((f"layers.{i}.downsample", layer.downsample))
    return [("patch_embed", ends[0]), *blocks, ("neck", ends[1])]
