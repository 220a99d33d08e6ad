"""Trained weights of `medtut.models.vgg`, and the inputs they were trained on."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor, nn

from medtut.data.assets import fetch, offline
from medtut.errors import MedtutError
from medtut.models.medclip_io import _load_pickle

# Mean and spread of the three channels in the order the net reads them; what they are
# applied to has been multiplied by the first number.
CONVENTIONS = {
    "keras": (255.0, (103.939, 116.779, 123.68), (1.0, 1.0, 1.0)),  # blue first
    "torchvision": (1.0, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # red first
}
ASSET = "vgg16-imagenet-conv"


def to_input(grey: Tensor, convention: str | nn.Module) -> Tensor:
    """Turn grey pictures into what a network reads.

    Parameters
    ----------
    grey : Tensor or array, (N, H, W), floating point in [0, 1]
    convention : {"keras", "torchvision"} or nn.Module
        Or a model that `load_features` filled. "keras": blue, green, red from 0 to
        255 minus their means. "torchvision": red, green, blue from 0 to 1, minus mean,
        over standard deviation.

    Returns
    -------
    Tensor, (N, 3, H, W), float32

    Raises
    ------
    MedtutError
        For another shape, range or convention.
    """
    name = getattr(convention, "convention", convention)
    if name not in CONVENTIONS:
        raise MedtutError(f"to_input: convention {name!r} is none of {[*CONVENTIONS]}.")
    grey = torch.as_tensor(grey)
    inside = grey.min() >= -1e-3 and grey.max() <= 1.001
    if grey.dim() != 3 or not grey.is_floating_point() or not inside:
        raise MedtutError(
            f"to_input: expected (N, H, W) in [0, 1], got {tuple(grey.shape)} of "
            f"{grey.dtype} from {grey.min():g} to {grey.max():g}; divide bytes by 255."
        )
    scale, mean, std = CONVENTIONS[name]
    mean, std = (grey.new_tensor(v).float().view(3, 1, 1) for v in (mean, std))
    return (scale * grey.float()[:, None] - mean) / std


def check_input(conv: nn.Module, args: tuple[Tensor, ...]) -> None:
    """Forward pre-hook of the first convolution: refuse the other colour convention.

    A prepared picture reaches beyond 10 under Keras' convention (its black is -104)
    and stays below 3 under torchvision's.
    """
    x = args[0].detach()
    if x.is_meta or not x.any() or (x.abs().max() > 10) == (conv.convention == "keras"):
        return
    raise MedtutError(
        f"The weights expect inputs as in {conv.convention!r}, these lie between "
        f"{x.min():.3g} and {x.max():.3g}: make them with to_input(grey, model)."
    )


def _from_file(path: Path, model: nn.Module) -> dict[str, Tensor]:
    """Tensors of a file by torchvision's names; Keras calls them ``blockB_convI``."""
    if path.suffix not in (".onnx", ".safetensors"):
        return _load_pickle(path)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        import onnx

        graph = onnx.load(str(path), load_external_data=False).graph
        stored = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    except Exception as error:  # of many kinds, by what is wrong with the file
        raise MedtutError(
            f"{path} cannot be read ({str(error)[:80]}). It is missing, cut short or "
            "another kind of file; fetch it again."
        ) from error
    numbers = ((b, i) for b, n in enumerate((2, 2, 3, 3, 3), 1) for i in range(n))
    keys = [f"block{b}_conv{i + 1}" for b, i in numbers]
    convs = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    names, state = dict(zip(keys, convs, strict=False)), {}
    for key, array in stored.items():
        hit = re.search(r"block\d_conv\d", key)
        if hit and hit[0] in names:
            part = "weight" if array.ndim == 4 else "bias"
            state[f"{names[hit[0]]}.{part}"] = torch.from_numpy(array.copy())
    return state


def _from_torchvision(kind: str) -> dict[str, Tensor]:
    """ImageNet weights as torchvision fetches, checks and keeps them."""
    from torchvision.models import get_model, get_model_weights

    kept = Path(get_model_weights(kind).IMAGENET1K_V1.url).name
    try:
        if offline() and not Path(torch.hub.get_dir(), "checkpoints", kept).is_file():
            raise OSError("MEDTUT_OFFLINE is set")
        return get_model(kind, weights="IMAGENET1K_V1").state_dict()
    except (OSError, RuntimeError) as error:  # no network; a wrong hash
        raise MedtutError(
            f"torchvision's weights of {kind} could not be fetched ({error}). Without "
            "a network use source='asset' or a file."
        ) from error


def load_features(
    model: nn.Module, source: str | Path = "asset", convention: str | None = None
) -> str:
    """Fill the trunk of a model with trained weights, in place.

    Parameters
    ----------
    model : nn.Module
        Of `vgg16` or `build_other`.
    source : {"asset", "torchvision"} or path
        "asset": the ImageNet convolutions of Keras' VGG16 in the course's cache (the
        stored numbers are read, the graph is never run, its head is dropped).
        "torchvision": ImageNet weights through torchvision's loader, with the two big
        linears; needs the network once. A path: ``.onnx`` with Keras' names, or a state
        dict in torchvision's names, ``.safetensors`` or opened with
        ``weights_only=True``.
    convention : {"keras", "torchvision"}, optional
        Overrules what the source implies, for a file in one's names with the other's
        weights.

    Returns
    -------
    str
        The colour convention, which `to_input` needs. It is also ``model.convention``,
        and the first convolution then refuses inputs of the other one.
        ``model.loaded`` names the tensors that were filled: all below the classifier
        (or ``fc``), and those of the classifier that the source has with the same
        shape.

    Raises
    ------
    MedtutError
        If the source cannot be read, lacks a tensor of the trunk, or has another shape
        there, or numbers that are not finite. The model is then unchanged.
    """
    if source == "torchvision":
        state, where = _from_torchvision(model.kind), "torchvision's IMAGENET1K_V1"
    else:
        where = Path(fetch(ASSET)["onnx"] if source == "asset" else source)
        state = _from_file(where, model)
    keras = source != "torchvision" and where.suffix == ".onnx"
    own, convention = model.state_dict(), convention or ("torchvision", "keras")[keras]
    if convention not in CONVENTIONS:
        raise MedtutError(f"load_features: {convention!r} is none of {[*CONVENTIONS]}.")
    fits = [k for k in own if k in state and state[k].shape == own[k].shape]
    top = ("classifier.", "fc.")
    if wrong := [k for k in own if k not in fits and not k.startswith(top)]:
        theirs = tuple(state[wrong[0]].shape) if wrong[0] in state else "nothing"
        raise MedtutError(
            f"{where} does not fit this {model.kind}: for {wrong[0]} it has {theirs}, "
            f"the model {tuple(own[wrong[0]].shape)} ({len(wrong)} such tensors)."
        )
    if broken := [k for k in fits if not state[k].isfinite().all()]:
        raise MedtutError(f"{where}: {broken[0]} holds numbers that are not finite.")
    model.load_state_dict({k: state[k] for k in fits}, strict=False)
    model.loaded, model.convention = tuple(fits), convention
    first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    first.convention = convention
    if check_input not in first._forward_pre_hooks.values():
        first.register_forward_pre_hook(check_input)
    return convention
