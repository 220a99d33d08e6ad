"""The published re-implementation: each defect shown, and ours without it."""

import pytest
import torch
import torch.nn.functional as F

from medtut.lora import find_dead
from medtut.models import published_ctclip as published
from medtut.models.contrastive import param_groups
from medtut.models.ct_attention import Attention, make_norm
from medtut.models.ctclip import CTCLIP
from medtut.models.ctvit import CTViT, FeedForward, PositionBias
from medtut.models.published_ctclip import (
    PublishedAttention,
    PublishedCTCLIP,
    PublishedCTViT,
    PublishedFeedForward,
    PublishedPositionBias,
    PublishedRMSNorm,
    norms_by_type,
    published_ledger,
    temperature_reach,
)

SMALL = {"dim": 16, "image": (8, 6, 8), "patch": (2, 2, 2), "spatial_depth": 2,
         "temporal_depth": 2, "heads": 2, "dim_head": 8}  # fmt: skip
AS_PUBLISHED = {"norm": "layer", "ffn": "geglu", "ffn_multiple": None}
ALL_ON = {"flash": True, "rms": True, "swiglu": True}


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def randomise(module: torch.nn.Module) -> None:
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn_like(p))


# -- the position bias -----------------------------------------------------------------
def test_the_position_bias_is_computed_and_never_used():
    torch.manual_seed(0)
    x = torch.randn(2, 1, 8, 6, 8)
    calls = []
    for tower, moves in ((PublishedCTViT(**SMALL), False), (CTViT(**SMALL), True)):
        tower.bias.register_forward_hook(lambda *_, t=tower: calls.append(type(t)))
        y = tower(x)
        dead = set(find_dead(tower, y.square().sum()))
        assert {f"bias.{n}" for n, _ in tower.bias.named_parameters()} <= dead or moves
        randomise(tower.bias)
        assert torch.equal(tower(x), y) != moves
        if moves:
            assert not [n for n in dead if n.startswith("bias.")]
    assert calls == [PublishedCTViT] * 2 + [CTViT] * 2


@torch.no_grad()
def test_the_network_sees_every_pair_though_offsets_would_do():
    torch.manual_seed(0)
    one, two, rows = PublishedPositionBias(2, 8), PositionBias(2, 8), []
    two.load_state_dict(one.state_dict())
    for net in (one, two):
        net.net.register_forward_hook(lambda m, a, y: rows.append(y[..., 0].numel()))
    torch.testing.assert_close(one(4, 5), two(4, 5), rtol=0, atol=1e-6)
    assert rows == [20 * 20, 7 * 9]


