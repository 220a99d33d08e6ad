"""Low-rank updates inside ``nn.MultiheadAttention``.

PyTorch's module has no query, key or value layers to wrap: it hands its weights to a
function, and in evaluation to a fused kernel. We therefore build the effective
weights, differentiably, and pass those to the same function. Neither of its fast
paths can bypass the update: ours is not called, and a no-op hook keeps
``nn.TransformerEncoderLayer`` from reading the weights behind our back.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch.nn.functional as F
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
        scaling: str = "alpha/r",
        dropout: float = 0.0,
        variant: str = "lora",
        _check: bool = True,
    ) -> None:
        parts = set(parts)
        if not parts or parts - set(PARTS):
            raise LoRAError(
                f"parts {sorted(parts)} of nn.MultiheadAttention: choose from "
                f"{', '.join(PARTS)}."
            )
        if dropout:
            raise LoRAError(
                "dropout on the low-rank branch is not possible in "
                "nn.MultiheadAttention, which only takes weights; set dropout=0."
            )
        if variant == "dora":
            raise LoRAError(
                "DoRA is not available for nn.MultiheadAttention; use variant 'lora' "
                "or 'pissa', or leave this module out with a pattern."
            )
        self._adopt(base, AdapterSpec(r, alpha, scaling, dropout, variant))
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

    def _w(self, target: str) -> Tensor | None:
        """Effective weight if ``target`` is adapted, else the stored one."""
        if target in self._targets.values():
            dtype = self.base_weight(target).dtype
            return self.effective_weight(target).to(dtype)
        owner, _, last = target.rpartition(".")
        return getattr(self.get_submodule(owner), last)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Same arguments, shapes and results as ``nn.MultiheadAttention``."""
        options = {
            "key_padding_mask": key_padding_mask,
            "need_weights": need_weights,
            "attn_mask": attn_mask,
            "average_attn_weights": average_attn_weights,
            "is_causal": is_causal,
        }
        if self._pristine:
            return nn.MultiheadAttention.forward(self, query, key, value, **options)
        turned = self.batch_first and query.dim() == 3
        if turned:
            # The same tensor stays the same object: the function then projects it once.
            moved = {id(t): t.transpose(0, 1) for t in (query, key, value)}
            query, key, value = moved[id(query)], moved[id(key)], moved[id(value)]
        fused = self._qkv_same_embed_dim
        out, weights = F.multi_head_attention_forward(
            query,
            key,
            value,
            self.embed_dim,
            self.num_heads,
            self._w("in_proj_weight") if fused else None,
            self.in_proj_bias,
            self.bias_k,
            self.bias_v,
            self.add_zero_attn,
            self.dropout,
            self._w("out_proj.weight"),
            self.out_proj.bias,
            training=self.training,
            use_separate_proj_weight=not fused,
            q_proj_weight=None if fused else self._w("q_proj_weight"),
            k_proj_weight=None if fused else self._w("k_proj_weight"),
            v_proj_weight=None if fused else self._w("v_proj_weight"),
            **options,
        )
        return (out.transpose(0, 1) if turned else out), weights
