"""VGG16: counts, weights from files, adapters, the frozen part kept, the spread."""

import copy
from math import prod

import numpy as np
import pytest
import torch
from torch import nn

from medtut.data.assets import status
from medtut.errors import MedtutError
from medtut.lora import (
    LoRAError,
    adapted_layers,
    load_adapter,
    merge,
    save_adapter,
    unmerge,
)
from medtut.models.prefix import PrefixCache, first_trainable, run, stages
from medtut.models.vgg import (
    adapt,
    build_other,
    conv_blocks,
    head_name,
    load_features,
    output_spread,
    to_input,
    vgg16,
)

CHANNELS = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
CONVS = list(zip((3, *CHANNELS[:-1]), CHANNELS, strict=True))  # (in, out)
SMALL = {"width": 0.0625, "hidden": 24}
ASSET = "vgg16-imagenet-conv"


def count(model, trained=False):
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trained)


def small(seed=0, **settings):
    return vgg16(**{**SMALL, **settings}, seed=seed)


def pictures(n=3, side=32, seed=0):
    grey = torch.rand(n, side, side, generator=torch.Generator().manual_seed(seed))
    return to_input(grey, "torchvision")


def stir(model, seed=1):
    """Adapters away from their start at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            for slot in layer.slots():
                noise = torch.randn(slot.B.shape, generator=generator)
                slot.B.add_(0.1 * noise)
    return model


# -- architecture ---------------------------------------------------------------
def test_counts_of_the_architecture():
    trunk = sum(9 * i * o + o for i, o in CONVS)
    top = 25088 * 4096 + 4096 + 4096 * 4096 + 4096
    with torch.device("meta"):
        thousand, four, pooled = vgg16(1000), vgg16(), vgg16(head="pooled")
    assert count(thousand.features) == trunk == 14_714_688
    assert count(thousand) == trunk + top + 4097 * 1000 == 138_357_544
    assert count(four) == trunk + top + 4097 * 4 == 134_276_932
    assert count(pooled) == trunk + 1025 * 4


def test_names_and_numbers_are_torchvisions():
    from torchvision.models import VGG
    from torchvision.models import vgg16 as reference

    with torch.device("meta"):
        ours, theirs = vgg16(1000), reference()
    assert isinstance(ours, VGG)
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (ours, theirs)]
    assert shapes[0] == shapes[1]
    assert str(ours) == str(theirs)


def test_any_side_and_seed():
    model, again, other = small().eval(), small().eval(), small(seed=1).eval()
    state = torch.get_rng_state()
    small()
    assert torch.equal(torch.get_rng_state(), state)
    for side in (32, 64, 96):
        y = model(pictures(2, side))
        assert y.shape == (2, 4)
        assert torch.equal(y, again(pictures(2, side)))
        assert not torch.equal(y, other(pictures(2, side)))
    assert small(head="pooled").eval()(pictures()).shape == (3, 4)


@pytest.mark.parametrize("change", [{"init": "xavier"}, {"head": "gap"}])
def test_unknown_settings(change):
    with pytest.raises(MedtutError, match=next(iter(change.values()))):
        vgg16(**change)


def test_both_starts():
    he, plain = (small(width=0.25, init=i).features[10].weight for i in ("he", "torch"))
    fan = prod(he.shape[1:])
    assert he.std().item() == pytest.approx((2 / fan) ** 0.5, rel=0.05)
    assert plain.std().item() == pytest.approx((1 / 3 / fan) ** 0.5, rel=0.05)
    assert plain.abs().max() <= fan**-0.5


# -- inputs ---------------------------------------------------------------------
def test_inputs_in_both_conventions():
    grey = torch.tensor([[[0.0, 1.0], [0.5, 0.25]]])
    keras, torchy = (to_input(grey, c) for c in ("keras", "torchvision"))
    assert keras.shape == (1, 3, 2, 2)
    assert keras.dtype == torch.float32
    want = [-103.939, -116.779, -123.68]  # blue, green, red
    np.testing.assert_allclose(keras[0, :, 0, 0], want, rtol=1e-6)
    np.testing.assert_allclose(keras[0, :, 0, 1], 255 + np.array(want), rtol=1e-6)
    red = (0.25 - 0.485) / 0.229
    assert torchy[0, 0, 1, 1].item() == pytest.approx(red)
    assert torchy[0, 2, 1, 1].item() == pytest.approx((0.25 - 0.406) / 0.225)
    assert torch.equal(to_input(grey.numpy(), "keras"), keras)


@pytest.mark.parametrize(
    ("grey", "convention", "said"),
    [
        (torch.zeros(1, 2, 2, dtype=torch.uint8), "keras", "divide bytes"),
        (torch.full((1, 2, 2), 255.0), "keras", "255"),
        (torch.full((1, 2, 2), float("nan")), "keras", "nan"),
        (torch.zeros(2, 2), "keras", r"\(N, H, W\)"),
        (torch.zeros(1, 2, 2), "caffe", "caffe"),
        (torch.zeros(1, 2, 2), nn.Identity(), "convention"),
    ],
)
def test_bad_inputs(grey, convention, said):
    with pytest.raises(MedtutError, match=said):
        to_input(grey, convention)


# -- weights --------------------------------------------------------------------
def write_onnx(path, change=lambda tensors: tensors):
    """A file with Keras' names for a trunk of width 1/16, and a head to be dropped."""
    import onnx

    generator = np.random.default_rng(0)
    model, tensors = small(), {}
    numbers = dict.fromkeys(range(1, 6), 0)
    for name, block in conv_blocks(model).items():
        numbers[block] += 1
        shape = model.get_submodule(name).weight.shape
        stem = f"functional_1/block{block}_conv{numbers[block]}_1"
        weight = generator.normal(size=tuple(shape)).astype("float32")
        tensors[f"{stem}/convolution/ReadVariableOp:0"] = weight
        bias = generator.normal(size=shape[0]).astype("float32")
        tensors[f"{stem}/Squeeze:0"] = bias
    tensors["functional_1/dense_1/Cast/ReadVariableOp:0"] = np.ones((32, 4), "float32")
    tensors = change(dict(reversed(tensors.items())))  # the order must not matter
    stored = [onnx.numpy_helper.from_array(v, k) for k, v in tensors.items()]
    graph = onnx.helper.make_graph([], "g", [], [], stored)
    onnx.save(onnx.helper.make_model(graph), str(path))
    return tensors


