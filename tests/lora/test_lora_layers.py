"""Layers against peft, shapes, merging, ranks."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from medtut.lora import (
    LoRAConfig,
    LoRAConv1d,
    LoRAConv2d,
    LoRAConv3d,
    LoRAError,
    LoRAFusedLinear,
    LoRALinear,
    LoRAMultiheadAttention,
    adapter_parameters,
    delta_weight,
    inject,
    merge,
    unmerge,
    update_norm,
)

from .parity import assert_parity, close, peft_linear

CONVS = {1: (nn.Conv1d, LoRAConv1d), 2: (nn.Conv2d, LoRAConv2d)}
CONVS[3] = (nn.Conv3d, LoRAConv3d)


def fill(layer, seed=0):
    """Random non-zero factors, as after training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in layer.named_parameters():
            if "lora_magnitude" in name:
                p.mul_(1 + 0.3 * torch.rand(p.shape, generator=generator))
            elif "lora_" in name:
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    return layer


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scaling", ["alpha/r", "alpha/sqrt(r)"])
def test_linear_is_pefts(scaling, bias):
    def make(base, r, alpha):
        return LoRALinear(base, r, alpha, scaling=scaling)

    assert_parity(make, bias=bias, use_rslora=scaling != "alpha/r")


@pytest.mark.parametrize(
    "wrong", [lambda r, a: (r, r), lambda r, a: (r, a * r), lambda r, a: (r, a + 0.01)]
)
def test_parity_notices_a_wrong_scale(wrong):
    def make(base, r, alpha):
        return LoRALinear(base, *wrong(r, alpha))

    with pytest.raises(AssertionError, match="differs"):
        assert_parity(make)


def test_scaling_none_is_one():
    assert_parity(lambda b, r, a: LoRALinear(b, r, a, scaling="none"), r=4, alpha=4.0)


def twin_grads(ours, theirs, x):
    """Outputs and input gradients of two modules for the same loss."""
    xs, ys = [], []
    for module in (ours, theirs):
        given_x = x.clone().requires_grad_()
        y = module(given_x)
        (y**2).sum().backward()
        xs.append(given_x.grad)
        ys.append(y)
    close(ys[0], ys[1], "output")
    close(xs[0], xs[1], "gradient of the input")


def test_dora_linear_is_pefts():
    torch.manual_seed(0)
    base = nn.Linear(12, 10)
    ours = fill(LoRALinear(copy.deepcopy(base), 4, 7.0, variant="dora"))
    theirs = peft_linear(copy.deepcopy(base), 4, 7.0, use_dora=True)
    close(
        LoRALinear(base, 4, 7.0, variant="dora").lora_magnitude,
        theirs.lora_magnitude_vector["default"].weight,
        "magnitude at the start",
    )
    m = theirs.lora_magnitude_vector["default"].weight
    with torch.no_grad():
        theirs.lora_A["default"].weight.copy_(ours.A)
        theirs.lora_B["default"].weight.copy_(ours.B)
        m.copy_(ours.lora_magnitude)
    twin_grads(ours, theirs, torch.randn(3, 5, 12))
    close(ours.A.grad, theirs.lora_A["default"].weight.grad, "A")
    close(ours.B.grad, theirs.lora_B["default"].weight.grad, "B")
    close(ours.lora_magnitude.grad, m.grad, "magnitude")


def test_pissa_is_pefts():
    torch.manual_seed(0)
    base = nn.Linear(12, 10)
    ours = LoRALinear(copy.deepcopy(base), 4, 7.0, variant="pissa")
    theirs = peft_linear(copy.deepcopy(base), 4, 7.0, init_lora_weights="pissa")
    x = torch.randn(3, 12)
    close(ours(x), base(x), "PiSSA starts as the base")
    assert torch.equal(ours.weight, base.weight)  # no residual in the base
    tA, tB = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
    close((ours.B @ ours.A), (tB @ tA), "principal part")
    with torch.no_grad():  # singular vectors are defined up to a sign
        sign = torch.sign((ours.A * tA).sum(1))
        tA.mul_(sign[:, None])
        tB.mul_(sign)
        step = 0.1 * torch.randn(4, 12)
        for A, B in ((ours.A, ours.B), (tA, tB)):
            A.add_(step)
            B.mul_(1.5)
    twin_grads(ours, theirs, x)
    close(ours.A.grad, tA.grad, "A")
    close(ours.B.grad, tB.grad, "B")


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_conv_is_pefts(dims, dora):
    import peft
    from peft.tuners.lora import layer as peft_layer

    torch.manual_seed(dims)
    plain, adapted = CONVS[dims]
    base = plain(6, 8, 3, stride=2, padding=1)
    variant = "dora" if dora else "lora"
    ours = fill(adapted(copy.deepcopy(base), 4, 7.0, variant=variant))
    config = peft.LoraConfig(r=4, lora_alpha=7.0, use_dora=dora)
    kind = getattr(peft_layer, f"Conv{dims}d")
    theirs = kind(copy.deepcopy(base), "default", config=config, r=4, lora_alpha=7.0)
    tA, tB = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
    with torch.no_grad():
        tA.copy_(ours.A)
        tB.copy_(ours.B)
        if dora:
            m = theirs.lora_magnitude_vector["default"].weight
            m.copy_(ours.lora_magnitude.view_as(m))
    twin_grads(ours, theirs, torch.randn(2, 6, *[7] * dims))
    close(ours.A.grad, tA.grad, "A")
    close(ours.B.grad, tB.grad, "B")
    if dora:
        close(ours.lora_magnitude.grad, m.grad.view(-1), "magnitude")


