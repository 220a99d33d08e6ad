"""Loading an adapter folder: ours, or one that peft wrote."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import warnings
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from medtut.lora.attention import PARTS, LoRAMultiheadAttention
from medtut.lora.conv import _LoRAConv, block_diagonal
from medtut.lora.core import AdapterSpec, LoRAError, LoRALayer
from medtut.lora.fingerprint import check_base, total
from medtut.lora.inject import (
    Injection,
    adapted_layers,
    eject,
    guard_fast_paths,
    make_layer,
    replace_modules,
)
from medtut.lora.io import BASE, CONFIG, PREFIX, WEIGHTS

# So peft names the output projection of a MultiheadAttention.
_KEY = re.compile(
    r"^(?P<name>.+?)(?P<out>\.base_layer\.out_proj)?"
    r"\.(?P<kind>lora_A|lora_B|lora_magnitude_vector)(\.weight)?$"
)
Group = dict[str, Tensor]


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Say which file of a folder is missing or damaged, and what to do."""
    from safetensors import SafetensorError

    try:
        yield
    except FileNotFoundError as error:
        raise LoRAError(
            f"{path} is missing: an adapter folder holds {WEIGHTS} and {CONFIG} (an "
            "adapter_model.bin, a pickle, is not opened: save it again with "
            "safe_serialization=True)."
        ) from error
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise LoRAError(
            f"{path} is damaged, cut short or unreadable ({type(error).__name__}: "
            f"{error}); copy or save it again."
        ) from error


def _groups(
    tensors: dict[str, Tensor], path: Path
) -> tuple[dict[str, Group], dict[str, Tensor]]:
    """Adapter tensors by layer, and the rest (modules stored whole)."""
    groups: dict[str, Group] = {}
    rest: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        short = key.removeprefix(PREFIX)
        if match := _KEY.match(short):
            name = match["name"].replace(".base_layer.", ".")
            kind = f"out_{match['kind']}" if match["out"] else match["kind"]
            groups.setdefault(name, {})[kind] = tensor
        elif "lora_" in short:
            raise LoRAError(
                f"{path}: {key} belongs to a kind of adapter that medtut does not "
                "have (embeddings, adapter biases and others of peft)."
            )
        else:
            rest[short] = tensor
    half = [n for n, group in groups.items() if not {"lora_A", "lora_B"} <= set(group)]
    if half or not groups:
        raise LoRAError(
            f"{path} lacks lora_A and lora_B for {(half or ['any layer'])[0]}"
        )
    return groups, rest


def _pattern(patterns: dict, name: str, default: float) -> float:
    """peft's rule: a key fits if it is the end of the name, at a dot."""
    fits = (k for k in patterns or {} if re.match(rf"(.*\.)?({k})$", name))
    key = next(fits, None)
    return default if key is None else patterns[key]


def _peft_spec(config: dict, name: str, group: Group, base: nn.Module) -> AdapterSpec:
    rank, patterns = group["lora_A"].shape[0], config.get("alpha_pattern")
    spec = AdapterSpec(
        rank,
        float(_pattern(patterns, name, config.get("lora_alpha", rank))),
        "alpha/sqrt(r)" if config.get("use_rslora") else "alpha/r",
        float(config.get("lora_dropout") or 0.0),
        "dora" if "lora_magnitude_vector" in group else "lora",
    )
    if (groups := getattr(base, "groups", 1)) == 1:
        return spec
    # Our rank counts one group's channels, peft's all of them.
    r = rank // groups
    return replace(spec, r=r, alpha=spec.scale * r, scaling="alpha/r")