def test_convolutions_from_onnx(tmp_path):
    tensors = write_onnx(tmp_path / "a.onnx")
    model = small()
    head = model.classifier[0].weight.clone()
    assert load_features(model, tmp_path / "a.onnx") == model.convention == "keras"
    assert len(model.loaded) == 26
    for index, name in (
        (0, "block1_conv1"),
        (12, "block3_conv2"),
        (28, "block5_conv3"),
    ):
        got = model.features[index]
        want = tensors[f"functional_1/{name}_1/convolution/ReadVariableOp:0"]
        assert np.array_equal(got.weight.detach(), want)
        want = tensors[f"functional_1/{name}_1/Squeeze:0"]
        assert np.array_equal(got.bias.detach(), want)
    assert torch.equal(model.classifier[0].weight, head)


def without(word):
    return lambda t: {k: v for k, v in t.items() if word not in k}


def turned(tensors):
    """Keras' own order of axes."""
    return {
        k: v.transpose(2, 3, 1, 0) if v.ndim == 4 else v for k, v in tensors.items()
    }


def spoiled(tensors):
    next(v for k, v in tensors.items() if "block2" in k)[0] = np.nan
    return tensors


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without("block4_conv2"), r"features\.19\.weight it has nothing.*\(2 such"),
        (without("Squeeze"), r"features\.0\.bias it has nothing.*\(13 such"),
        (turned, r"features\.0\.weight it has \(3, 3, 3, 4\)"),
        (spoiled, "not finite"),
    ],
)
def test_onnx_that_does_not_fit(tmp_path, change, said):
    write_onnx(tmp_path / "a.onnx", change)
    model = small()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(MedtutError, match=said) as error:
        load_features(model, tmp_path / "a.onnx")
    assert "a.onnx" in str(error.value)
    after = model.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert not hasattr(model, "convention")