def test_grouped_conv_is_a_block_diagonal_peft_conv():
    import peft
    from peft.tuners.lora.layer import Conv2d

    from medtut.lora.io import peft_tensors

    torch.manual_seed(0)
    base = nn.Conv2d(6, 9, 3, padding=1, groups=3)
    ours = fill(LoRAConv2d(copy.deepcopy(base), 2, 5.0))
    config = peft.LoraConfig(r=6, lora_alpha=15.0)
    theirs = Conv2d(copy.deepcopy(base), "default", config=config, r=6, lora_alpha=15.0)
    tensors = peft_tensors(ours)
    tA, tB = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
    with torch.no_grad():
        tA.copy_(tensors["lora_A.weight"])
        tB.copy_(tensors["lora_B.weight"])
    twin_grads(ours, theirs, torch.randn(2, 6, 7, 7))
    close(ours.B.grad, tB.grad, "B")
    # Ours shares one A: its gradient is the sum over the diagonal blocks.
    blocks = tA.grad.view(3, 2, 3, 2, 3, 3)
    close(ours.A.grad, sum(blocks[i, :, i] for i in range(3)), "A")


def test_fused_part_is_its_own_linear():
    """v alone in a fused qkv is a LoRA on the v rows taken as a layer."""
    torch.manual_seed(0)
    base = nn.Linear(6, 18)
    ours = fill(LoRAFusedLinear(base, 3, 7.0, parts=("query", "value")))
    x = torch.randn(4, 6)
    out = ours(x)
    alone = copy.deepcopy(base)(x)
    close(out[:, 6:12], alone[:, 6:12], "key is not adapted")
    for rows, slot in zip((slice(0, 6), slice(12, 18)), ours.slots(), strict=True):
        part = nn.Linear(6, 6)
        part.weight = nn.Parameter(base.weight[rows].clone())
        part.bias = nn.Parameter(base.bias[rows].clone())
        theirs = peft_linear(part, 3, 7.0)
        theirs.lora_A["default"].weight.data.copy_(slot.A)
        theirs.lora_B["default"].weight.data.copy_(slot.B)
        close(out[:, rows], theirs(x), slot.part)


def test_per_head_layout_takes_each_heads_rows():
    base = nn.Linear(4, 12)
    layer = fill(LoRAFusedLinear(base, 2, parts=("key",), layout="per-head", heads=2))
    changed = delta_weight(layer).abs().sum(1) > 0
    # head 0: q q k k v v, head 1: q q k k v v
    assert changed.tolist() == [False, False, True, True, False, False] * 2
    with pytest.raises(LoRAError, match="number of heads"):
        LoRAFusedLinear(nn.Linear(4, 12), 2, layout="per-head")


LAYERS = {
    "linear": lambda **k: (LoRALinear(nn.Linear(12, 10), 4, 7.0, **k), (3, 12)),
    "fused": lambda **k: (LoRAFusedLinear(nn.Linear(6, 18), 3, 7.0, **k), (3, 6)),
    "per-head": lambda **k: (
        LoRAFusedLinear(nn.Linear(6, 18), 3, layout="per-head", heads=3, **k),
        (3, 6),
    ),
    "conv1d": lambda **k: (LoRAConv1d(nn.Conv1d(4, 6, 3), 3, 7.0, **k), (2, 4, 9)),
    "grouped": lambda **k: (
        LoRAConv2d(nn.Conv2d(4, 8, 3, 2, 2, dilation=2, groups=2), 3, 7.0, **k),
        (2, 4, 9, 9),
    ),
    "depthwise": lambda **k: (
        LoRAConv2d(
            nn.Conv2d(8, 8, 3, groups=8, padding_mode="reflect", padding=1), 3, **k
        ),
        (2, 8, 9, 9),
    ),
    "conv3d": lambda **k: (
        LoRAConv3d(nn.Conv3d(2, 4, 3), 2, 7.0, **k),
        (1, 2, 5, 5, 5),
    ),
}


