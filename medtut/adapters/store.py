"""What was trained, as one safetensors file without the base.

:func:`medtut.lora.save_adapter` writes LoRA in peft's layout; this holds any method of
:mod:`medtut.adapters`, with its head and, if they train, decoder and bottleneck.
"""

from __future__ import annotations

import json
from pathlib import Path

from torch import nn

from medtut.adapters.parts import AdapterError, find_parts
from medtut.adapters.policy import Adaptation, adapt
from medtut.files import renamed
from medtut.lora.fingerprint import base_tensors, check_base, fingerprint


def save_adaptation(model: nn.Module, done: Adaptation, file: str | Path) -> Path:
    """Write the trained tensors, the head and running statistics, by rename.

    Parameters
    ----------
    model : nn.Module
        Adapted by :func:`medtut.adapters.adapt`, which returned ``done``.
    file : path
        Usually ``*.safetensors``. Its metadata hold the method, its settings and the
        hash of every frozen tensor of the base.

    Raises
    ------
    AdapterError
        If the file cannot be written.
    """
    from safetensors.torch import save_file

    keep = set(done.trainable)
    keep |= {n for n, _ in model.named_parameters() if done.parts.of(n) == "head"}
    # Not the tables of window positions: they are whole numbers, and never change.
    buffers = model.named_buffers()
    keep |= {n for n, b in buffers if b.is_floating_point() or not b.dim()}
    state = model.state_dict().items()
    tensors = {n: t.cpu().contiguous() for n, t in state if n in keep}
    hashes = {n: h for n, h in fingerprint(model).items() if n not in keep}
    record = {"method": done.method, "settings": done.settings, "base": hashes}
    record["parts"] = {"head": done.parts.head, "decoder": done.parts.decoder}
    with renamed(file, AdapterError) as partial:
        save_file(tensors, partial, {"medtut_adaptation": json.dumps(record)})
    return Path(file)


def load_adaptation(
    model: nn.Module, file: str | Path, *, allow_other_base: bool = False
) -> Adaptation:
    """Adapt a bare base model as a saved one was, and fill in what was trained.

    Parameters
    ----------
    model : nn.Module
        The base, not adapted.
    file : path
        From :func:`save_adaptation`.
    allow_other_base : bool
        Attach even where frozen weights differ from those it was trained on.

    Raises
    ------
    AdapterError or medtut.lora.LoRAError
        If the file is damaged or of another kind, or belongs to another base or
        architecture.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
            record = json.loads((opened.metadata() or {})["medtut_adaptation"])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise AdapterError(f"{file} is missing, damaged or foreign: {error}") from error
    have = base_tensors(model) if allow_other_base else {}
    base = {n: h for n, h in record["base"].items() if n not in have}
    check_base(model, base, str(file))
    parts = find_parts(model, **record["parts"])
    done = adapt(model, record["method"], parts=parts, **record["settings"])
    shapes = {name: t.shape for name, t in model.state_dict().items()}
    for name, t in tensors.items():
        if shapes.get(name) != t.shape:
            raise AdapterError(f"{file}: {name} has no place in this architecture")
    model.load_state_dict(tensors, strict=False)
    return done
