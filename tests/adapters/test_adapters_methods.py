"""Each method's exact count, its start at the identity, and no dead parameter."""

import copy
import itertools

import pytest
import torch
from torch import nn

from medtut.adapters import METHODS, AdapterError, adapt, find_parts
from medtut.adapters.layers import PHMLinear
from medtut.lora import LoRAError, adapted_layers, find_dead
from medtut.lora.layers import LoRALinear

# method, options, parameters of the method alone at feature size 48
COUNTS = [
    ("as-is", {}, 0),
    ("probe", {}, 0),
    ("spatial", {"kernel": 1}, 4_608),
    ("spatial", {"kernel": 3}, 124_416),
    ("lora", {"rank": 4, "joint": True}, 69_120),
    ("lora", {"rank": 4}, 34_560),
    ("lora", {"rank": 4, "adaptive": True}, 34_560 + 8 * 3 * 4),
    ("lora", {"rank": 64, "cap": True}, 6 * (64 * (96 + 192 + 384) * 2 + 48 * 48 * 2)),
    ("adaptformer", {}, 47_648),
    ("bias", {}, 12_960),
    ("bias", {"select": "all"}, 21_648),
    ("bias", {"select": "all+tables"}, 219_378),
    ("bias", {"select": "published"}, 210_690),
    ("norm", {}, 17_280),
    ("compacter", {}, 199_744),
    ("compacter", {"norms": True}, 217_024),
    ("full", {}, 8_062_002),
]
# Those that differ in what they add, for tests that run the network.
SMALL = [
    ("as-is", {}),
    ("probe", {}),
    ("spatial", {}),
    ("lora", {"rank": 4, "joint": True}),
    ("lora", {"rank": 4, "adaptive": True}),
    ("adaptformer", {}),
    ("bias", {"select": "all+tables"}),
    ("compacter", {"norms": True}),
    ("full", {}),
]
DECODER, BOTTLENECK, TOTAL = 19_597_824, 34_526_784, 62_188_031


def swin(width, outputs, **options):
    from monai.networks.nets import SwinUNETR

    torch.manual_seed(0)
    keys = {"in_channels": 1, "out_channels": outputs, "feature_size": width}
    return SwinUNETR(**keys, **options).eval()


@pytest.fixture(scope="module")
def meta():
    """Swin UNETR at feature 48, without the weights: a copy costs nothing."""
    return swin(48, 29).to("meta")


@pytest.fixture(scope="module")
def small():
    """A small network, a volume, and what the untouched network says of it."""
    model = swin(12, 5)
    x = torch.rand(1, 1, 64, 32, 32)  # its deepest map has two voxels, the least
    with torch.no_grad():
        return model, x, model(x)


@pytest.fixture(scope="module")
def unet():
    from monai.networks.nets import BasicUNet

    torch.manual_seed(0)
    width, norm = (8, 8, 16, 16, 32, 8), ("batch", {"affine": True})
    model = BasicUNet(3, 1, 4, width, norm=norm).eval()
    for p in model.parameters():  # biases and shifts that are not zero
        p.data += 0.01 * torch.randn_like(p)
    x = torch.rand(2, 1, 16, 16, 16)
    with torch.no_grad():
        return model, x, model(x)


def test_the_parts_of_the_published_network(meta):
    parts = find_parts(meta)
    sums = dict.fromkeys(("head", "decoder", "bottleneck", "backbone"), 0)
    for name, p in meta.named_parameters():
        sums[parts.of(name)] += p.numel()
    assert sums == {
        "head": 1_421,
        "decoder": DECODER,
        "bottleneck": BOTTLENECK,
        "backbone": 8_062_002,
    }
    assert sum(sums.values()) == TOTAL
    assert parts.decoder == tuple(f"decoder{i}" for i in (5, 4, 3, 2, 1))


@pytest.mark.parametrize(("method", "options", "own"), COUNTS)
def test_counts_at_feature_48(meta, method, options, own):
    model = copy.deepcopy(meta)
    done = adapt(model, method, structure=0, **options)
    assert done.counts["adapter"] == own
    assert done.counts["head"] == (0 if method == "as-is" else 49)
    others = (DECODER, BOTTLENECK) if method == "full" else (0, 0)
    assert (done.counts["decoder"], done.counts["bottleneck"]) == others
    named = dict(model.named_parameters())
    assert sum(done.counts.values()) == sum(p.numel() for p in named.values())
    assert [n for n, p in named.items() if p.requires_grad] == list(done.trainable)
    assert done.total == sum(named[n].numel() for n in done.trainable)
    if method == "full":
        assert done.total == 62_186_659


