"""VGG16 with torchvision's names, its weights, its adapters, and two younger nets.

Source: K. Simonyan, A. Zisserman, ICLR 2015 (arXiv 1409.1556), table 1, column D.
"""

from __future__ import annotations

import re
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn

from medtut.errors import MedtutError
from medtut.lora import Injection, LoRAConfig, LoRAError, adapted_layers, inject
from medtut.models.prefix import stage_of
from medtut.models.vgg_weights import load_features, to_input

__all__ = [
    "adapt", "build_other", "conv_blocks", "head_name", "initialise", "load_features",
    "output_spread", "to_input", "trunk", "vgg16",
]  # fmt: skip
WHERE = ("head", "linear", "conv", "both", "full")


def trunk(width: float = 1.0) -> nn.Sequential:
    """The 13 convolutions, ReLUs and 5 poolings; 14,714,688 parameters at width 1."""
    from torchvision.models.vgg import cfgs, make_layers

    return make_layers([c if c == "M" else max(1, round(c * width)) for c in cfgs["D"]])


class MeanMax(nn.Module):
    """Mean and maximum of every channel: (N, C, h, w) -> (N, 2 C)."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1)


def initialise(model: nn.Module, init: str = "he", seed: int = 0) -> nn.Module:
    """Draw all weights anew, in place, from a seed that disturbs no other.

    Parameters
    ----------
    model : nn.Module
    init : {"he", "torch"}
        "he": normal with variance 2 / fan_in, biases 0 (He et al. 2015, arXiv
        1502.01852, eq. 10), so that the signal keeps its size from layer to layer; the
        last layer 0.01 wide, as VGG's authors have it. "torch": PyTorch's default,
        uniform within 1 / sqrt(fan_in), which shrinks the signal by about sqrt(6) per
        layer with ReLU.
    seed : int
    """
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in layers:
            layer.reset_parameters() if init == "torch" else nn.init.zeros_(layer.bias)
            if init == "he":
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        if init == "he":
            nn.init.normal_(layers[-1].weight, 0, 0.01)
    return model


def vgg16(
    classes: int = 4,
    width: float = 1.0,
    hidden: int = 4096,
    dropout: float = 0.5,
    init: str = "he",
    seed: int = 0,
    head: str = "linears",
) -> nn.Module:
    """VGG16 as torchvision's class, with its names, for any input side from 32 on.

    Parameters
    ----------
    classes : int
    width : float
        Factor on the channels of all convolutions.
    hidden : int
        Width of the two linears below the last.
    dropout : float
    init : {"he", "torch"}
        See `initialise`.
    seed : int
    head : {"linears", "pooled"}
        "linears": 7 x 7 average pooling and the three linears, ``classifier.0``,
        ``.3`` and ``.6``. "pooled": mean and maximum of every channel's map,
        normalised, and one linear, ``classifier.2``, for when the two big ones have no
        trained weights.

    Returns
    -------
    torchvision.models.VGG
        Input (N, 3, H, W), output logits (N, classes). 138,357,544 parameters with
        1,000 classes, 134,276,932 with four. With ``torch.device("meta")`` as the
        default device it takes no memory.

    Raises
    ------
    MedtutError
        For an unknown ``init`` or ``head``.
    """
    from torchvision.models import VGG

    if init not in ("he", "torch") or head not in ("linears", "pooled"):
        raise MedtutError(f"vgg16: no init={init!r} with head={head!r}; see its help.")
    device = torch.get_default_device()
    with torch.device("meta"):  # nothing is drawn twice
        model = VGG(nn.Identity(), classes, init_weights=False, dropout=dropout)
        model.features = trunk(width)
        channels = model.features[-3].out_channels
        if head == "pooled":
            model.avgpool, channels = MeanMax(), 2 * channels
            norm = nn.LayerNorm(channels, elementwise_affine=False)
            top = (norm, nn.Dropout(dropout), nn.Linear(channels, classes))
            model.classifier = nn.Sequential(*top)
        else:
            model.classifier[0] = nn.Linear(channels * 49, hidden)
            model.classifier[3] = nn.Linear(hidden, hidden)
            model.classifier[6] = nn.Linear(hidden, classes)
    model.kind = "vgg16"
    return initialise(model.to_empty(device=device), init, seed)


def build_other(
    kind: str, classes: int = 4, norm: str = "frozen", seed: int = 0
) -> nn.Module:
    """A ResNet or DenseNet of torchvision, randomly initialised in its own way.

    Parameters
    ----------
    kind : str
        "resnet18", "densenet121" or a sister of theirs.
    classes : int
    norm : {"frozen", "running"}
        "frozen": every BatchNorm is a fixed scale and shift
        (``torchvision.ops.FrozenBatchNorm2d``), in training too: right over trained
        weights, and what a cache of the frozen part needs. "running": batch statistics
        in training, kept as running means, as without trained weights one needs.
    seed : int

    Raises
    ------
    MedtutError
        For a model torchvision does not have, or not of these two families.
    """
    from torchvision.models import get_model
    from torchvision.ops import FrozenBatchNorm2d

    if not re.fullmatch(r"(resnet|densenet)\d+ (frozen|running)", f"{kind} {norm}"):
        raise MedtutError(f"build_other: no {kind!r} with norm={norm!r}.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = get_model(kind, num_classes=classes)
    for name, m in list(model.named_modules()):
        if norm == "frozen" and isinstance(m, nn.BatchNorm2d):
            model.set_submodule(name, FrozenBatchNorm2d(m.num_features, m.eps))
    model.kind = kind
    return model


def conv_blocks(model: nn.Module) -> dict[str, int]:
    """Convolutions by name, with their block: 1 to 5, one for every halving of size.

    VGG's own five; in a ResNet or DenseNet 1 is the stem and 2 to 5 are ``layer1`` to
    ``layer4`` or ``denseblock1`` to ``denseblock4`` with what follows them.
    """
    found, block = {}, 1
    for name, m in model.named_modules():
        if isinstance(m, nn.Conv2d):
            hit = re.search(r"(?:layer|denseblock|transition)(\d)", name)
            found[name] = 1 + int(hit[1]) if hit else block
        block += isinstance(m, nn.MaxPool2d)
    return found


def head_name(model: nn.Module) -> str:
    """Name of the last linear layer, which makes the logits."""
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear)][-1]


def adapt(
    model: nn.Module,
    where: str = "linear",
    r: int = 8,
    alpha: float | None = None,
    variant: str = "lora",
    blocks: tuple[int, ...] = (1, 2, 3, 4, 5),
    **settings: object,
) -> Injection:
    """Choose what is trained, in place; everything else is frozen.

    Parameters
    ----------
    model : nn.Module
        Of `vgg16` or `build_other`.
    where : {"head", "linear", "conv", "both", "full"}
        The last linear alone; with it LoRA on the linears below it, on convolutions,
        or on both; or every weight, without adapters.
    r : int
    alpha : float, optional
        By default ``2 r``.
    variant : {"lora", "dora", "pissa"}
        PiSSA takes a full SVD of every adapted weight, minutes for ``classifier.0``.
    blocks : sequence of int
        Blocks (see `conv_blocks`) whose convolutions are adapted.
    **settings
        ``scaling``, ``dropout``, ``rank_pattern`` of `LoRAConfig`.

    Returns
    -------
    Injection
        The adapted layers, none for "head" and "full".

    Raises
    ------
    LoRAError
        For an unknown place, nothing to adapt there, a rank that does not fit, or
        adapters that are there already.

    Notes
    -----
    Per unit of rank the linears cost 37,376 parameters and the 13 convolutions 37,659;
    at r = 8 that is 299,008 and 301,272, and 16,388 for the head. Dropout below the
    first layer that learns is switched off (p = 0), so that what is frozen always gives
    the same features.
    """
    if where not in WHERE:
        raise LoRAError(f"adapt: where={where!r} is none of {', '.join(WHERE)}.")
    if adapted_layers(model):
        raise LoRAError("adapt: there are adapters already; medtut.lora.eject(model).")
    head = head_name(model)
    convs, linears = where in ("conv", "both"), where in ("linear", "both")
    names = [n for n, b in conv_blocks(model).items() if convs and b in blocks]
    both = model.named_modules() if linears else ()
    names += [n for n, m in both if isinstance(m, nn.Linear) and n != head]
    if not names and where not in ("head", "full"):
        raise LoRAError(f"adapt: this model has no {where} layer to adapt in {blocks}.")
    model.requires_grad_(True)
    injection = Injection({})
    if names:
        pattern = tuple(f"^{re.escape(n)}$" for n in names)
        settings = {"variant": variant, "pattern": pattern, **settings}
        config = LoRAConfig(r, alpha or 2 * r, **settings)
        injection = inject(model, config, keep=f"^{re.escape(head)}\\.")
    elif where == "head":
        model.requires_grad_(False).get_submodule(head).requires_grad_(True)
    live = [stage_of(model, n) for n, p in model.named_parameters() if p.requires_grad]
    for name, m in model.named_modules():
        if isinstance(m, nn.Dropout) and stage_of(model, name) < min(live):
            m.p = 0.0
    return injection


@torch.no_grad()
def output_spread(model: nn.Module, batch: Tensor) -> list[tuple[str, float]]:
    """Will it train? How much the outputs depend on the input, stage by stage.

    Parameters
    ----------
    model : nn.Module
        Any; put into evaluation mode for the call.
    batch : Tensor, (N, 3, H, W)
        At least two different inputs; random ones will do.

    Returns
    -------
    list of (name, float)
        After every pooling, block and linear layer, in the order they run: standard
        deviation over the inputs, averaged over the units. Where it falls to nothing
        every input gets the same answer, and so nearly the same gradient.
    """
    found: list[tuple[str, float]] = []

    def note(name: str, _module: nn.Module, _args: tuple, y: Tensor) -> None:
        found.append((name, float(y.double().std(0).mean())))

    modes = {m: m.training for m in model.modules()}
    model.eval()
    with ExitStack() as hooks:
        for name, m in model.named_modules():
            block = re.fullmatch(r"layer\d|features\.denseblock\d", name)
            if block or isinstance(m, (nn.MaxPool2d, nn.Linear)):
                hooks.enter_context(m.register_forward_hook(partial(note, name)))
        hooks.callback(lambda: [setattr(m, "training", v) for m, v in modes.items()])
        model(batch)
    return found
