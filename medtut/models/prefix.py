"""A model in stages, and a cache for those below everything that learns.

With adapters in the last layers only, all that lies below gives the same numbers in
every epoch: it is computed once per image and kept. Gradients do not change, since
none would have flown further down.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medtut.data.cache import cached_arrays
from medtut.errors import MedtutError
from medtut.lora.fingerprint import tensor_hash, total
from medtut.lora.inject import is_adapter
from medtut.lora.layers import LowRankBranch

VERSION = 2  # of what an entry means
SLAB = 64 << 20  # bytes that are asked for at once
Stage = tuple[str, Callable[[Tensor], Tensor]]


def _children(model: nn.Module, *names: str) -> list[Stage]:
    parts = ((name, model.get_submodule(name)) for name in names)
    return [(f"{n}.{i}", m) for n, part in parts for i, m in part.named_children()]


def stages(model: nn.Module) -> list[Stage]:
    """Named steps whose composition is the model's forward.

    Parameters
    ----------
    model : nn.Module
        torchvision's VGG, ResNet or DenseNet, or an image encoder of a SAM (see
        `medtut.models.sam_stages`).

    Returns
    -------
    list of (name, callable)
        A name is where the step's parameters lie. VGG: every layer, with ``avgpool``
        (which flattens) between ``features.N`` and ``classifier.N``. ResNet: the stem,
        every block, ``avgpool``, ``fc``. DenseNet: the children of ``features``,
        ``pool``, ``classifier``.

    Raises
    ------
    MedtutError
        For another kind of model.
    """
    if hasattr(model, "patch_embed"):
        from medtut.models.sam_stages import sam_stages

        return sam_stages(model)
    flat = ("avgpool", lambda x: model.avgpool(x).flatten(1))
    if hasattr(model, "layer4"):
        stem = [(n, getattr(model, n)) for n in ("conv1", "bn1", "relu", "maxpool")]
        blocks = _children(model, "layer1", "layer2", "layer3", "layer4")
        return [*stem, *blocks, flat, ("fc", model.fc)]
    if not hasattr(model, "features") or not hasattr(model, "classifier"):
        raise MedtutError(f"stages: {type(model).__name__} is no model known here.")
    if hasattr(model, "avgpool"):
        end = [flat, *_children(model, "classifier")]
    else:
        pool = ("pool", lambda x: F.adaptive_avg_pool2d(F.relu(x), 1).flatten(1))
        end = [pool, ("classifier", model.classifier)]
    return [*_children(model, "features"), *end]


def stage_of(model: nn.Module, name: str) -> int:
    """Number of the stage that a parameter or module belongs to; the first if to none.

    That is the case of a SAM's table of positions, which is the encoder's own.
    """
    return _stages_of(model, [name])[0]


def _stages_of(model: nn.Module, names: list[str]) -> list[int]:
    number = {stage: i for i, (stage, _) in enumerate(stages(model))}
    words = (name.split(".") for name in names)
    above = ([".".join(w[:n]) for n in range(len(w), 0, -1)] for w in words)
    return [next((number[a] for a in one if a in number), 0) for one in above]


def _is_live(m: nn.Module) -> bool:
    """Whether a module's output depends on chance, or on the rest of the batch."""
    random = isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0
    return m.training and (random or isinstance(m, nn.modules.batchnorm._BatchNorm))


def first_trainable(model: nn.Module) -> int:
    """Number of the first stage that learns; ``len(stages(model))`` if none does.

    A frozen adapter counts as learning: it is there to be switched and changed. So
    does, in training mode, a dropout or a BatchNorm that is not frozen.
    """
    named = model.named_parameters()
    live = [n for n, p in named if p.requires_grad or is_adapter(n)]
    live += [n for n, m in model.named_modules() if _is_live(m)]
    return min(_stages_of(model, live), default=len(stages(model)))