@pytest.mark.parametrize("policy", ["fine-tuned", "new"])
def test_decoder_and_bottleneck(meta, policy):
    done = adapt(copy.deepcopy(meta), "lora", structure=0, decoder=policy, joint=True)
    assert done.total == 19_666_993
    assert done.counts["decoder"] == DECODER
    done = adapt(copy.deepcopy(meta), "probe", classes=10, bottleneck=policy)
    assert (done.counts["bottleneck"], done.counts["head"]) == (BOTTLENECK, 490)


@pytest.mark.parametrize(("method", "options"), SMALL)
def test_identity_and_no_dead_parameter(small, method, options):
    base, x, before = small
    model = copy.deepcopy(base)
    done = adapt(model, method, structure=(None, 3), **options)
    assert not any(m.training for m in model.modules()) or method == "full"
    model.eval()
    with torch.no_grad():
        after = model(x)
    assert torch.allclose(after[:, 1], before[:, 3], atol=1e-6)
    assert not after[:, 0].any()
    # A factor at zero hides the gradient of its partner, so none may be at zero here.
    for p in done.parameters(model):
        p.data += 0.01 * torch.randn_like(p)
    if method == "as-is":
        assert done.trainable == ()
        return
    after = model(x)
    loss = after.softmax(1)[:, 1].mean() + after.square().mean()
    assert find_dead(model, loss) == []
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert set(grads) == set(done.trainable)
    assert [n for n, grad in grads.items() if not grad.any()] == []


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("probe", {}),
        ("spatial", {}),
        ("lora", {"rank": 2}),
        ("bias", {}),
        ("norm", {}),
        ("full", {}),
    ],
)
def test_the_u_net(unet, method, options):
    base, x, before = unet
    model = copy.deepcopy(base)
    done = adapt(model, method, structure=2, decoder="fine-tuned", **options)
    assert torch.allclose(model.eval()(x)[:, 0], before[:, 2], atol=1e-6)
    parts = done.parts
    decoder = [n for n, _ in base.named_parameters() if n.startswith("upcat")]
    assert set(decoder) <= set(done.trainable)
    assert done.counts["decoder"] == sum(base.get_parameter(n).numel() for n in decoder)
    assert done.counts["head"] == 9
    own = [n for n in done.trainable if parts.of(n) == "backbone"]
    encoder = [n for n in own if n.startswith(("conv_0", "down_"))]
    assert own == encoder
    if method == "lora":
        layers = adapted_layers(model)
        assert len(layers) == 10  # two in each of the five levels
        assert done.counts["adapter"] == sum(
            2 * (m.weight[0].numel() + len(m.weight)) for m in layers.values()
        )
    if method in ("bias", "norm"):
        assert len(own) == {"bias": 20, "norm": 20}[method]


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_u_net_of_suprem_pools_without_a_module(wrapped):
    from medtut.models.suprem_unet import SupremUNet

    with torch.device("meta"):
        model = SupremUNet(32)
    named, prefix = dict(model.named_parameters()), ""
    if wrapped:
        model, prefix = nn.Sequential(model), "0."
    parts = find_parts(model)
    assert parts.head == f"{prefix}classifier"
    assert parts.decoder == tuple(f"{prefix}up_tr{n}" for n in (256, 128, 64))
    done = adapt(model, "lora", structure=3, decoder="fine-tuned", rank=4)
    up = sum(p.numel() for n, p in named.items() if n.startswith("up_tr"))
    assert (done.counts["decoder"], done.counts["head"]) == (up, 65)
    widths = (1, 32, 64, 64, 128, 128, 256, 256, 512)
    pairs = itertools.pairwise(widths)
    assert done.counts["adapter"] == sum(4 * (27 * a + b) for a, b in pairs)