# -- attention -------------------------------------------------------------------------
@torch.no_grad()
def test_ours_is_the_published_function_when_no_switch_is_on():
    torch.manual_seed(0)
    one = PublishedCTViT(**SMALL)
    two = CTViT(**SMALL, **AS_PUBLISHED, position="none")
    for layer in one.temporal.layers:  # ours convolves the body as it lies
        layer.peg = None
    for layer in two.temporal.layers:
        layer.peg = None
    for ours, theirs in zip(two.spatial.layers, one.spatial.layers, strict=True):
        assert ours.attention.to_q.weight.shape == theirs.attention.to_q.weight.shape
    state = one.state_dict()
    for name, value in state.items():  # GEGLU's halves are the other way round
        if name.endswith("to_gate_value.weight"):
            state[name] = torch.cat(value.chunk(2)[::-1])
    missing = two.load_state_dict(state, strict=False)
    assert missing.missing_keys == []
    left = {n.split(".")[0] for n in missing.unexpected_keys if "context_norm" not in n}
    assert left == {"bias", "decoder_spatial", "decoder_temporal", "to_pixels"}
    x = torch.randn(2, 1, 8, 6, 8)
    torch.testing.assert_close(two(x), one(x), rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_flash_path_computes_something_else_and_ours_does_not():
    far, near = [], []
    for seed in range(3):
        torch.manual_seed(seed)
        one = PublishedAttention(64, 2, 32, flash=False, rms=False)
        two = PublishedAttention(64, 2, 32, flash=True, rms=False)
        two.load_state_dict(one.state_dict(), strict=False)
        ours = Attention(64, 2, 32, "layer", "fused")
        ours.load_state_dict(one.state_dict(), strict=False)
        x = torch.randn(2, 64, 64)
        far.append(distance(two(x), one(x)))
        near.append(distance(ours(x), one(x)))
    assert min(far) > 0.5
    assert max(near) < 1e-5
    # What is left out, one by one: 8 cosines against q k / sqrt(32), in float16.
    q, k, v = two.project(x)
    want = F.scaled_dot_product_attention(q, k, v, scale=32**-0.5)
    want = two.to_out(want.transpose(1, 2).flatten(2))
    torch.testing.assert_close(two(x), want, rtol=0, atol=2e-3)
    assert not hasattr(two, "q_scale")
    assert not torch.equal(two(x), want)  # float16 inside a float32 model


def test_the_context_norm_is_dead_weight():
    module = PublishedAttention(512, 8, 32, flash=False, rms=False)
    assert sum(p.numel() for p in module.parameters()) == 525_376
    dead = find_dead(module, module(torch.randn(1, 3, 512)).sum())
    assert dead == ["context_norm.weight"]


# -- norms -----------------------------------------------------------------------------
def test_the_norm_switch_reaches_two_of_26():
    with torch.device("meta"):
        assert norms_by_type(PublishedCTViT()) == {"LayerNorm": 26}
        assert norms_by_type(PublishedCTViT(**ALL_ON)) == {
            "RMSNorm": 2,
            "LayerNorm": 24,
        }
        rms = norms_by_type(PublishedCTViT(rms=True))
        assert rms == {"RMSNorm": 18, "LayerNorm": 8}
        assert norms_by_type(CTViT()) == {"RMSNorm": 18}  # 8 fewer: no context norms
        assert norms_by_type(CTViT(norm="layer")) == {"LayerNorm": 18}


@torch.no_grad()
def test_eps_beside_the_root_fails_in_half_precision():
    theirs, ours = PublishedRMSNorm(8).half(), make_norm("rms", 8).half()
    zeros, large = torch.zeros(1, 8).half(), torch.full((1, 8), 1e4).half()
    assert theirs(zeros).isnan().all()
    assert torch.equal(theirs(large), zeros)  # the squares overflow
    assert torch.equal(theirs(large / 1e4), torch.ones_like(large))
    assert torch.equal(ours(zeros), zeros)
    torch.testing.assert_close(ours(large), torch.ones_like(large))
    x = torch.randn(3, 8)
    torch.testing.assert_close(theirs.float()(x), ours.float()(x))


# -- feed-forward ----------------------------------------------------------------------
@torch.no_grad()
def test_the_gates_read_different_halves():
    torch.manual_seed(0)
    x = torch.randn(5, 12)

    def read(cls, kind):
        module = cls(12, kind, "layer", None)
        module.to_out.weight.copy_(torch.eye(12, 32))
        module.to_gate_value.weight.zero_()
        module.to_gate_value.weight[:32].copy_(torch.eye(32, 12))  # first half only
        module.to_gate_value.weight[32:, 0] = 100.0  # the second: large where x0 > 0
        normed = module.norm(x)
        return module(x)[:, 1], normed[:, 1], 100 * normed[:, 0]

    for cls, kind, gate_first in (
        (PublishedFeedForward, "geglu", False),
        (PublishedFeedForward, "swiglu", True),
        (FeedForward, "geglu", True),
        (FeedForward, "swiglu", True),
    ):
        got, first, second = read(cls, kind)
        act = F.gelu if kind == "geglu" else F.silu
        want = act(first) * second if gate_first else act(second) * first
        torch.testing.assert_close(got, want)


# -- the convolution in depth ----------------------------------------------------------
@torch.no_grad()
def test_the_layers_in_depth_convolve_another_order():
    torch.manual_seed(0)
    x = torch.randn(1, 4, 3, 5, 16)
    changed = x.clone()
    changed[0, 2, 1, 2] += 1
    for tower, right in ((PublishedCTViT(**SMALL), False), (CTViT(**SMALL), True)):
        peg = tower.temporal.layers[0].peg
        where = (peg(changed) - peg(x)).abs().sum(-1)[0].gt(1e-6).nonzero()
        below = {(d, i, j) for d in (2, 3) for i in (0, 1, 2) for j in (1, 2, 3)}
        assert ({tuple(w.tolist()) for w in where} == below) == right
    # A cube only changes names: the rows are what the convolution takes for depth.
    cube, peg = (
        torch.randn(1, 4, 4, 4, 16),
        PublishedCTViT(**SMALL).temporal.layers[0].peg,
    )
    plain = CTViT(**SMALL).spatial.layers[0].peg
    plain.load_state_dict(peg.state_dict())
    want = plain(cube.permute(0, 2, 3, 1, 4)).permute(0, 3, 1, 2, 4)
    torch.testing.assert_close(peg(cube), want)


# -- what nothing reaches --------------------------------------------------------------
def test_ledger_of_the_published_size():
    told = published_ledger()
    rows = {name: row.parameters for name, row in told.rows.items()}
    decoder = 2 * 10_550_016 + 512 * 4000 + 4000
    copies = 294_912 * 512 + 768 * 512
    assert decoder == 23_152_032
    dead = decoder + copies + 268_296 + 8 * 512
    assert rows["dead"] == dead == 174_812_584
    image = 23_425_864 + decoder
    assert image == 46_577_896
    assert told.total.parameters == image + 2 * copies + 1  # and the temperature
    whole = told.total.parameters + published.BERT_BASE
    assert whole == 458_836_457
    assert 0.38 < dead / whole < (dead + published.BERT_POOLER) / whole < 0.383
    flash = published_ledger(flash=True)
    assert flash.total.parameters - told.total.parameters == 46_593_256 - image


def test_the_size_of_a_bert_base():
    words, places, width, inner = 30_522, 512, 768, 3072
    norm, square = 2 * width, width * width + width
    layer = 4 * square + 2 * width * inner + inner + width + 2 * norm
    whole = (words + places + 2) * width + norm + 12 * layer + square
    assert whole == published.BERT_BASE
    assert square == published.BERT_POOLER


def test_ours_has_no_second_copies():
    torch.manual_seed(0)
    theirs = PublishedCTCLIP(PublishedCTViT(**SMALL), 12, 8, loss="sigmoid")
    ours = CTCLIP(CTViT(**SMALL, **AS_PUBLISHED), 12, 8, "published")
    volumes, features = torch.randn(3, 1, 8, 6, 8), torch.randn(3, 12)
    for model, some in ((theirs, True), (ours, False)):
        dead = find_dead(model, model.loss(*model(volumes, features)))
        assert bool(dead) == some
    reached = {n for n, _ in theirs.named_parameters()} - set(
        find_dead(theirs, theirs.loss(*theirs(volumes, features)))
    )
    bias = {
        f"image_tower.bias.{n}" for n, _ in ours.image_tower.bias.named_parameters()
    }
    assert {n for n, _ in ours.named_parameters()} == reached | bias


# -- the temperature -------------------------------------------------------------------
def test_where_the_two_losses_start_and_how_far_they_can_go():
    starts = {}
    for loss in ("softmax", "sigmoid"):
        model = PublishedCTCLIP(PublishedCTViT(**SMALL), 12, 8, loss=loss)
        starts[loss] = model.log_scale.exp().item()
    assert starts == pytest.approx({"softmax": 2.718282, "sigmoid": 10.0})
    reach = temperature_reach()
    assert reach == pytest.approx(0.0059, abs=1e-4)
    assert reach < 0.01 * (torch.tensor(10.0).log().item() - 1)  # of the gap


def test_adam_moves_a_number_by_its_rates_whatever_the_gradient():
    steps, lr, ends = 60, 1e-3, {}
    for size in (1e-4, 1.0, 1e4):
        p = torch.nn.Parameter(torch.zeros(()))
        adam = torch.optim.AdamW([p], lr=1.0, betas=(0.9, 0.99), weight_decay=0.0)
        for t in range(steps):
            before = temperature_reach(lr, t, 10, 1.0) if t else 0.0
            rate = temperature_reach(lr, t + 1, 10, 1.0) - before
            adam.param_groups[0]["lr"] = rate
            p.grad = torch.tensor(size)
            adam.step()
        ends[size] = -p.item()
    # Constant after the warm-up, so the sum is simple as well.
    assert ends[1.0] == pytest.approx(temperature_reach(lr, steps, 10, 1.0), rel=1e-3)
    assert ends[1e-4] == pytest.approx(ends[1e4], rel=1e-3)


def test_a_rate_of_its_own_lets_the_temperature_move():
    model = PublishedCTCLIP(PublishedCTViT(**SMALL), 12, 8, loss="sigmoid")
    rates = {id(p): g["lr"] for g in param_groups(model, 1.25e-6, 1e-2)
             for p in g["params"]}  # fmt: skip
    assert rates[id(model.log_scale)] == rates[id(model.logit_bias)] == 1e-2
    assert rates[id(model.to_text.weight)] == 1.25e-6