def test_files_that_cannot_be_read(tmp_path):
    write_onnx(tmp_path / "a.onnx")
    whole = (tmp_path / "a.onnx").read_bytes()
    for ending in (".onnx", ".pth", ".safetensors"):
        (tmp_path / f"cut{ending}").write_bytes(whole[: len(whole) // 2])
        for name in (f"cut{ending}", f"none{ending}"):
            with pytest.raises(MedtutError, match=name):
                load_features(small(), tmp_path / name)


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_a_state_dict_of_other_classes(tmp_path, ending):
    from safetensors.torch import save_file

    source, model = small(classes=10, seed=5), small()
    path = tmp_path / f"s{ending}"
    (torch.save if ending == ".pth" else save_file)(source.state_dict(), path)
    last = model.classifier[6].weight.clone()
    assert load_features(model, path) == "torchvision"
    assert torch.equal(model.features[28].weight, source.features[28].weight)
    assert torch.equal(model.classifier[3].weight, source.classifier[3].weight)
    assert torch.equal(model.classifier[6].weight, last)
    assert not [n for n in model.loaded if n.startswith("classifier.6")]
    assert load_features(model, path, convention="keras") == "keras"
    with pytest.raises(MedtutError, match="rgb"):
        load_features(model, path, convention="rgb")
    with pytest.raises(MedtutError, match="vgg16"):
        load_features(small(width=0.125), path)


def test_torchvisions_loader(monkeypatch):
    from torchvision import models

    source = small(classes=1000, seed=7)
    asked = []

    def get_model(kind, weights):
        asked.append((kind, weights))
        return source

    monkeypatch.setattr(models, "get_model", get_model)
    model = small()
    assert load_features(model, "torchvision") == "torchvision"
    assert asked == [("vgg16", "IMAGENET1K_V1")]
    assert torch.equal(model.classifier[0].weight, source.classifier[0].weight)

    def no_network(kind, weights):
        raise OSError("no route")

    monkeypatch.setattr(models, "get_model", no_network)
    with pytest.raises(MedtutError, match="asset"):
        load_features(small(), "torchvision")


def test_the_other_convention_is_refused(tmp_path):
    torch.save(small().state_dict(), tmp_path / "a.pth")
    grey = torch.rand(2, 32, 32)
    for own, other in (("keras", "torchvision"), ("torchvision", "keras")):
        model = small().eval()
        load_features(model, tmp_path / "a.pth", own)
        adapt(model, "conv", r=2)  # the guard outlives the adapters
        for net in (model, copy.deepcopy(model)):
            assert net(to_input(grey, net)).isfinite().all()
            assert net(torch.zeros(1, 3, 32, 32)).isfinite().all()
            for call in (net, lambda x, net=net: run(net, x)):
                with pytest.raises(MedtutError, match=own):
                    call(to_input(grey, other))


@pytest.mark.skipif(not status(ASSET)["cached"], reason="the asset is not in the cache")
def test_the_real_convolutions():
    model = vgg16(head="pooled").eval()
    assert load_features(model) == "keras"
    shapes = [tuple(model.get_submodule(n).weight.shape) for n in conv_blocks(model)]
    assert shapes == [(o, i, 3, 3) for i, o in CONVS]
    first = model.features[0].weight
    # Edges sum to about nothing and blobs do not; some filters are of one colour.
    assert 0.1 < first.abs().max() < 1.5
    sums = first.sum((1, 2, 3)).abs() / first.abs().sum((1, 2, 3))
    assert (sums < 0.1).sum() > 20
    ramp = torch.linspace(0, 1, 32)
    grey = torch.stack([ramp.expand(32, 32), ramp.expand(32, 32).T, torch.eye(32)])
    with torch.no_grad():
        y = model.features(to_input(grey, model)).flatten(1)
    assert y.isfinite().all()
    assert (y > 0).float().mean() > 0.02
    assert y.std(0).mean() > 0.05 * y.mean()


# -- adapters -------------------------------------------------------------------
HEAD = 4096 * 4 + 4


@pytest.mark.parametrize(
    ("r", "linears", "convs"),
    [(4, 149_504, 150_636), (8, 299_008, 301_272), (16, 598_016, 602_544)],
)
def test_counts_of_the_adapters(r, linears, convs):
    assert linears == r * (25088 + 4096 + 4096 + 4096)
    assert convs == r * sum(9 * i + o for i, o in CONVS)
    want = {"head": 0, "linear": linears, "conv": convs, "both": linears + convs}
    for where, adapters in want.items():
        with torch.device("meta"):
            model = vgg16()
            injection = adapt(model, where, r)
        assert injection.parameters == adapters
        assert count(model, trained=True) == adapters + HEAD
    assert linears + HEAD == {4: 165_892, 8: 315_396, 16: 614_404}[r]
    if r == 8:
        assert (linears + convs, linears + convs + HEAD) == (600_280, 616_668)
    full = small()
    full.features.requires_grad_(False)
    assert len(adapt(full, "full")) == 0
    assert count(full, trained=True) == count(full)


def test_what_is_adapted_and_by_how_much():
    model = small()
    injection = adapt(model, "both", r=2, blocks=(1, 5))
    names = [f"features.{i}" for i in (0, 2, 24, 26, 28)]
    assert list(injection.layers) == [*names, "classifier.0", "classifier.3"]
    assert {layer.spec.scale for layer in injection.layers.values()} == {2.0}
    assert adapt(small(), "linear", 2, alpha=3).config.alpha == 3
    assert list(conv_blocks(small()).values()) == [
        b for b, n in enumerate((2, 2, 3, 3, 3), 1) for _ in range(n)
    ]
    pooled = small(head="pooled")
    adapt(pooled, "conv", r=2, blocks=(5,))
    assert head_name(pooled) == "classifier.2"
    assert pooled.classifier[2].weight.requires_grad


@pytest.mark.parametrize(
    ("settings", "where"),
    [({}, "lora"), ({"head": "pooled"}, "linear"), ({}, "both")],
)
def test_adapters_that_cannot_be(settings, where):
    model = small(**settings)
    if where == "both":
        adapt(model, where, r=2)
    with pytest.raises(LoRAError, match="adapt"):
        adapt(model, where, r=2)


def test_a_head_anew_after_a_refusal():
    model = small()
    with pytest.raises(LoRAError, match="rank 25"):
        adapt(model, "linear", r=25)
    assert not adapted_layers(model)
    adapt(model, "head")
    assert count(model, trained=True) == 24 * 4 + 4


@pytest.mark.parametrize("variant", ["lora", "dora", "pissa"])
@pytest.mark.parametrize("where", ["linear", "conv", "both"])
def test_start_merge_and_gradients(where, variant):
    model, x = small().eval(), pictures()
    plain = model(x)
    injection = adapt(model, where, r=2, variant=variant)
    assert {one.spec.variant for one in injection.layers.values()} == {variant}
    torch.testing.assert_close(model(x), plain, rtol=1e-5, atol=1e-5)
    y = stir(model)(x)
    assert (y - plain).abs().max() > 1e-4
    merge(model)
    torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-5)
    unmerge(model)
    assert torch.equal(model(x), y)
    (y**2).sum().backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None) == p.requires_grad, name
        assert p.requires_grad == ("lora_" in name or name.startswith("classifier.6"))
        assert p.grad is None or p.grad.abs().max() > 0, name


