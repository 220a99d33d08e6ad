"""Adapters on disk, in the layout of Hugging Face peft.

A folder holds ``adapter_model.safetensors`` and ``adapter_config.json``, which peft's
``PeftModel.from_pretrained`` reads, and ``medtut_base.json``, which peft ignores: the
fingerprint of the base weights, and how our layers were built.

Some of our layers have no equal in peft; each is written as an exactly equal peft
adapter, and built up again from it when *we* load it:

* parts of a fused projection: one adapter of rank ``parts * r`` on the whole layer,
  ``A`` stacked, ``B`` block by block in the rows of its part;
* PiSSA: LoRA of rank ``2 r`` with ``[A; A0]`` and ``[B, -B0]``, which fits the
  original weight (peft's own conversion does the same);
* grouped convolutions: rank ``groups * r`` with a block-diagonal ``A``;
* ``nn.MultiheadAttention``: peft always adapts input and output projection with one
  rank, so the smaller one is padded with zeros.

Limits of peft 0.21, not of the files: it cannot run convolutions with dilation (its
``A`` has none), and it adds the update of a MultiheadAttention's output projection
twice (huggingface/peft, pull request 3774), so there its outputs differ from ours. A
MultiheadAttention with separate q/k/v projections has no place in the layout.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import warnings
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from medtut.files import renamed
from medtut.lora.attention import LoRAMultiheadAttention
from medtut.lora.conv import _LoRAConv, block_diagonal
from medtut.lora.core import LoRAError, LoRALayer
from medtut.lora.fingerprint import fingerprint, total
from medtut.lora.inject import _require, is_adapter
from medtut.lora.layers import LoRAFusedLinear

PREFIX = "base_model.model."
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
BASE = "medtut_base.json"


# -- our layers as peft tensors ------------------------------------------------
def _attention_tensors(layer: LoRAMultiheadAttention) -> dict[str, Tensor]:
    if not layer._qkv_same_embed_dim:
        raise LoRAError(
            "an nn.MultiheadAttention with separate q/k/v projections (kdim or vdim "
            "given) has no place in peft's adapter layout and cannot be saved."
        )
    d, slots = layer.embed_dim, layer.slots()
    output = [slot for slot in slots if slot.part == "output"]
    chosen = {
        "": [slot for slot in slots if slot.part != "output"],
        "base_layer.out_proj.": output,
    }
    one = len(slots[0].pair()[0])
    rank = one * max(map(len, chosen.values()))
    tensors = {}
    for place, own in chosen.items():
        rows = d if own is output else 3 * d
        A, B = slots[0].A.new_zeros(rank, d), slots[0].A.new_zeros(rows, rank)
        for start, slot in zip(range(0, rank, one), own, strict=False):
            a, b = slot.pair()
            A[start : start + one] = a
            B[:, start : start + one] = slot.put(b.new_zeros(rows, one), b)
        tensors |= {f"{place}lora_A.weight": A, f"{place}lora_B.weight": B}
    return tensors


def peft_tensors(layer: LoRALayer) -> dict[str, Tensor]:
    """An adapted layer as peft's tensors, by their names below the layer's."""
    if isinstance(layer, LoRAMultiheadAttention):
        return _attention_tensors(layer)
    A, B = layer.factors()
    if isinstance(layer, _LoRAConv) and layer.groups > 1:
        A = block_diagonal(A, layer.groups)
    tensors = {"lora_A.weight": A, "lora_B.weight": B}
    if layer.spec.variant == "dora":
        m = layer.base_weight("weight").to(A.dtype).flatten(1).norm(dim=1)
        for slot in layer.slots():
            m = slot.put(m, slot.magnitude)
        if isinstance(layer, _LoRAConv):
            m = m.view(1, -1, *[1] * layer.dims)
        tensors["lora_magnitude_vector"] = m
    return tensors


def _rank_and_alpha(layer: LoRALayer, A: Tensor) -> tuple[int, float]:
    """Rank as peft sees it, and the alpha that gives our scale under alpha/r."""
    rank = A.shape[0]
    alpha = layer.spec.scale * rank
    near = round(alpha)
    return rank, near if near and math.isclose(alpha, near, rel_tol=1e-12) else alpha


def _peft_config(
    layers: dict[str, LoRALayer], ranks: dict[str, tuple[int, float]], extra: list[str]
) -> dict[str, object]:
    values = list(ranks.values())
    r, alpha = max(set(values), key=values.count)
    names = list(layers)
    # peft matches a listed name against the ends of names: only safe if unique there.
    suffix = any(a != b and a.endswith(f".{b}") for a in names for b in names)
    exact = "|".join(re.escape(n) for n in names)
    anchored = {f"^{re.escape(n)}": v for n, v in ranks.items()}
    specs = [layer.spec for layer in layers.values()]
    return {
        "peft_type": "LORA",
        **dict.fromkeys(("task_type", "auto_mapping", "base_model_name_or_path")),
        "inference_mode": True,
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": specs[0].dropout,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_dora": specs[0].variant == "dora",
        # The scale is always written as alpha/r, whatever rule made it.
        "use_rslora": False,
        "target_modules": f"(?:{exact})" if suffix else names,
        "modules_to_save": extra or None,
        "rank_pattern": {n: v[0] for n, v in anchored.items() if v[0] != r},
        "alpha_pattern": {n: v[1] for n, v in anchored.items() if v[1] != alpha},
    }


def _layer_record(layer: LoRALayer) -> dict[str, object]:
    own = ("order", "layout", "heads") if isinstance(layer, LoRAFusedLinear) else ()
    record = {"parts": layer.parts} | {key: getattr(layer, key) for key in own}
    return asdict(layer.spec) | record


# -- saving --------------------------------------------------------------------
def save_adapter(
    model: nn.Module, folder: str | Path, *, extra: Iterable[str] = ()
) -> Path:
    """Write the adapters of a model, and nothing of its base.

    Parameters
    ----------
    model : nn.Module
        Merged or not: the files are the same.
    folder : path
        Made if it is missing; files in it are replaced, each by one rename.
    extra : sequence of str
        Names of modules to store whole as well, such as a new head (peft's
        ``modules_to_save``).

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    LoRAError
        If the model has no adapters, an extra module does not exist, or the folder
        cannot be written. A trainable tensor that is not stored gives a warning.
    """
    from safetensors.torch import save

    layers = _require(model)
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, tuple[int, float]] = {}
    for name, layer in layers.items():
        # Zero rows that peft's layout adds do not need gradients to be written.
        with torch.no_grad():
            own = peft_tensors(layer)
        ranks[name] = _rank_and_alpha(layer, own["lora_A.weight"])
        tensors |= {f"{PREFIX}{name}.{k}": t for k, t in own.items()}
    extra = list(extra)
    tensors |= _extra_tensors(model, extra)
    stored = {k.removeprefix(PREFIX) for k in tensors}
    lost = [
        n
        for n, p in model.named_parameters()
        if p.requires_grad and not is_adapter(n) and n not in stored
    ]
    if lost:
        warnings.warn(
            f"{len(lost)} trainable tensors are not stored with the adapter, such as "
            f"{lost[0]}; name their modules in extra=(...) to keep them.",
            stacklevel=2,
        )
    hashes = {n: h for n, h in fingerprint(model).items() if n not in stored}
    blob = save(
        {k: t.detach().cpu().contiguous() for k, t in tensors.items()},
        metadata={"format": "pt", "medtut_base": total(hashes)},
    )
    base = {
        "version": 1,
        "base": total(hashes),
        "adapter_sha256": hashlib.sha256(blob).hexdigest(),
        "layers": {n: _layer_record(layer) for n, layer in layers.items()},
        "tensors": hashes,
    }
    config = _peft_config(layers, ranks, extra)
    folder, files = Path(folder), {WEIGHTS: blob}
    for file, content in ((CONFIG, config), (BASE, base)):
        files[file] = json.dumps(content, indent=1, sort_keys=True).encode("utf-8")
    for file, data in files.items():
        with renamed(os.path.join(folder, file), LoRAError) as partial:
            partial.write_bytes(data)
    return folder


def _extra_tensors(model: nn.Module, names: list[str]) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in names:
        if name not in modules:
            raise LoRAError(f"extra: the model has no module {name!r}")
        state = modules[name].state_dict()
        if any(is_adapter(key) for key in state):
            raise LoRAError(f"extra: {name} holds adapters; name only plain modules.")
        out |= {f"{PREFIX}{name}.{key}": t.clone() for key, t in state.items()}
    return out
