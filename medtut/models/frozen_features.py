"""The last feature map of a frozen network, computed once and kept on disk.

Black-box adaptation (a linear probe, a spatial adapter) never changes what comes before
its head. Upstream runs the frozen network again in every step all the same; here its
last feature map is computed once per volume and read, memory-mapped, from the one cache
of the course.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from medtut.data.cache import cached_file
from medtut.lora.fingerprint import tensor_hash

VERSION = 1  # part of every key: raise it when what is stored changes


def last_features(
    model: nn.Module, volume: Tensor, roi: Sequence[int] | None = None,
    overlap: float = 0.25,
) -> Tensor:  # fmt: skip
    """What the head of a network gets: ``model.features``, in eval mode, no gradient.

    Parameters
    ----------
    model : network with ``features`` of (1, 1, X, Y, Z), such as
        `medtut.models.swin_unetr.SwinUNETR`
    volume : (1, X, Y, Z)
    roi : three sizes, optional
        Go over the volume in windows and blend with Gaussian weights that sum to 1. A
        1×1×1 convolution on the blend is the blend of its outputs, so a linear probe
        on these features equals sliding-window inference of the whole network.
    overlap : of two windows.

    Returns
    -------
    (C, X, Y, Z) float32, on the CPU
    """
    from monai.inferers import sliding_window_inference

    run: Any = model.features
    device, training = next(model.parameters()).device, model.training
    model.eval()
    with torch.no_grad():
        x = volume[None].to(device)
        if roi is None:
            x = run(x)
        else:
            x = sliding_window_inference(x, roi, 1, run, overlap, "gaussian")
    model.train(training)
    return x[0].float().cpu()


def cached_features(
    model: nn.Module, volumes: Sequence[np.ndarray], key: Any = None,
    roi: Sequence[int] | None = None, overlap: float = 0.25, dtype: str = "float16",
) -> list[np.ndarray]:  # fmt: skip
    """Return `last_features` of every volume, computed once per network and volume.

    An entry's name holds the sha256 of the volume and of every weight and buffer but
    those of ``classifier``, so it is never that of another network or preprocessing,
    and another head needs no new one.

    Parameters
    ----------
    volumes : (1, X, Y, Z) float32 each
    key : JSON-able
        What weights and volume do not show, such as a changed ``forward``.
    roi, overlap : see `last_features`.
    dtype : "float16", or "float32" to keep every bit
        Half of the disk; 11 bits, so a value is off by at most 2⁻¹¹ of itself (values
        below 6e-5 by at most 3e-8). What is beyond ±65,504 is cut to it.

    Returns
    -------
    list of (C, X, Y, Z) memory-mapped arrays, read-only
    """
    state = model.state_dict().items()
    weights = {k: tensor_hash(v) for k, v in state if not k.startswith("classifier.")}
    network = [VERSION, type(model).__qualname__, weights]
    found = []
    for volume in volumes:
        given = torch.from_numpy(np.ascontiguousarray(volume, np.float32))
        how = [tensor_hash(given), list(roi or ()), overlap, dtype, key]

        def write(path: Path, given: Tensor = given) -> None:
            values, limits = last_features(model, given, roi, overlap), np.finfo(dtype)
            np.save(path, values.numpy().clip(limits.min, limits.max).astype(dtype))

        path = cached_file("frozen_features", [network, how], write, ".npy")
        found.append(np.load(path, mmap_mode="r"))
    return found