def test_the_file_of_the_adapter(tmp_path):
    model = vgg16(width=0.0625).eval()  # the linears of 4096 at r = 8 as they are
    adapt(stir(model), "linear")
    stir(model)
    x = pictures()
    with torch.no_grad():
        model.classifier[6].bias.copy_(torch.arange(4.0))
        want = model(x)
    save_adapter(model, tmp_path / "a", extra=["classifier.6"])
    # What full width adds: 25,088 in place of 1,568 inputs of the first factor.
    more = 4 * 8 * (25088 - 1568)
    size = sum(p.stat().st_size for p in (tmp_path / "a").iterdir())
    assert 4 * 315_396 < size + more <= 1.3e6
    again = vgg16(width=0.0625).eval()
    load_adapter(again, tmp_path / "a")
    with torch.no_grad():
        assert torch.equal(again(x), want)
    with pytest.raises(LoRAError, match="another base"):
        load_adapter(vgg16(width=0.0625, seed=1), tmp_path / "a")


# -- the younger nets -----------------------------------------------------------
@pytest.mark.parametrize(
    ("kind", "side"), [("resnet18", 64), pytest.param("densenet121", 32)]
)
@pytest.mark.parametrize("norm", ["frozen", "running"])
def test_other_nets(kind, side, norm):
    model, x = build_other(kind, norm=norm), pictures(2, side)
    blocks = conv_blocks(model)
    assert set(blocks.values()) == {1, 2, 3, 4, 5}
    injection = adapt(model, "conv", r=2, blocks=(5,))
    assert list(injection.layers) == [n for n, b in blocks.items() if b == 5]
    stir(model).train()
    before = {k: v.clone() for k, v in model.named_buffers()}
    torch.testing.assert_close(run(model, x), model(x), rtol=1e-4, atol=1e-4)
    changed = [k for k, v in model.named_buffers() if not torch.equal(v, before[k])]
    assert bool(changed) == (norm == "running")
    cut = stages(model)[first_trainable(model)][0]
    late = {"resnet18": "layer4.0", "densenet121": "features.denseblock4"}
    early = {"resnet18": "bn1", "densenet121": "features.norm0"}
    assert cut == (late if norm == "frozen" else early)[kind]
    assert model.get_submodule(head_name(model)).weight.requires_grad
    names = [name for name, _ in output_spread(model, x)]
    assert names[-1] == head_name(model)
    assert len(names) == 6


