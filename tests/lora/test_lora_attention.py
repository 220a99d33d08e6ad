"""nn.MultiheadAttention: parity, gradients, fast paths."""

import copy

import pytest
import torch
from torch import nn

from medtut.lora import (
    LoRAConfig,
    LoRAError,
    LoRAMultiheadAttention,
    eject,
    inject,
    load_adapter,
    merge,
    save_adapter,
    unmerge,
)

from .parity import close, peft_output_factor
from .test_lora_layers import fill


@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_is_pefts(batch_first):
    """All four parts, with peft's one fused pair cut into three equal ones."""
    import peft
    from peft.tuners.lora.layer import MultiheadAttention

    torch.manual_seed(0)
    base = nn.MultiheadAttention(8, 2, batch_first=batch_first)
    parts = ("query", "key", "value", "output")
    ours = fill(LoRAMultiheadAttention(copy.deepcopy(base), 4, 7.0, parts=parts))
    config = peft.LoraConfig(r=4, lora_alpha=7.0)
    theirs = MultiheadAttention(
        copy.deepcopy(base), "default", config=config, r=4, lora_alpha=7.0
    )
    out = theirs.base_layer.out_proj
    tA, tB = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
    with torch.no_grad():
        for part in ("key", "value"):
            getattr(ours, f"lora_A_{part}").copy_(ours.lora_A_query)
        tA.copy_(ours.lora_A_query)
        tB.copy_(torch.cat([s.B for s in ours.slots()[:3]]))
        out.lora_A["default"].weight.copy_(ours.lora_A_output)
        B_out = ours.lora_B_output / peft_output_factor()
        out.lora_B["default"].weight.copy_(B_out)
    x, memory = torch.randn(3, 5, 8), torch.randn(3, 5, 8)
    for args in ((x, x, x), (x, memory, memory)):
        grads = []
        for m in (ours, theirs):
            m.zero_grad()
            given = [t.clone().requires_grad_() for t in args]
            y, weights = m(*given)
            (y**2).sum().backward()
            grads.append([y, weights, *[t.grad for t in given]])
        for a, b in zip(*grads, strict=True):
            close(a, b, "output, attention or input gradient")
        close(torch.cat([s.B.grad for s in ours.slots()[:3]]), tB.grad, "B")
        close(sum(s.A.grad for s in ours.slots()[:3]), tA.grad, "A")
        close(ours.lora_B_output.grad, out.lora_B["default"].weight.grad, "B of output")


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("variant", ["lora", "pissa"])
def test_every_part_merges_and_gets_gradients(variant, separate):
    torch.manual_seed(0)
    kinds = {"kdim": 6, "vdim": 4} if separate else {}
    base = nn.MultiheadAttention(8, 2, batch_first=True, **kinds)
    state = {k: v.clone() for k, v in base.state_dict().items()}
    q = torch.randn(2, 5, 8)
    k = torch.randn(2, 5, 6) if separate else q
    v = torch.randn(2, 5, 4) if separate else q
    start = base(q, k, v)[0]
    ours = LoRAMultiheadAttention(
        base, 2, 5.0, parts=("query", "key", "value", "output"), variant=variant
    )
    close(ours(q, k, v)[0], start, "at the start")
    fill(ours)
    apart = ours(q, k, v)[0]
    apart.square().sum().backward()
    grads = [(n, p.grad) for n, p in ours.named_parameters() if "lora_" in n]
    assert len(grads) == 8
    assert all(g is not None and g.abs().sum() > 0 for _, g in grads)
    ours.merge()
    close(ours.eval()(q, k, v)[0], apart, "merged")
    with torch.no_grad():
        close(ours(q, k, v)[0], apart, "merged, in the fused kernel")
    ours.unmerge()
    assert all(torch.equal(ours.state_dict()[n], t) for n, t in state.items())


def test_only_the_chosen_part_changes():
    base = nn.MultiheadAttention(8, 2)
    ours = fill(LoRAMultiheadAttention(base, 2, parts=("value",)))
    changed = ours.deltas()["in_proj_weight"].abs().sum(1) > 0
    assert changed.tolist() == [False] * 16 + [True] * 8
    assert [n for n, _ in ours.named_parameters() if "lora_" in n] == [
        "lora_A_value",
        "lora_B_value",
    ]


@pytest.mark.parametrize("pattern", [None, r"linear[12]$"])
@pytest.mark.parametrize("padding", [False, True])
def test_fast_path_does_not_bypass_the_adapters(pattern, padding, tmp_path):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2)
    x = torch.randn(2, 5, 8)
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[0, 3:] = padding
    base = model.eval()(x, src_key_padding_mask=mask)
    inject(model, LoRAConfig(r=2, pattern=pattern))
    fill(model)
    folder = save_adapter(model, tmp_path)
    slow = model(x, src_key_padding_mask=mask)
    with torch.no_grad():
        fast = model(x, src_key_padding_mask=mask)
    assert (slow - base)[~mask].abs().max() > 0.01
    close(fast[~mask], slow[~mask], "without gradient")
    merge(model)
    with torch.no_grad():
        close(model(x, src_key_padding_mask=mask)[~mask], slow[~mask], "merged")
    unmerge(model)
    eject(model)
    assert not any(m._forward_pre_hooks for m in model.modules())
    with torch.no_grad():
        out = model(x, src_key_padding_mask=mask)
    close(out[~mask], base[~mask], "after eject")
    load_adapter(model, folder)
    with torch.no_grad():
        out = model(x, src_key_padding_mask=mask)
    close(out[~mask], slow[~mask], "loaded")


def test_masks_and_unbatched_input():
    torch.manual_seed(0)
    base = nn.MultiheadAttention(8, 2, batch_first=True, add_bias_kv=True)
    ours = LoRAMultiheadAttention(copy.deepcopy(base), 2)
    x = torch.randn(2, 5, 8)
    causal = torch.full((5, 5), float("-inf")).triu(1)
    for args in (
        {"attn_mask": causal, "need_weights": False},
        {"key_padding_mask": torch.tensor([[False] * 4 + [True]] * 2)},
        {"average_attn_weights": False},
    ):
        a, b = ours(x, x, x, **args), base(x, x, x, **args)
        close(a[0], b[0], str(args))
        assert (a[1] is None) == (b[1] is None)
        if a[1] is not None:
            close(a[1], b[1], "weights")
    close(ours(x[0], x[0], x[0])[0], base(x[0], x[0], x[0])[0], "unbatched")


@pytest.mark.parametrize(
    "bad",
    [{"dropout": 0.1}, {"variant": "dora"}, {"parts": ("q",)}, {"parts": ()}],
)
def test_what_attention_cannot_do(bad):
    with pytest.raises(LoRAError):
        LoRAMultiheadAttention(nn.MultiheadAttention(8, 2), 2, **bad)


def test_put_in_by_hand_it_blocks_the_fused_kernel_too():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True).eval()
    layer.self_attn = fill(LoRAMultiheadAttention(layer.self_attn, 2)).eval()
    x = torch.randn(2, 5, 8)
    slow = layer(x)
    layer.requires_grad_(False)
    with torch.no_grad():
        close(layer(x), slow, "without gradient")
