"""One attention, three ways to compute it, and what each keeps in memory."""

import math
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from medtut.errors import MedtutError
from medtut.models.ct_attention import (
    BACKENDS,
    Attention,
    attention_memory,
    make_norm,
    rope_table,
    rotate,
)
from medtut.models.ctvit import PositionBias


def make(backend: str = "fused", seed: int = 0, norm: str = "layer") -> Attention:
    torch.manual_seed(seed)
    module = Attention(24, heads=3, dim_head=8, norm=norm, backend=backend)
    with torch.no_grad():  # scales that are all 1 would hide that one is left out
        for p in (module.q_scale, module.k_scale, module.norm.weight):
            p.copy_(1 + 0.5 * torch.rand_like(p))
    return module


def turned(x: torch.Tensor, rope: torch.Tensor | None) -> torch.Tensor:
    """Pairs (i, i + half) as complex numbers, times those of the table."""
    if rope is None:
        return x
    pairs = torch.complex(*x.chunk(2, -1)) * torch.complex(*rope.to(x))
    return torch.cat((pairs.real, pairs.imag), -1)


def by_hand(m: Attention, x: torch.Tensor, bias=0.0, rope=None) -> torch.Tensor:
    """The published function, one head at a time; with RoPE if there is a table."""
    normed = F.layer_norm(x, x.shape[-1:], m.norm.weight)
    k_all, v_all = m.to_kv(x).split(m.heads * 8, -1)
    heads = []
    for h in range(m.heads):
        part = slice(8 * h, 8 * h + 8)
        q = F.normalize(m.to_q(normed)[..., part], dim=-1) * m.q_scale
        k = F.normalize(k_all[..., part], dim=-1) * m.k_scale
        logits = 8 * torch.einsum("bic,bjc->bij", turned(q, rope), turned(k, rope))
        logits = logits + (bias[h] if torch.is_tensor(bias) else bias)
        heads.append(logits.softmax(-1) @ v_all[..., part])
    return m.to_out(torch.cat(heads, -1))


def test_count_as_published_but_for_the_dead_norm():
    with torch.device("meta"):
        module = Attention(512)
    assert sum(p.numel() for p in module.parameters()) == 525_376 - 512


@pytest.mark.parametrize("backend", ["explicit", "fused"])
def test_it_is_the_published_function(backend):
    module = make(backend).double()
    x, bias = 3 * torch.randn(2, 10, 24).double(), torch.randn(3, 10, 10).double()
    torch.testing.assert_close(module(x), by_hand(module, x), rtol=0, atol=1e-9)
    got = module(x, bias)
    torch.testing.assert_close(got, by_hand(module, x, bias), rtol=0, atol=1e-9)
    rope = rope_table((10,), 8)
    want = by_hand(module, x, rope=rope)
    torch.testing.assert_close(module(x, rope=rope), want, rtol=0, atol=1e-9)
    assert (want - by_hand(module, x)).abs().max() > 1e-2


def run(backend: str, rope: bool) -> dict[str, torch.Tensor]:
    """Output and every gradient, the bias network's among them, in float32."""
    module, net = make(backend), PositionBias(3, 16)
    torch.manual_seed(1)
    x = torch.randn(2, 12, 24, requires_grad=True)
    y = module(x, net(3, 4), rope_table((3, 4), 8) if rope else None)
    (y * torch.randn_like(y)).sum().backward()
    named = {**dict(module.named_parameters()), **dict(net.named_parameters())}
    assert all(p.grad is not None and p.grad.any() for p in named.values())
    return {"y": y, "x": x.grad} | {n: p.grad for n, p in named.items()}


@pytest.mark.parametrize("rope", [False, True])
def test_explicit_and_fused_agree_with_scales_and_a_trained_bias(rope):
    one, two = run("explicit", rope), run("fused", rope)
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-5, msg=name)


def test_zero_queries_give_the_mean_not_nan():
    module = make("fused")
    torch.manual_seed(1)
    with torch.no_grad():
        module.to_q.weight.zero_()
        module.to_kv.weight[:24].zero_()
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(1, 5, 24).to(dtype)
            y = module.to(dtype)(x)
            assert y.dtype == dtype
            # Equal but for the last digit: kernels may round their rows differently.
            close = 4 * torch.finfo(dtype).eps
            torch.testing.assert_close(y[0, 0], y[0, 4], rtol=close, atol=close)
            assert y.isfinite().all()


# -- flash -----------------------------------------------------------------------------
def stub(calls: list) -> types.ModuleType:
    """Stands for flash_attn: its layout, its default scale, its dtypes."""

    def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
        assert q.dtype in (torch.float16, torch.bfloat16)
        assert q.dtype == k.dtype == v.dtype
        calls.append(tuple(q.shape))
        scale = softmax_scale or q.shape[-1] ** -0.5
        logits = torch.einsum("bihc,bjhc->bhij", q.float(), k.float()) * scale
        return torch.einsum("bhij,bjhc->bihc", logits.softmax(-1), v.float()).to(
            q.dtype
        )

    module = types.ModuleType("flash_attn")
    module.flash_attn_func = flash_attn_func
    return module


@pytest.mark.parametrize("rope", [None, rope_table((9,), 8)])
def test_flash_is_handed_normalised_queries_and_the_published_scale(monkeypatch, rope):
    calls = []
    monkeypatch.setitem(sys.modules, "flash_attn", stub(calls))
    torch.manual_seed(1)
    x = 0.5 * torch.randn(2, 9, 24)  # bfloat16 rounds what is larger by more
    with torch.no_grad():
        whole = make("explicit")(x, rope=rope)
        got = make("flash").bfloat16()(x.bfloat16(), rope=rope)
        with torch.autocast("cpu", torch.bfloat16):
            cast = make("flash")(x, rope=rope)
    assert calls == [(2, 9, 3, 8)] * 2
    for y in (got, cast):
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), whole, rtol=0, atol=2e-2)