def test_other_nets_take_weights_and_refuse(tmp_path):
    source = build_other("resnet18", classes=10, norm="running", seed=3)
    torch.save(source.state_dict(), tmp_path / "r.pth")
    model = build_other("resnet18")
    assert load_features(model, tmp_path / "r.pth") == "torchvision"
    assert torch.equal(model.layer4[1].conv2.weight, source.layer4[1].conv2.weight)
    assert model.fc.out_features == 4
    with pytest.raises(MedtutError, match="resnet18"):
        load_features(model, write_state(tmp_path))
    for kind, norm in (("vgg19", "frozen"), ("resnet18", "batch")):
        with pytest.raises(MedtutError, match=f"{kind}.*{norm}"):
            build_other(kind, norm=norm)
    with pytest.raises(LoRAError, match="no linear layer"):
        adapt(model, "linear")


def write_state(folder):
    torch.save(small().state_dict(), folder / "v.pth")
    return folder / "v.pth"


# -- will it train? -------------------------------------------------------------
def test_the_spread():
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    spreads = {
        init: dict(output_spread(small(width=0.25, init=init), x))
        for init in ("he", "torch")
    }
    want = [f"features.{i}" for i in (4, 9, 16, 23, 30)]
    want += [f"classifier.{i}" for i in (0, 3, 6)]
    assert list(spreads["he"]) == list(spreads["torch"]) == want
    assert spreads["torch"]["features.30"] < 1e-4 < 1e-2 < spreads["he"]["features.30"]
    assert spreads["he"]["classifier.6"] > 1e4 * spreads["torch"]["classifier.6"]
    model = small()
    model.classifier[2].eval()
    values = dict(output_spread(model, x))
    by_hand = model.features[:5](x).std(0).mean().item()
    assert values["features.4"] == pytest.approx(by_hand, rel=1e-5)
    assert model.training
    assert not model.classifier[2].training
    assert not any(m._forward_hooks for m in model.modules())
    assert output_spread(model, x[:1].repeat(2, 1, 1, 1))[-1][1] < 1e-7
    adapt(model, "linear", r=2)
    assert [n for n, _ in output_spread(model, x)] == want


