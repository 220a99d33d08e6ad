"""The one idea of the course: adapt a frozen model with low-rank updates.

>>> from medtut.lora import LoRAConfig, inject, ledger
>>> injection = inject(model, LoRAConfig(r=8, roles=("query", "value")))
>>> print(ledger(model).to_text())
"""

from medtut.lora.attention import LoRAMultiheadAttention
from medtut.lora.conv import LoRAConv1d, LoRAConv2d, LoRAConv3d
from medtut.lora.core import AdapterSpec, LoRAError, LoRALayer
from medtut.lora.inject import (
    Injection,
    LoRAConfig,
    adapted_layers,
    adapter_parameters,
    delta_weight,
    eject,
    inject,
    is_adapter,
    merge,
    unmerge,
    update_norm,
)
from medtut.lora.io import save_adapter
from medtut.lora.layers import LoRAFusedLinear, LoRALinear
from medtut.lora.ledger import Ledger, find_dead, ledger
from medtut.lora.loading import load_adapter
from medtut.lora.roles import ROLES, scan

__all__ = [
    "ROLES", "AdapterSpec", "Injection", "Ledger", "LoRAConfig", "LoRAConv1d",
    "LoRAConv2d", "LoRAConv3d", "LoRAError", "LoRAFusedLinear", "LoRALayer",
    "LoRALinear", "LoRAMultiheadAttention", "adapted_layers", "adapter_parameters",
    "delta_weight", "eject", "find_dead", "inject", "is_adapter", "ledger",
    "load_adapter", "merge", "save_adapter", "scan", "unmerge", "update_norm",
]  # fmt: skip