def test_flash_refuses_what_it_cannot_do(monkeypatch):
    x = torch.randn(1, 4, 24)
    calls = []
    monkeypatch.setitem(sys.modules, "flash_attn", stub(calls))
    with pytest.raises(MedtutError, match="bias"):
        make("flash").bfloat16()(x.bfloat16(), torch.zeros(3, 4, 4))
    with pytest.raises(MedtutError, match="float32"):
        make("flash")(x)
    assert calls == []
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(MedtutError, match="flash-attn package"):
        make("flash").bfloat16()(x.bfloat16())
    with pytest.raises(MedtutError, match="explicit, fused, flash"):
        make("flesh")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_the_real_flash_attn():
    pytest.importorskip("flash_attn")
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 8, 576, 32, device="cuda").unbind()
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    args = [t.bfloat16() for t in (q, k, v)]
    got = BACKENDS["flash"](*args, 8.0, None).float()
    torch.testing.assert_close(got, BACKENDS["explicit"](q, k, v, 8.0, None), atol=2e-2,
                               rtol=0)  # fmt: skip


# -- rotary positions ------------------------------------------------------------------
def test_rope_keeps_lengths_and_knows_distances_only():
    torch.manual_seed(0)
    q, k = torch.randn(2, 16).double()
    table = rope_table((5, 7), 16)
    turned_q, turned_k = (rotate(t.expand(35, 16), table).double() for t in (q, k))
    torch.testing.assert_close(turned_q.norm(dim=-1), q.norm().expand(35), rtol=1e-6,
                               atol=0)  # fmt: skip
    products = (turned_q @ turned_k.T).view(5, 7, 5, 7)
    same = products[1, 2, 3, 5]
    assert products[0, 0, 2, 3] == pytest.approx(same.item(), abs=1e-5)
    assert products[2, 3, 4, 6] == pytest.approx(same.item(), abs=1e-5)
    for other in ((1, 2, 3, 4), (1, 2, 2, 5), (3, 5, 1, 2)):  # each axis, and its sign
        assert abs(products[other] - same) > 1e-3
    assert products[0, 0, 0, 0] == pytest.approx((q @ k).item(), abs=1e-5)


def test_rope_in_depth_and_sizes_that_do_not_fit():
    assert rope_table((24,), 32).shape == (2, 24, 16)
    assert rope_table((3, 4), 32).shape == (2, 12, 16)
    with pytest.raises(MedtutError, match="multiple of 4"):
        rope_table((3, 4), 6)


# -- norms -----------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_norms_are_finite_and_exact_in_half_precision(kind):
    torch.manual_seed(0)
    norm = make_norm(kind, 64)
    assert not [n for n, _ in norm.named_parameters() if n == "bias"]
    zeros, large = torch.zeros(2, 64).half(), torch.full((2, 64), 1e4).half()
    mixed = (torch.randn(4, 64) * 1e4).clamp(-6e4, 6e4).half()
    small = (torch.randn(4, 64) * 1e-3).half()  # squares vanish in float16
    with torch.no_grad():
        assert torch.equal(norm.half()(zeros), zeros)
        assert norm(large).isfinite().all()
        for x in (mixed, small):
            wide = x.double()
            centred = wide - wide.mean(-1, keepdim=True) if kind == "layer" else wide
            eps = 1e-5 if kind == "layer" else 1e-6
            want = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
            torch.testing.assert_close(norm(x).double(), want, rtol=2e-3, atol=2e-3)
        if kind == "rms":
            torch.testing.assert_close(norm(large), torch.ones_like(large))


def test_unknown_norm_and_a_bias_where_there_can_be_one():
    assert isinstance(make_norm("layer", 4, bias=True).bias, nn.Parameter)
    assert len(list(make_norm("rms", 4, bias=True).parameters())) == 1
    with pytest.raises(MedtutError, match="norm='batch'"):
        make_norm("batch", 4)


# -- memory ----------------------------------------------------------------------------
def test_memory_grows_with_the_square_only_where_the_matrix_is_kept():
    sizes = (64, 128, 256)
    explicit = [attention_memory("explicit", n, batch=3) for n in sizes]
    fused = [attention_memory("fused", n, batch=3) for n in sizes]
    square = 3 * 8 * 4 * 64**2  # one matrix at the smallest N
    per_token = (explicit[0] - square) / 64
    assert explicit == [4 * 24 * n * n + per_token * n for n in sizes]
    assert fused == [fused[0] * n // 64 for n in sizes]
    assert explicit[2] > 2.5 * fused[2]
    assert attention_memory("fused", 64, batch=3) == fused[0]  # the same each time


def test_a_fixed_bias_costs_itself_and_a_trained_one_is_measured():
    plain, fixed, trained = (
        attention_memory("fused", 128, bias, batch=4)
        for bias in ("none", "fixed", "trained")
    )
    assert fixed - plain == 8 * 128**2 * 4  # once, not per sequence
    assert trained >= fixed
    explicit = attention_memory("explicit", 128, "trained", batch=4)
    assert math.isclose(explicit, attention_memory("explicit", 128, batch=4))
    with pytest.raises(MedtutError, match="none, fixed, trained"):
        attention_memory("fused", 8, "some")
