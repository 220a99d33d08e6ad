"""A fingerprint of the base weights an adapter was trained on."""

from __future__ import annotations

import hashlib
import json

import torch
from torch import Tensor, nn

from medtut.lora.core import LoRAError
from medtut.lora.inject import adapted_layers, is_adapter


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """All parameters but the adapters', by name, as they are when unmerged."""
    tensors = {
        name: p
        for name, p in model.named_parameters(remove_duplicate=False)
        if not is_adapter(name)
    }
    for name, layer in adapted_layers(model).items():
        for target in layer.targets():
            tensors[f"{name}.{target}".lstrip(".")] = layer.base_weight(target)
    return tensors


def tensor_hash(tensor: Tensor) -> str:
    """sha256 over dtype, shape and bytes."""
    if tensor.is_meta:
        raise LoRAError(
            "this model lives on the meta device and has no weights to fingerprint"
        )
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    digest.update(memoryview(data.numpy()))
    return digest.hexdigest()


def fingerprint(model: nn.Module) -> dict[str, str]:
    """Hash of every frozen base parameter, by name."""
    frozen = (item for item in base_tensors(model).items() if not item[1].requires_grad)
    return {name: tensor_hash(tensor) for name, tensor in frozen}


def total(hashes: dict[str, str]) -> str:
    """One hash for all, independent of the order."""
    text = json.dumps(hashes, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def check_base(model: nn.Module, expected: dict[str, str], where: str) -> None:
    """Refuse a model whose frozen weights are not those of the fingerprint.

    Raises
    ------
    LoRAError
        Naming the tensors that are missing or differ.
    """
    have = base_tensors(model)
    missing = [n for n in expected if n not in have]
    wrong = [n for n in expected if n in have and tensor_hash(have[n]) != expected[n]]
    if not missing and not wrong:
        return
    said = f"the adapter in {where} was trained on another base model.\n"
    for title, names in (("missing", missing), ("different", wrong)):
        if names:
            shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
            said += f"{title} ({len(names)} of {len(expected)}): {shown}\n"
    raise LoRAError(
        said + "Load the base weights it belongs to, in the dtype they had (an fp16 "
        "copy counts as different). allow_other_base=True attaches it all the same."
    )