@torch.no_grad()
def _fill(layer: LoRALayer, group: Group, name: str, ours: bool) -> None:
    """Put the tensors of one peft layer into ours, the inverse of saving."""
    A, B = group["lora_A"], group["lora_B"]
    if isinstance(layer, _LoRAConv) and (groups := layer.groups) > 1:
        # The shared A of a block-diagonal one; see `medtut.lora.conv`.
        whole, A = A, A[: A.shape[0] // groups, : A.shape[1] // groups]
        if not torch.equal(block_diagonal(A, groups), whole):
            raise LoRAError(
                f"{name}: this adapter of a grouped convolution mixes groups, as peft "
                "trains them; no grouped weight can hold that."
            )
    start = 0
    for slot in layer.slots():
        if slot.part == "output" and isinstance(layer, LoRAMultiheadAttention):
            a, b, start = group["out_lora_A"], group["out_lora_B"], 0
        else:
            a, b = A, slot.take(B)
        for mine_A, mine_B, sign in ((slot.A, slot.B, 1), (slot.A0, slot.B0, -1)):
            if mine_A is None:
                continue
            # One pair from peft serves all parts: each keeps its own copy.
            rank = slice(start, start + layer.spec.r) if ours else slice(None)
            start += layer.spec.r
            for mine, new in ((mine_A, a[rank]), (mine_B, sign * b[:, rank])):
                if mine.shape != new.shape:
                    raise LoRAError(
                        f"{name}: the file has a tensor of shape {tuple(new.shape)} "
                        f"where this model needs {tuple(mine.shape)}: another "
                        "architecture."
                    )
                mine.copy_(new)
        if slot.magnitude is not None:
            slot.magnitude.copy_(slot.take(group["lora_magnitude_vector"].flatten()))


def _build(
    model: nn.Module, config: dict, record: dict | None, name: str, group: Group
) -> tuple[nn.Module, LoRALayer]:
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    if attention := "out_lora_A" in group:
        kinds = (nn.MultiheadAttention,)
    base = dict(model.named_modules(remove_duplicate=False)).get(name)
    if not isinstance(base, kinds):
        raise LoRAError(
            f"the adapter changes {name}, which {type(model).__name__} does not have "
            f"as {' or '.join(kind.__name__ for kind in kinds)} (it has: "
            f"{type(base).__name__}): it belongs to another architecture."
        )
    if record is not None:
        shape = dict(record)
        spec = AdapterSpec(*(shape.pop(f.name) for f in fields(AdapterSpec)))
        layer = make_layer(base, spec, shape.pop("parts"), check=False, **shape)
    else:
        spec = _peft_spec(config, name, group, base)
        layer = make_layer(base, spec, PARTS, check=False)
        if attention and group["out_lora_B"].any():
            # huggingface/peft pull request 3774
            warnings.warn(
                f"{name}: peft up to 0.21.2 adds the update of a MultiheadAttention's "
                "output projection twice; here it counts once, so an adapter trained "
                "there gives other outputs.",
                stacklevel=3,
            )
    _fill(layer, group, name, ours=record is not None)
    return base, layer


def load_adapter(
    model: nn.Module, folder: str | Path, *, allow_other_base: bool = False
) -> Injection:
    """Put a saved adapter into a model.

    Parameters
    ----------
    model : nn.Module
        The bare base model. If it has adapters, they are taken out first (their
        parameters are then no longer the model's: make a new optimizer).
    folder : path
        Written by :func:`save_adapter` or by peft.
    allow_other_base : bool
        Attach even if the base weights are not those it was trained on.

    Returns
    -------
    Injection

    Raises
    ------
    LoRAError
        If a file is missing, damaged or of another kind, if the model has another
        architecture, or other weights. The model is then unchanged. Files without a
        fingerprint (peft's) give a warning.
    """
    from safetensors import safe_open

    folder = Path(folder)
    if not folder.is_dir():
        raise LoRAError(f"{folder} is not a folder; give the folder of an adapter.")
    with _reading(folder / CONFIG):
        config = {**json.loads((folder / CONFIG).read_text(encoding="utf-8"))}
    if config.get("peft_type", "LORA") != "LORA":
        raise LoRAError(
            f"{folder} holds a {config['peft_type']} adapter; medtut reads LORA."
        )
    with _reading(folder / WEIGHTS), safe_open(folder / WEIGHTS, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata = file.metadata() or {}
    groups, rest = _groups(tensors, folder / WEIGHTS)
    records = _check_fingerprint(model, folder, metadata, allow_other_base)
    own = model.state_dict()
    for key, tensor in rest.items():
        if key not in own or own[key].shape != tensor.shape:
            raise LoRAError(
                f"{folder / WEIGHTS}: {key} {tuple(tensor.shape)} has no place in this "
                "model. Build the model with the same head first."
            )

    before = {p: p.requires_grad for p in model.parameters()}
    old = adapted_layers(model)
    merged = [layer for layer in old.values() if layer.merged]
    eject(model)
    try:
        built = {
            name: _build(model, config, records.get(name), name, group)
            for name, group in groups.items()
        }
    except LoRAError:
        replace_modules(model, {id(m._origin[0]): m for m in old.values()})
        guard_fast_paths(model)
        for layer in merged:
            layer.merge()
        for p, flag in before.items():
            p.requires_grad_(flag)
        raise
    model.requires_grad_(False)
    replace_modules(model, {id(base): layer for base, layer in built.values()})
    guard_fast_paths(model)
    state = model.state_dict(keep_vars=True)
    for key, tensor in rest.items():
        state[key].detach().copy_(tensor)
        state[key].requires_grad_(isinstance(state[key], nn.Parameter))
    return Injection({name: layer for name, (_, layer) in built.items()})


def _check_fingerprint(
    model: nn.Module, folder: Path, metadata: dict[str, str], allow: bool
) -> dict[str, dict]:
    """Check the base, return how our layers were built (empty for peft's files)."""
    if "medtut_base" not in metadata or not (folder / BASE).exists():
        warnings.warn(
            f"{folder} has no fingerprint of the base weights: make sure yourself "
            "that this is the model it was trained on.",
            stacklevel=3,
        )
        return {}
    with _reading(folder / BASE):
        base = json.loads((folder / BASE).read_text(encoding="utf-8"))
        records, hashes = base["layers"], base["tensors"]
        digest = base["adapter_sha256"]
    found = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    if (found, metadata["medtut_base"]) != (digest, total(hashes)):
        raise LoRAError(
            f"the files in {folder} come from different saves, or {BASE} or {WEIGHTS} "
            "was changed; save the adapter again."
        )
    if not allow:
        check_base(model, hashes, str(folder))
    return records


__all__ = ["load_adapter"]
