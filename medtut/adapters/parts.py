"""Head, decoder, bottleneck and backbone of a segmentation network, by structure.

Names differ between libraries, so the parts are found by what they do: the head is the
last convolution, with kernel 1; the decoder is what upsamples and never downsamples;
the backbone is what holds the attention blocks; the rest (Swin UNETR's convolution
blocks between the two) is the bottleneck. A network without attention has no
bottleneck of its own: all that is neither decoder nor head is its backbone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.pooling import _AvgPoolNd, _MaxPoolNd

from medtut.errors import MedtutError
from medtut.lora.roles import Candidate, scan

ATTENTION = frozenset({"query", "key", "value", "output"})


class AdapterError(MedtutError):
    """An adapter that does not fit the model or the settings."""


def below(name: str, prefix: str) -> bool:
    """Whether a dotted name is ``prefix`` or lies under it."""
    return not prefix or name == prefix or name.startswith(f"{prefix}.")


@dataclass(frozen=True)
class Parts:
    """Module names: one head, the units of the decoder, the root of the backbone.

    ``backbone`` is "" when everything but head and decoder belongs to it.
    """

    head: str
    decoder: tuple[str, ...] = ()
    backbone: str = ""

    def of(self, name: str) -> str:
        """Where a name lies: "head", "decoder", "bottleneck" or "backbone"."""
        if below(name, self.head):
            return "head"
        if any(below(name, unit) for unit in self.decoder):
            return "decoder"
        return "backbone" if below(name, self.backbone) else "bottleneck"

    def layers(self, model: nn.Module) -> list[Candidate]:
        """The backbone's layers that can be adapted, with their roles."""
        return [c for c in scan(model) if self.of(c.name) == "backbone"]


UP = (_ConvTransposeNd, nn.Upsample, nn.PixelShuffle)


def _downsamples(module: nn.Module) -> bool:
    if isinstance(module, _ConvNd) and not isinstance(module, UP):
        return max(module.stride) > 1
    return isinstance(module, (_MaxPoolNd, _AvgPoolNd))


def _decoder_units(module: nn.Module, head: str, name: str = "") -> Iterator[str]:
    """The largest modules that upsample, do not downsample and hold no head."""
    if not any(isinstance(m, UP) for m in module.modules()):
        return
    if not below(head, name) and not any(map(_downsamples, module.modules())):
        yield name
        return
    for child_name, child in module.named_children():
        yield from _decoder_units(child, head, f"{name}.{child_name}".lstrip("."))


def find_parts(
    model: nn.Module, *, head: str | None = None, decoder: Sequence[str] | None = None
) -> Parts:
    """Find the parts of a segmentation network.

    Parameters
    ----------
    model : nn.Module
        Without adapters; any device, also "meta".
    head : str, optional
        Name of the last convolution, where it cannot be told.
    decoder : sequence of str, optional
        Names of the decoder's modules, where they cannot be told (a network that
        upsamples by ``F.interpolate``, say).

    Raises
    ------
    AdapterError
        If there is no head of kernel 1, or a given name does not exist.
    """
    modules = dict(model.named_modules())
    convs = ["", *(n for n, m in modules.items() if isinstance(m, _ConvNd))]
    head = convs[-1] if head is None else head
    units = tuple(_decoder_units(model, head) if decoder is None else decoder)
    for name in (head, *units):
        if name not in modules:
            raise AdapterError(f"the model has no module {name!r}; see named_modules()")
    last = modules[head]
    plain = isinstance(last, _ConvNd) and not isinstance(last, UP)
    if not plain or max(*last.kernel_size, *last.stride, last.groups) > 1:
        raise AdapterError(
            f"{head!r} of {type(model).__name__} is no plain convolution of kernel 1, "
            "as a head is; name the head with find_parts(model, head=...)"
        )
    found = Parts(head, units)
    words = [c.name.split(".") for c in found.layers(model) if c.roles & ATTENTION]
    same = takewhile(lambda at: len(set(at)) == 1, zip(*words, strict=False))
    return replace(found, backbone=".".join(at[0] for at in same))
