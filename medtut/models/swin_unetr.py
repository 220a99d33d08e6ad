"""Swin UNETR for few-shot adaptation: MONAI's blocks, a plain head, saved small.

The network of Hatamizadeh et al., arXiv 2201.01266, as FSEFT (arXiv 2303.17051) adapts
it: regions of 96^3 voxels, feature size 48, depths 2-2-2-2, heads 3-6-12-24, windows of
7^3 tokens, patches of 2^3 voxels, biases in qkv, instance norm without parameters, and
a head of one 1 x 1 x 1 convolution called ``classifier``. The layers are MONAI's and
keep MONAI's names, position tables included, so published weights fit. Only the way
through the decoder is written here, because the map before the head has to be
reachable: all black-box methods live on it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medtut.data.cache import write_by_rename
from medtut.errors import MedtutError

# Where each child belongs, by how its name begins; "encoder" are MONAI's convolutions.
PARTS = {"swinViT": "swinViT", "encoder": "bottleneck-and-skips", "down_tr": "encoder"}
PARTS |= {"decoder": "decoder", "up_tr": "decoder", "classifier": "classifier"}
SWIN: dict[str, Any] = {"depths": (2, 2, 2, 2), "num_heads": (3, 6, 12, 24)}
SWIN |= {"patch_size": 2, "qkv_bias": True, "norm_name": "instance"}
META = ("config", "facts")  # of a saved file
COMPUTED = "relative_position_index"  # follows from the window, 7.5 MB of integers


def check_roi(shape: Sequence[int], what: str = "SwinUNETR", step: int = 32) -> None:
    """Refuse a region that a network cannot take, before it crashes half way.

    Parameters
    ----------
    shape : sequence of int
        (N, 1, X, Y, Z) of a batch, or (X, Y, Z) of one region, in voxels.
    what : str
        For the message.
    step : int
        Voxels per voxel of the deepest map, along each axis.

    Raises
    ------
    MedtutError
        For other axes or channels, a side that is no multiple of `step`, or a region
        with a single voxel in the deepest map, which has no spread to divide by:
        MONAI's instance norm fails there, in training and in ``eval``.
    """
    batch, sides = shape[:-3], list(shape[-3:])
    if len(shape) not in (3, 5) or (batch and batch[1] != 1):
        why = "add the axes of batch and channel with volume[None, None]"
        raise MedtutError(f"{what}: {tuple(shape)} is not (N, 1, X, Y, Z); {why}.")
    fit = [max(1, -(-side // step)) * step for side in sides]
    fit[2] *= 2 if fit == [step] * 3 else 1
    if fit != sides:
        raise MedtutError(
            f"{what} takes sides of a multiple of {step} voxels, and no {step}^3 (one "
            f"deep voxel has no spread), not {sides}; pad or crop to {fit}."
        )


class SwinUNETR(nn.Module):
    """MONAI's Swin UNETR with a head called ``classifier`` and its features in reach.

    Parameters
    ----------
    feature_size : int
        Channels of the features; a multiple of 12. 48 as published, 12 here.
    out_channels : int
    use_checkpoint : bool
        Compute the transformer blocks twice instead of keeping their activations.
    window_size : int
        Tokens along a side of the attention's window. 7 as published; the course's own
        weights have 4: with heads of four channels a window of 343 tokens takes most
        of a step on a CPU, and one of 64 a sixth of it.

    Attributes
    ----------
    config : dict
        feature_size, out_channels, window_size.
    facts : dict
        What the outputs mean, if it is known: ``structures``, ``spacing`` (mm), ``hu``
        (window), and notes. From `load_swin_unetr`.

    Raises
    ------
    MedtutError
        For a feature size that is no multiple of 12, or no channels.
    """

    def __init__(
        self,
        feature_size: int = 48,
        out_channels: int = 29,
        *,
        use_checkpoint: bool = False,
        window_size: int = 7,
    ) -> None:
        super().__init__()
        if feature_size < 12 or feature_size % 12 or min(out_channels, window_size) < 1:
            raise MedtutError(
                f"SwinUNETR: feature_size={feature_size} must be a multiple of 12, "
                f"out_channels={out_channels} and window_size={window_size} at least 1."
            )
        from monai.networks.nets import SwinUNETR as Published

        self.config = {"feature_size": feature_size, "out_channels": out_channels}
        self.config |= {"window_size": window_size}
        self.facts: dict[str, Any] = {}
        net = Published(1, use_checkpoint=use_checkpoint, **self.config, **SWIN)
        self._modules.update(net._modules)  # under the names they have in MONAI,
        self.classifier = self._modules.pop("out").conv.conv  # but for the head

    def features(self, x: Tensor) -> Tensor:
        """The map that the head reads.

        Parameters
        ----------
        x : Tensor, (N, 1, X, Y, Z), float
            HU -175 to 250 as 0 to 1; sides of a multiple of 32 voxels.

        Returns
        -------
        Tensor, (N, feature_size, X, Y, Z)

        Raises
        ------
        MedtutError
            See `check_roi`.
        """
        check_roi(x.shape)
        maps = self.swinViT(x, True)
        skips = [self.encoder1(x), self.encoder2(maps[0]), self.encoder3(maps[1])]
        skips += [self.encoder4(maps[2]), maps[3]]
        y = self.encoder10(maps[4])
        for level in (5, 4, 3, 2, 1):
            y = getattr(self, f"decoder{level}")(y, skips[level - 1])
        return y

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, out_channels, X, Y, Z)."""
        return self.classifier(self.features(x))