# -- the frozen part, kept ------------------------------------------------------
@pytest.fixture
def cached(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDTUT_CACHE", str(tmp_path))

    def gradients(model, y):
        weight = torch.linspace(-1, 1, y.numel()).view_as(y)
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        grads = torch.autograd.grad((y * weight).sum(), [p for _, p in named])
        return dict(zip([n for n, _ in named], grads, strict=True))

    def check(model, x, made):
        """Twice from the cache, shuffled the second time, against the whole model."""
        want = model(x)
        wanted = gradients(model, want)
        cache = PrefixCache(model)
        for order in (slice(None), list(reversed(range(len(x))))):
            got = torch.empty_like(want)
            got[order] = cache(x[order])
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
            for name, grad in gradients(model, got).items():
                most = wanted[name].abs().max()
                assert (grad - wanted[name]).abs().max() <= 1e-5 * max(most, 1), name
        assert cache.made == made
        return cache

    return check


CUTS = [
    ("head", {}, "classifier.6"),
    ("linear", {}, "classifier.0"),
    ("conv", {"blocks": (5,)}, "features.24"),
    ("both", {"blocks": (3,)}, "features.10"),
    ("linear", {"variant": "pissa"}, "classifier.0"),
    ("linear", {"variant": "dora"}, "classifier.0"),
    ("conv", {"blocks": (5,), "variant": "dora"}, "features.24"),
]


@pytest.mark.parametrize(("where", "settings", "cut"), CUTS)
def test_the_same_numbers_and_gradients(cached, where, settings, cut):
    model = small(dropout=0.0 if where != "head" else 0.5)
    adapt(model, where, r=2, **settings)
    stir(model).train()
    assert stages(model)[first_trainable(model)][0] == cut
    cached(model, pictures(), 3)


@torch.no_grad()
def test_several_at_once(cached):
    model, x = small(), pictures(5)
    adapt(model, "head")
    x[3] = x[0]  # the same picture twice is one entry
    cache = PrefixCache(model, at_once=2)
    torch.testing.assert_close(cache(x[:1]), model(x[:1]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(cache(x), model(x), rtol=1e-5, atol=1e-5)
    assert cache.made == 4


def test_a_head_alone_needs_no_layer_below(cached, monkeypatch):
    model = small()
    adapt(model, "head")
    assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {0.0}
    cache, x = cached(model, pictures(), 3), pictures()
    monkeypatch.setattr(model.classifier[0], "forward", None)
    monkeypatch.setattr(model.features[0], "forward", None)
    assert cache(x).shape == (3, 4)


def test_a_step_on_the_first_linear_reads_only_the_branch(cached, monkeypatch):
    model = small(dropout=0.0)
    adapt(model, "linear", r=2)
    cache, x = cached(stir(model), pictures(), 3), pictures()
    monkeypatch.setattr(model.classifier[0], "_base", None)  # never W x + b again
    want = cache(x)
    with torch.no_grad():
        model.classifier[0].lora_B.mul_(-2)
    assert (cache(x) - want).abs().max() > 1e-4
    assert cache.made == 3


def test_live_dropout_is_not_kept():
    model = small(dropout=0.5)
    adapt(model, "linear", r=2)
    assert [m.p for m in model.classifier if isinstance(m, nn.Dropout)] == [0.5, 0.5]
    frozen = small(dropout=0.5).requires_grad_(False)
    assert stages(frozen.train())[first_trainable(frozen)][0] == "classifier.2"
    assert first_trainable(frozen.eval()) == len(stages(frozen)) == 39


def test_dropout_on_the_branch(cached):
    model = small(dropout=0.0)
    adapt(model, "linear", r=2, dropout=0.5)
    stir(model).eval()
    cache, x = cached(model, pictures(), 3), pictures()
    model.train()
    assert not torch.equal(cache(x), cache(x))
    torch.manual_seed(3)
    want = model(x)
    torch.manual_seed(3)
    torch.testing.assert_close(cache(x), want, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.features[0].weight.mul_(1.5),
        lambda m: m.features[28].bias.add_(1.0),
        lambda m: m.classifier[0].weight.mul_(1.5),  # the kept W x + b
        lambda m: m.classifier[0].bias.add_(1.0),
    ],
)
def test_another_frozen_weight_is_another_entry(cached, change):
    model, x = small(dropout=0.0), pictures()
    adapt(model, "linear", r=2)
    stir(model)
    cache = PrefixCache(model)
    before = cache(x)
    start = first_trainable(model)
    weights = cache.weights(start)
    change(model)
    assert cache.weights(start) != weights
    torch.testing.assert_close(cache(x), model(x), rtol=1e-5, atol=1e-5)
    assert (cache(x) - before).abs().max() > 1e-4
    assert cache.made == 6


@torch.no_grad()
def test_merged_thawed_and_half(cached):
    model, x = small(dropout=0.0), pictures()
    adapt(model, "linear", r=2)
    cache = PrefixCache(stir(model))
    want = cache(x)
    merge(model)
    torch.testing.assert_close(cache(x), want, rtol=1e-5, atol=1e-5)
    unmerge(model)
    model.classifier[0].bias.requires_grad_(True)
    model.classifier[0].bias.add_(1.0)
    torch.testing.assert_close(cache(x), model(x), rtol=1e-5, atol=1e-5)
    model.classifier[0].bias.requires_grad_(False)
    half = PrefixCache(model, half=True)
    got = half(x)
    assert 0 < (got - model(x)).abs().max() < 1e-2
    model.features.requires_grad_(True)
    assert torch.equal(cache(x), model(x))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["resnet18", "densenet121"])
def test_the_younger_nets_from_the_cache(cached, kind):
    model, x = build_other(kind), pictures(2, 64 if kind == "resnet18" else 32)
    adapt(model, "conv", r=2, blocks=(5,))
    with torch.enable_grad():
        cached(stir(model).train(), x, 2)


def test_no_model_that_is_known():
    with pytest.raises(MedtutError, match="Linear"):
        stages(nn.Linear(2, 2))
