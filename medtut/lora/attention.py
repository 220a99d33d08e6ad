"""Low-rank updates inside ``nn.MultiheadAttention``.

PyTorch's module has no query, key or value layers to wrap: it hands its weights to a
function, and in evaluation to a fused kernel. We therefore build the effective
weights, differentiably, and let the module work with those. A no-op hook keeps
``nn.TransformerEncoderLayer`` from reading the bare weights behind our back.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from medtut.lora.core import AdapterSpec, LoRAError, LoRALayer
from medtut.lora.layers import part_rows

QKV = ("query", "key", "value")
PARTS = (*QKV, "output")


def block_fast_path(module: nn.Module, _args: object) -> None:
    """Forward pre-hook that does nothing.

    ``nn.TransformerEncoderLayer`` skips its fused kernel, which would read the bare
    weights, as soon as any module inside it has a hook.
    """


class LoRAMultiheadAttention(LoRALayer, nn.MultiheadAttention):
    """Multi-head attention with updates on chosen of query, key, value and output.

    Parameters
    ----------
    base : nn.MultiheadAttention
        The module to adapt, with a fused or with separate input projections.
    parts : sequence of str
        Chosen of "query", "key", "value", "output".
    r, alpha, scaling, variant
        See :class:`medtut.lora.core.AdapterSpec`.
    dropout : float
        Must be 0: the update acts on the weights here, there is no branch whose
        input could be dropped.

    Raises
    ------
    LoRAError
        For an unknown part, a rank too large, dropout above 0, or DoRA (which peft,
        whose file layout we write, does not know for this module).
    """

    def __init__(
        self,
        base: nn.MultiheadAttention,
        r: int = 8,
        alpha: float = 16.0,
        *,
        parts: Iterable[str] = ("query", "value"),
        _check: bool = True,
        **settings: Any,
    ) -> None:
        spec = AdapterSpec(r, alpha, **settings)
        parts = set(parts)
        if not parts or parts - set(PARTS):
            raise LoRAError(
                f"parts {sorted(parts)} of nn.MultiheadAttention: choose from "
                f"{', '.join(PARTS)}."
            )
        if spec.dropout:
            raise LoRAError(
                "dropout on the low-rank branch is not possible in "
                "nn.MultiheadAttention, which only takes weights; set dropout=0."
            )
        if spec.variant == "dora":
            raise LoRAError(
                "DoRA is not available for nn.MultiheadAttention; use variant 'lora' "
                "or 'pissa', or leave this module out with a pattern."
            )
        self._adopt(base, spec)
        d = self.embed_dim
        for part in (p for p in PARTS if p in parts):
            rows = None
            if part == "output":
                target, width = "out_proj.weight", d
            elif self._qkv_same_embed_dim:
                target, width = "in_proj_weight", d
                rows = part_rows(3 * d, QKV, part)
            else:
                target = f"{part[0]}_proj_weight"
                width = self.get_parameter(target).shape[1]
            self._add_slot(part, target, rows, (r, width), (d, r), _check)
        self.register_forward_pre_hook(block_fast_path)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Same arguments, shapes and results as ``nn.MultiheadAttention``.

        For the length of the call the effective weights stand where the module looks
        for its own.
        """
        new = (
            {} if self.merged else {t: self.effective_weight(t) for t in self.targets()}
        )
        own = {target: self.get_parameter(target) for target in new}
        try:
            for target, weight in new.items():
                self._set_weight(target, weight.to(own[target].dtype))
            return nn.MultiheadAttention.forward(self, *args, **kwargs)
        finally:
            for target, weight in own.items():
                self._set_weight(target, weight)