@pytest.mark.parametrize("variant", ["lora", "dora", "pissa"])
@pytest.mark.parametrize("kind", LAYERS)
def test_merged_equals_unmerged_and_comes_back(kind, variant):
    torch.manual_seed(0)
    layer, shape = LAYERS[kind](variant=variant)
    fill(layer)
    before = layer.weight.detach().clone()
    x = torch.randn(shape)
    apart = layer(x)
    layer.merge()
    layer.merge()  # a second merge is none
    assert not torch.equal(layer.weight, before)
    layer.train().eval().train()
    assert layer.merged
    close(layer(x), apart, "merged output")
    layer.unmerge()
    assert torch.equal(layer.weight, before)
    assert torch.equal(layer(x), apart)
    close(delta_weight(layer), layer.effective_weight("weight") - before, "delta")


@pytest.mark.parametrize("kind", LAYERS)
def test_dora_on_a_row_of_zeros_is_finite_and_learns(kind):
    """A zero-initialised or pruned row has no direction: 0 / 0 without care."""
    torch.manual_seed(0)
    plain, shape = LAYERS[kind](variant="lora")
    base = plain.restore()
    with torch.no_grad():
        base.weight[1] = 0
    x = torch.randn(shape)
    layer = type(plain)(base, 2, variant="dora")
    close(layer(x), base(x), "at the start")
    (layer(x) - 1).square().sum().backward()
    grads = {n: p.grad for n, p in layer.named_parameters() if "lora_" in n}
    assert all(g.isfinite().all() for g in grads.values())
    assert all(g[1].any() for n, g in grads.items() if "_B" in n)
    layer.merge()
    assert layer.weight.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_unmerge_is_exact_in_every_dtype(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Conv2d(16, 16, 3)).to(dtype)
    inject(model, LoRAConfig(r=4, pattern=r"^[01]$"))
    fill(model)
    assert {p.dtype for _, p in adapter_parameters(model)} == {torch.float32}
    before = {n: p.clone() for n, p in model.named_parameters()}
    for _ in range(20):
        merge(model)
        assert not torch.equal(model[0].weight, before["0.weight"])
        unmerge(model)
    for n, p in model.named_parameters():
        assert p.dtype == before[n].dtype
        assert torch.equal(p, before[n]), n


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_base_keeps_its_output_dtype(dtype):
    for kind in ("linear", "fused", "conv1d"):
        for variant in ("lora", "dora", "pissa"):
            layer, shape = LAYERS[kind](variant=variant)
            base = layer.restore().to(dtype)
            layer = type(layer)(base, 2, variant=variant)
            out = layer(torch.randn(shape, dtype=dtype))
            assert out.dtype == dtype
            out.float().sum().backward()
            assert layer.B.grad.dtype == torch.float32


def test_autocast():
    layer = fill(LoRALinear(nn.Linear(8, 8), 2))
    x = torch.randn(4, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    assert (out.float() - layer(x)).abs().max() < 0.1
    out.float().sum().backward()
    assert layer.A.grad is not None


def test_moving_a_merged_layer_moves_the_original_too():
    layer = fill(LoRALinear(nn.Linear(4, 4), 2))
    before = layer.weight.detach().clone()
    layer.merge()
    layer.double()
    layer.unmerge()
    assert layer.weight.dtype == torch.float64
    assert torch.equal(layer.weight, before.double())


def test_loading_weights_into_a_merged_layer_is_refused():
    layer = fill(LoRALinear(nn.Linear(4, 4), 2))
    state = layer.state_dict()
    layer.merge()
    with pytest.raises(LoRAError, match="unmerge"):
        layer.load_state_dict(state)


def test_base_is_bitwise_unchanged_by_training():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    before = {n: p.clone() for n, p in model.named_parameters()}
    inject(model, LoRAConfig(r=2, pattern="0|2", variant="dora"))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.1, weight_decay=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.randn(4, 8)).square().sum().backward()
        optimizer.step()
    after = dict(model.named_parameters())
    assert all(torch.equal(after[n], p) for n, p in before.items())
    assert len(after) == len(before) + 6
    assert all(v > 0 for v in update_norm(model).values())