def build_swin_unetr(
    feature_size: int = 48, out_channels: int = 29, *, seed: int = 0, **options: Any
) -> SwinUNETR:
    """A Swin UNETR with random weights of a given seed.

    Parameters
    ----------
    feature_size, out_channels : int
        48 and 29 as published: 62,188,031 parameters. The course's own has 12 and 29,
        and windows of 4.
    seed : int
    **options
        use_checkpoint, window_size of `SwinUNETR`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SwinUNETR(feature_size, out_channels, **options)


def features(model: nn.Module, x: Tensor) -> Tensor:
    """The map before the classifier, (N, feature, X, Y, Z), to be computed once.

    ``model.classifier(features(model, x))`` is ``model(x)``, to the bit.
    """
    return model.features(x)


def parts(model: nn.Module) -> dict[str, int]:
    """Number of parameters by part of the network; every one is in exactly one part.

    At feature size 48 with 29 outputs: swinViT 8,062,002, bottleneck-and-skips
    34,526,784 (MONAI's encoder1, 2, 3, 4 and 10, which are convolutions), decoder
    19,597,824, classifier 1,421. A child that `PARTS` does not know counts under its
    own name.
    """
    counts: dict[str, int] = {}
    for name, child in model.named_children():
        part = next((p for word, p in PARTS.items() if name.startswith(word)), name)
        size = sum(p.numel() for p in child.parameters())
        counts[part] = counts.get(part, 0) + size
    return counts


def save_swin_unetr(
    model: SwinUNETR,
    path: Path | str,
    structures: Sequence[str],
    spacing: float,
    hu: tuple[float, float] = (-175.0, 250.0),
    **note: Any,
) -> Path:
    """Write a model as float16 safetensors, with what its outputs mean as metadata.

    Parameters
    ----------
    model : SwinUNETR
    path : path
    structures : sequence of str
        Name of each output.
    spacing : float
        Of the voxels it was trained on, mm.
    hu : (low, high)
        What became 0 and 1.
    **note
        More facts that JSON can hold: the command, seed, steps, scores.

    Raises
    ------
    MedtutError
        If there are more or fewer names than outputs, the model has parameters of its
        own (adapters), or a number is not finite in float16; nothing is written.
    """
    from safetensors.torch import save_file

    plain = SwinUNETR(**model.config).state_dict()
    state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    state = {k: v.half() for k, v in state.items() if COMPUTED not in k}
    odd = sorted(state.keys() ^ {k for k in plain if COMPUTED not in k})
    names, outputs = len(structures), model.config["out_channels"]
    bad = [] if names == outputs else [f"{names} structures for {outputs} outputs"]
    bad += [f"{k} is not as in a plain Swin UNETR (an adapter's?)" for k in odd]
    bad += [
        f"{k} is not finite in float16"
        for k, v in state.items()
        if not v.isfinite().all()
    ]
    if bad:
        raise MedtutError(f"{path} not written: {bad[0]}.")
    facts = {"structures": [*structures], "spacing": spacing, "hu": [*hu], **note}
    meta = dict(zip(META, map(json.dumps, (model.config, facts)), strict=True))
    return write_by_rename(Path(path), lambda p: save_file(state, p, meta))


def load_swin_unetr(path: Path | str, **options: Any) -> SwinUNETR:
    """A model that `save_swin_unetr` wrote, in float32 and for use (``eval``).

    Parameters
    ----------
    path : path
    **options
        ``use_checkpoint``.

    Returns
    -------
    SwinUNETR
        With ``model.facts``: structures, spacing, hu and the notes.

    Raises
    ------
    MedtutError
        If the file is missing, damaged, or holds another kind of model.
    """
    from safetensors import safe_open

    try:
        with safe_open(path, "pt") as file:
            config, facts = (
                json.loads(file.metadata()[k]) for k in ("config", "facts")
            )
            state = {k: file.get_tensor(k).float() for k in file.keys()}  # noqa: SIM118
        model = build_swin_unetr(**config, **options)
        state |= {k: v for k, v in model.state_dict().items() if COMPUTED in k}
        model.load_state_dict(state)
        model.facts = facts | {"structures": tuple(facts["structures"])}
    except Exception as error:  # of many kinds, by what is wrong with the file
        raise MedtutError(
            f"{path} cannot be read as a Swin UNETR of this course "
            f"({str(error)[:120]}). It is missing, damaged, or another model; fetch or "
            "make it again."
        ) from error
    return model.eval()