def test_what_does_not_fit_is_refused_and_changes_nothing(unet, small):
    for (base, x, before), cases in (
        (
            unet,
            [
                ({"method": "adaptformer"}, "no transformer MLP"),
                ({"method": "compacter"}, "no transformer attention"),
                ({"method": "lora", "joint": True}, "fused projections"),
                ({"method": "lora", "roles": ("query",)}, "role of query"),
                ({"method": "bias", "select": "blocks"}, "usable here: all"),
                ({"method": "probe", "bottleneck": "new"}, "possible here: frozen$"),
            ],
        ),
        (
            small,
            [
                ({"method": "lora2"}, "no method 'lora2'"),
                ({"method": "lora", "rank": 0}, "at least 1"),
                ({"method": "lora", "rank": 500}, "larger than"),
                ({"method": "lora", "rank": 5, "joint": True}, "larger than"),
                ({"method": "adaptformer", "rank": -1}, "at least 1"),
                ({"method": "adaptformer", "ranks": 1}, "which has: rank, scale"),
                ({"method": "compacter", "n": 5}, "does not divide"),
                ({"method": "spatial", "kernel": 2}, "kernel"),
                ({"method": "bias", "select": "some"}, "usable here"),
                (
                    {"method": "probe", "decoder": "old"},
                    "possible here: frozen, fine-tuned",
                ),
                ({"method": "as-is", "decoder": "new"}, "here: frozen$"),
                ({"method": "probe", "structure": 5}, "rows 0 to 4"),
                (
                    {"method": "probe", "structure": (0, 1), "classes": 3},
                    "does not fit",
                ),
            ],
        ),
    ):
        model = copy.deepcopy(base)
        names = list(model.state_dict())
        for case, message in cases:
            with pytest.raises((AdapterError, LoRAError), match=message):
                adapt(model, **case)
        assert list(model.state_dict()) == names
        if base is unet[0]:
            assert torch.equal(model(x), before)
    adapt(model, "spatial")
    with pytest.raises(AdapterError, match="adapted already"):
        adapt(model, "lora")


def test_every_method_is_tested():
    assert {method for method, _, _ in COUNTS} == set(METHODS)


def test_joint_lora_has_the_published_form_and_scale(meta):
    model = copy.deepcopy(meta)
    adapt(model, "lora", rank=4, joint=True, scaling="none")
    layers = adapted_layers(model)
    assert len(layers) == 8
    for name, layer in layers.items():
        assert name.endswith("qkv")
        assert type(layer) is LoRALinear
        width = layer.in_features
        assert (layer.A.shape, layer.B.shape) == ((12, width), (3 * width, 12))
        assert layer.spec.scale == 1
    model = copy.deepcopy(meta)
    adapt(model, "lora", rank=4, joint=True, alpha=4)
    assert {m.spec.scale for m in adapted_layers(model).values()} == {1.0}
    model = copy.deepcopy(meta)
    adapt(model, "lora", rank=4, joint=True)
    assert {m.spec.scale for m in adapted_layers(model).values()} == {2.0}


def test_phm_is_a_sum_of_kronecker_products():
    layer = PHMLinear(8, 4)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    x = torch.randn(3, 8)
    H = sum(torch.kron(layer.rule[i], layer.weight[i]) for i in range(4))
    assert torch.allclose(layer(x), x @ H + layer.bias, atol=1e-6)


def test_adaptformer_reads_the_normalised_tokens_and_keeps_drop_path():
    model = swin(12, 2, dropout_path_rate=0.5)
    parts = find_parts(model)
    adapt(model, "adaptformer", scale=0.5, rank=3)
    block = model.swinViT.layers4[0].blocks[1]
    branch = block.mlp.hung_adapter
    nn.init.normal_(branch.up.weight)
    x = torch.randn(1, 2, 2, 2, 96)
    tokens = block.norm2(x)
    mlp = block.mlp.linear2(block.mlp.fn(block.mlp.linear1(tokens)))
    down = torch.relu(tokens @ branch.down.weight.T + branch.down.bias)
    want = mlp + 0.5 * (down @ branch.up.weight.T + branch.up.bias)
    assert torch.allclose(block.forward_part2(x), want, atol=1e-5)
    block.train()
    block.drop_path.drop_prob = 1 - 1e-7  # everything is dropped, the branch too
    assert not block.forward_part2(x).any()
    assert parts.backbone == "swinViT"


def test_the_head_alone_runs_the_spatial_adapter_on_cached_features(small):
    base, x, before = small
    model, kept = copy.deepcopy(base), []
    done = adapt(model, "spatial", structure=1)
    head = model.get_submodule(done.parts.head)
    nn.init.normal_(head.hung_adapter.up.weight)
    # Hooked after the adapter, and still the map before it: what a cache stores.
    hook = head.register_forward_pre_hook(lambda _, got: kept.append(got[0]))
    after = model(x)
    hook.remove()
    assert kept[0].shape == (1, 12, 64, 32, 32)
    assert torch.equal(head(kept[0]), after)
    assert not torch.allclose(after[:, 0], before[:, 1], atol=1e-2)
    assert torch.allclose(base.out.conv.conv(kept[0]), before, atol=1e-6)