def test_dropout_acts_on_the_branch_only_and_only_in_training():
    layer = fill(LoRALinear(nn.Linear(50, 4), 2, dropout=0.5))
    x = torch.randn(3, 50)
    torch.manual_seed(0)
    first, second = layer(x), layer(x)
    assert not torch.equal(first, second)
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    with torch.no_grad():
        layer.B.zero_()
    layer.train()
    plain = nn.functional.linear(x, layer.weight, layer.bias)
    assert torch.equal(layer(x), plain)


@settings(max_examples=40, deadline=None)
@given(
    fan_in=st.integers(1, 9),
    fan_out=st.integers(1, 9),
    r=st.integers(1, 9),
    lead=st.lists(st.integers(0, 3), max_size=3),
    variant=st.sampled_from(["lora", "dora", "pissa"]),
)
def test_linear_shapes(fan_in, fan_out, r, lead, variant):
    base = nn.Linear(fan_in, fan_out)
    if r > min(fan_in, fan_out):
        with pytest.raises(LoRAError, match="larger"):
            LoRALinear(base, r, variant=variant)
        return
    layer = LoRALinear(base, r, variant=variant)
    x = torch.randn(*lead, fan_in)
    assert layer(x).shape == base(x).shape
    assert layer.A.shape == (r, fan_in)
    assert layer.B.shape == (fan_out, r)
    assert delta_weight(layer).shape == base.weight.shape


@settings(max_examples=40, deadline=None)
@given(
    dims=st.integers(1, 3),
    groups=st.integers(1, 3),
    width=st.integers(1, 2),
    out=st.integers(1, 2),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    padding=st.integers(0, 2),
    dilation=st.integers(1, 2),
)
def test_conv_shapes(dims, groups, width, out, kernel, stride, padding, dilation):
    plain, adapted = CONVS[dims]
    base = plain(
        groups * width,
        groups * out,
        kernel,
        stride,
        padding,
        dilation=dilation,
        groups=groups,
    )
    layer = fill(adapted(base, 1, 3.0))
    x = torch.randn(2, groups * width, *[6] * dims)
    want = layer._conv_forward(x, layer.effective_weight("weight"), base.bias)
    close(layer(x), want, "branch against the weight it stands for")
    assert layer(x[0]).shape == want.shape[1:]


@pytest.mark.parametrize("r", [0, -1, 2.0, "8", True, None])
def test_bad_rank(r):
    for make in (lambda: LoRALinear(nn.Linear(8, 8), r), lambda: LoRAConfig(r=r)):
        with pytest.raises(LoRAError, match="at least 1"):
            make()
    with pytest.raises(LoRAError, match="rank_pattern"):
        LoRAConfig(rank_pattern={"x": r})


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        ({"alpha": 0}, "alpha"),
        ({"alpha": -1}, "alpha"),
        ({"alpha": float("nan")}, "alpha"),
        ({"alpha": "16"}, "alpha"),
        ({"dropout": 1.0}, "dropout"),
        ({"dropout": -0.1}, "dropout"),
        ({"dropout": "0.1"}, "dropout"),
        ({"scaling": "alpha"}, "scaling"),
        ({"variant": "vera"}, "variant"),
    ],
)
def test_bad_settings(bad, text):
    for make in (lambda: LoRALinear(nn.Linear(8, 8), **bad), lambda: LoRAConfig(**bad)):
        with pytest.raises(LoRAError, match=text):
            make()


def test_rank_larger_than_the_layer():
    with pytest.raises(LoRAError, match="at most 4"):
        LoRALinear(nn.Linear(4, 100), 5)
    with pytest.raises(LoRAError, match="at most 6"):
        LoRAFusedLinear(nn.Linear(60, 18), 7)
    with pytest.raises(LoRAError, match="at most 9"):
        LoRAConv2d(nn.Conv2d(16, 16, 3, groups=16), 10)
    with pytest.raises(LoRAError, match="at most 8"):
        LoRAMultiheadAttention(nn.MultiheadAttention(8, 2), 9)


def test_a_layer_alone_freezes_its_base():
    layer = LoRALinear(nn.Linear(4, 4), 2)
    trained = [n for n, p in layer.named_parameters() if p.requires_grad]
    assert trained == ["lora_A", "lora_B"]
