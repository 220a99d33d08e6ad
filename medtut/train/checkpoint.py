"""What is kept of a run so that it can go on: written whole or not at all.

Only what changes is saved: trained tensors, buffers, optimizer, random states, the best
weights so far. The frozen base is not written again; its hash is, so that a run never
goes on with adapters on top of another base.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from medtut.files import renamed
from medtut.train.config import FREE_ON_RESUME, TrainConfig, TrainError

VERSION = 1


def changing(model: nn.Module) -> dict[str, Tensor]:
    """Return the trained parameters and the stored buffers, by name; not copies."""
    tensors = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    stored = model.state_dict(keep_vars=True)
    buffers = {n: b for n, b in model.named_buffers() if n in stored}
    return {**tensors, **buffers}


def copy_of(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of the changing tensors on the CPU, apart from the model's own."""
    return {n: t.detach().to("cpu", copy=True) for n, t in changing(model).items()}


@torch.no_grad()
def put_back(model: nn.Module, saved: Mapping[str, Tensor], where: str) -> None:
    """Copy saved tensors into the model.

    Raises
    ------
    TrainError
        If names or shapes differ; the model is then unchanged.
    """
    here = changing(model)
    now, then = ({n: tuple(t.shape) for n, t in ts.items()} for ts in (here, saved))
    for name in sorted(now.keys() | then.keys()):
        if now.get(name) != then.get(name):
            raise TrainError(
                f"{where} does not fit the model: '{name}' has shape {now.get(name)} "
                f"in the model and {then.get(name)} in the checkpoint. Build the model "
                "as it was, or start over with resume=False."
            )
    for name, tensor in saved.items():
        here[name].copy_(tensor)


def base_hash(model: nn.Module) -> str:
    """Return the sha256 of the frozen parameters: names, types, shapes and bytes."""
    total = hashlib.sha256()
    for name, p in sorted(model.named_parameters()):
        if p.requires_grad:
            continue
        total.update(f"{name} {p.dtype} {tuple(p.shape)}\n".encode())
        data = p.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        total.update(data.numpy())
    return total.hexdigest()


def random_state() -> dict[str, Any]:
    """Return the state of every generator, as values torch.load takes safely."""
    kind, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [kind, keys.tolist(), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Put generators back to where `random_state` found them."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count() and state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


def write(path: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint beside its name, then rename it over the last one.

    Raises
    ------
    TrainError
        If it cannot be written; the last checkpoint is still there.
    """
    with renamed(path, TrainError) as partial, open(partial, "wb") as file:
        torch.save({"version": VERSION, **state}, file)
        file.flush()
        os.fsync(file.fileno())


def read(path: Path, config: TrainConfig, size: int, base: str) -> dict[str, Any]:
    """Read a checkpoint and refuse it if it belongs to another run.

    Parameters
    ----------
    path : Path
    config : TrainConfig
        Of the run that wants to go on.
    size : int
        Samples in its data set.
    base : str
        `base_hash` of its model.

    Raises
    ------
    TrainError
        Saying what differs.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["version"] != VERSION:
            raise ValueError(f"its format is {state['version']}, not {VERSION}")
    except Exception as error:
        raise TrainError(
            f"The checkpoint {path} cannot be read ({error}). Remove it, or start over "
            "with resume=False."
        ) from error
    now, then = config.to_dict(), state["config"]
    free = set(FREE_ON_RESUME)
    if config.schedule == "constant":
        free.add("steps")  # only then does the past not depend on the length
    changed = [
        f"{k} was {then.get(k)!r} and is {now[k]!r}"
        for k in now
        if k not in free and now[k] != then.get(k)
    ]
    if state["samples"] != size:
        changed.append(f"the data set had {state['samples']} samples and has {size}")
    if state["base"] != base:
        changed.append("the frozen weights of the model are others")
    if changed:
        raise TrainError(
            f"{path} belongs to another run: {'; '.join(changed)}. Use the same "
            "settings, another out folder, or resume=False to start over."
        )
    return state


def clean(folder: Path, path: Path) -> None:
    """Remove what killed runs left half written."""
    for partial in folder.glob(f".{path.name}.*.partial"):
        partial.unlink(missing_ok=True)