def run(model: nn.Module, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
    """The stages from ``start`` up to, not with, ``stop``."""
    for _, stage in stages(model)[start:stop]:
        x = stage(x)
    return x


def frozen_base(model: nn.Module, start: int) -> LowRankBranch | None:
    """The adapted layer that a stage is, if ``W x + b`` of it can be kept as well.

    That is plain LoRA or PiSSA over a frozen, unmerged weight. DoRA rescales rows by
    the norm of the changed weight, so it needs that weight in every step anyway.
    """
    layer = stages(model)[start][1] if start < len(stages(model)) else None
    if not isinstance(layer, LowRankBranch) or layer.merged:
        return None
    frozen = not any(
        p.requires_grad for p in (layer.weight, layer.bias) if p is not None
    )
    return layer if frozen and layer.spec.variant != "dora" else None


def branch_on(layer: LowRankBranch, x: Tensor, base: Tensor) -> Tensor:
    """An adapted layer's output from input and kept ``W x + b``: ``+ s B A x``."""
    A, B = layer.factors()
    if layer.training:
        x = F.dropout(x, layer.spec.dropout)
    return base + layer.spec.scale * layer._branch(x, A, B)


class PrefixCache:
    """A model whose frozen beginning runs once per image.

    ``cache(x)`` is ``model(x)`` for a batch (N, 3, H, W), with the same gradients.
    What is frozen is looked up at every call, so blocks may be frozen and freed as
    training goes on; with nothing frozen nothing is cached. Where the first layer that
    learns is an adapted linear or convolution, its frozen ``W x + b`` is kept beside
    its input, and a step computes the low-rank branch only.

    Parameters
    ----------
    model : nn.Module
        One that `stages` knows.
    half : bool
        Keep features in float16: half the room, no longer exact (about 1e-3).
    memory_mb : float
        Features kept in memory, in MB of 10^6 bytes; the rest is read from the disk.
    at_once : int
        Images whose frozen part is computed in one batch: quicker, and larger.
    below : PrefixCache, optional
        Of another model that begins with the same weights and has less frozen: what it
        keeps is gone on from, where it reaches less far. Ignored where it does not fit.

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
        self,
        model: nn.Module,
        half: bool = False,
        memory_mb: float = 1000,
        at_once: int = 1,
        below: PrefixCache | None = None,
    ) -> None:
        self.encoder, self.half, self.room = model, half, memory_mb * 1e6
        self.below = below
        self.at_once, self.made, self._held, self._left = at_once, 0, 0, 0
        self._matched: bool | None = None
        self._kept: dict[tuple, list[Tensor]] = {}
        self._seen: list[tuple[int, int]] = []

    def weights(self, start: int) -> str:
        """Fingerprint of all that is computed below ``start``, with a kept base."""
        base = frozen_base(self.encoder, start) is not None
        named = dict(self.encoder.named_parameters())
        named |= dict(self.encoder.named_buffers())
        numbers = zip(named, _stages_of(self.encoder, list(named)), strict=True)
        mine = {n for n, i in numbers if i < start + (base and not is_adapter(n))}
        below = {n: t for n, t in named.items() if n in mine}
        # Hashing takes longer than looking whether anybody wrote into a tensor.
        seen = [(id(t), t._version) for t in below.values()]
        if seen != self._seen:
            self._weights = total({n: tensor_hash(t) for n, t in below.items()})
            self._seen, self._kept, self._held, self._left = seen, {}, 0, 0
            self._below = below  # held, so that no other tensor gets one of their ids
        return self._weights

    def __call__(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> what the model gives."""
        start = first_trainable(self.encoder)
        if start == 0 or x.requires_grad:
            return self.encoder(x)
        rows = self.rows(x)
        # As the stages hand it on: numbers and speed depend on it.
        form = torch.channels_last if self._last() else torch.contiguous_format
        parts = ([t.to(x.dtype) for t in part] for part in zip(*rows, strict=True))
        kept = (torch.stack(part) for part in parts)
        y, *base = (
            t.to(x.device, memory_format=form if t.dim() == 4 else None) for t in kept
        )
        layer = frozen_base(self.encoder, start)
        if layer is None:
            return run(self.encoder, y, start)
        return run(self.encoder, branch_on(layer, y, *base), start + 1)

    def rows(self, x: Tensor) -> list[list[Tensor]]:
        """What is kept of each image of (N, 3, H, W): from memory, disk, or the model.

        Images that are nowhere yet are computed ``at_once`` together. Call it with
        large batches to encode a set before training.
        """
        start = first_trainable(self.encoder)
        kind = x.device.type
        mixed = torch.is_autocast_enabled(kind) and str(torch.get_autocast_dtype(kind))
        based = frozen_base(self.encoder, start) is not None
        same = (VERSION, self.weights(start), start, mixed, self.half, based)
        keys = [(*same, tensor_hash(image)) for image in x]
        made: dict[tuple, dict] = {}  # of this call, until each is on the disk

        def make(i: int) -> dict:
            if keys[i] not in made:
                left = [j for j in range(i, len(keys)) if keys[j] not in self._kept]
                left = left[: self.at_once]
                found = self._compute(x[left], start)
                made.update((keys[j], one) for j, one in zip(left, found, strict=True))
            self.made += 1
            return made.pop(keys[i])

        return [self._row(key, partial(make, i)) for i, key in enumerate(keys)]

    @torch.no_grad()
    def _compute(self, x: Tensor, start: int) -> list[dict]:
        layer, lower = frozen_base(self.encoder, start), self._lower(start)
        if lower:
            assert self.below is not None
            x = torch.stack([row[0].to(x.dtype) for row in self.below.rows(x)])
        y = [run(self.encoder, x, lower, start)]
        if layer is not None:
            y.append(layer._base(y[0], layer.weight, layer.bias))
        most = max(t.abs().max() for t in y)
        if self.half and most > torch.finfo(torch.float16).max:
            raise MedtutError("PrefixCache: features exceed float16; half=False.")
        # numpy has no bfloat16
        y = [t.cpu().float() if t.dtype == torch.bfloat16 else t.cpu() for t in y]
        y = [t.half() if self.half else t for t in y]
        names = ("x", "base")
        return [
            {n: t[i].numpy() for n, t in zip(names, y, strict=False)}
            for i in range(len(x))
        ]

    def _last(self) -> bool:
        """Whether the model works with channels last: TinyViT, or who asked for it."""
        maps = (p for p in self.encoder.parameters() if p.dim() == 4 and p.shape[2] > 1)
        asked = any(p.is_contiguous(memory_format=torch.channels_last) for p in maps)
        return hasattr(self.encoder, "layers") or asked

    def _lower(self, start: int) -> int:
        """Stages that `below` has done for this model; 0 if it cannot help."""
        if self.below is None:
            return 0
        done = first_trainable(self.below.encoder)
        if not 0 < done < start:
            return 0

        def hashes(model: nn.Module) -> dict[str, str]:
            named = [*model.named_parameters(), *model.named_buffers()]
            return {n: tensor_hash(t) for n, t in named if stage_of(model, n) < done}

        if self._matched is None:
            self._matched = hashes(self.encoder) == hashes(self.below.encoder)
        return done if self._matched else 0

    def _row(self, key: tuple, make: Callable[[], dict]) -> list[Tensor]:
        if key in self._kept:
            return self._kept[key]
        arrays = cached_arrays("prefix", key, make)
        row = [torch.from_numpy(arrays[n]) for n in ("x", "base") if n in arrays]
        if self._held + sum(t.nbytes for t in row) <= self.room:
            row = self._kept[key] = [self._keep(t) for t in row]
        return row

    def _keep(self, t: Tensor) -> Tensor:
        """A copy in a slab: thousands of small tensors would break up the heap."""
        if self._left < t.nbytes:
            self._left = max(t.nbytes, SLAB)
            self._slab = torch.empty(self._left, dtype=torch.uint8)
        start = len(self._slab) - self._left
        self._left -= -(-t.nbytes // 64) * 64  # whole lines, so that views are aligned
        self._held += t.nbytes
        place = self._slab[start : start + t.nbytes].view(t.dtype).view(t.shape)
        return place.copy_(t)
