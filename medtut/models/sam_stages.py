"""An image encoder in stages, and a cache for those below everything that learns.

With adapters in the last blocks only, all that lies below gives the same numbers in
every epoch: it is computed once per image and kept. Gradients do not change, since
none would have flown further down.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from medtut.data.cache import cached_arrays
from medtut.errors import MedtutError
from medtut.lora.fingerprint import tensor_hash, total
from medtut.lora.inject import is_adapter

VERSION = 1  # of what an entry means
Stage = tuple[str, Callable[[Tensor], Tensor]]


def stages(encoder: nn.Module) -> list[Stage]:
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


def _stage_of(encoder: nn.Module, name: str) -> int:
    """Number of the stage that a parameter belongs to; the first if to none.

    That is the case of the table of positions, which is the encoder's own.
    """
    names = enumerate(stage for stage, _ in stages(encoder))
    return next((i for i, stage in names if name.startswith(stage + ".")), 0)


def first_trainable(encoder: nn.Module) -> int:
    """Number of the first stage that learns; ``len(stages(encoder))`` if none does.

    A frozen adapter counts as learning: it is there to be switched and changed.
    """
    named = encoder.named_parameters()
    live = (_stage_of(encoder, n) for n, p in named if p.requires_grad or is_adapter(n))
    return min(live, default=len(stages(encoder)))


def run(
    encoder: nn.Module, x: Tensor, start: int = 0, stop: int | None = None
) -> Tensor:
    """The stages from ``start`` up to, not with, ``stop``."""
    for _, stage in stages(encoder)[start:stop]:
        x = stage(x)
    return x


class PrefixCache:
    """An encoder whose frozen beginning runs once per image.

    ``cache(x)`` is ``encoder(x)`` for a batch (N, 3, side, side), with the same
    gradients. What is frozen is looked up at every call, so blocks may be frozen and
    freed as training goes on; with nothing frozen nothing is cached.

    Parameters
    ----------
    encoder : ImageEncoderViT or TinyViT
    half : bool
        Keep features in float16: half the room, no longer exact (about 1e-3).
    memory_mb : float
        Features kept in memory, in MB of 10^6 bytes; the rest is read from the disk.

    Attributes
    ----------
    made : int
        Images whose beginning was computed, by this object.

    Notes
    -----
    An entry is named after the image's content, every tensor of the stages below and
    the number of stages, and lies in `medtut.data.cache`.
    """

    def __init__(
        self, encoder: nn.Module, half: bool = False, memory_mb: float = 1000
    ) -> None:
        self.encoder, self.half, self.room = encoder, half, memory_mb * 1e6
        self.made = 0
        self._kept: dict[tuple, Tensor] = {}
        self._seen: list[tuple[int, int]] = []

    def weights(self, start: int) -> str:
        """Fingerprint of all that the stages below ``start`` compute with."""
        named = [*self.encoder.named_parameters(), *self.encoder.named_buffers()]
        below = {n: t for n, t in named if _stage_of(self.encoder, n) < start}
        # Hashing takes longer than looking whether anybody wrote into a tensor.
        seen = [(id(t), t._version) for t in below.values()]
        if seen != self._seen:
            self._weights = total({n: tensor_hash(t) for n, t in below.items()})
            self._seen, self._kept = seen, {}
            self._below = below  # held, so that no other tensor gets one of their ids
        return self._weights

    def __call__(self, x: Tensor) -> Tensor:
        """(N, 3, side, side) -> (N, 256, h, w)."""
        start = first_trainable(self.encoder)
        if start == 0 or x.requires_grad:
            return self.encoder(x)
        kind = x.device.type
        mixed = torch.is_autocast_enabled(kind) and str(torch.get_autocast_dtype(kind))
        key = (VERSION, self.weights(start), start, mixed, self.half)
        rows = [self._row(image, start, (*key, tensor_hash(image))) for image in x]
        # As the stages hand it on: TinyViT's numbers and speed depend on it.
        tiny = hasattr(self.encoder, "layers")
        form = torch.channels_last if tiny else torch.contiguous_format
        y = torch.stack(rows).to(x.device, x.dtype, memory_format=form)
        return run(self.encoder, y, start)

    def _row(self, image: Tensor, start: int, key: tuple) -> Tensor:
        """Features of one image, from memory, the disk, or the encoder."""
        if key in self._kept:
            return self._kept[key]

        @torch.no_grad()
        def make() -> dict:
            self.made += 1
            y = run(self.encoder, image[None], 0, start)[0].cpu()
            y = y.float() if y.dtype == torch.bfloat16 else y  # numpy has none
            if self.half and y.abs().max() > torch.finfo(torch.float16).max:
                raise MedtutError("PrefixCache: features exceed float16; half=False.")
            return {"x": (y.half() if self.half else y).numpy()}

        row = torch.from_numpy(cached_arrays("sam_prefix", key, make)["x"])
        if sum(t.nbytes for t in self._kept.values()) + row.nbytes <= self.room:
            self._kept[key] = row
        return row
