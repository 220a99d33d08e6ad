"""Swin UNETR and the U-Net arm: counts, features, regions they refuse, small files."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from medtut.errors import MedtutError
from medtut.models.suprem_unet import BatchStatNorm3d, build_suprem_unet
from medtut.models.swin_unetr import (
    build_swin_unetr,
    check_roi,
    features,
    load_swin_unetr,
    parts,
    save_swin_unetr,
)

SHAPE = 1, 1, 32, 32, 64  # the smallest region
KEYS = "conv1", "bn1"
NAMES = ["spleen", "liver", "aorta"]


def region(shape=SHAPE, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def small():
    return build_swin_unetr(12, 3).eval()


@pytest.fixture(scope="module")
def published_size():
    return build_swin_unetr()


def test_counts_as_published(published_size):
    counts = parts(published_size)
    assert counts == {
        "swinViT": 8_062_002,
        "bottleneck-and-skips": 34_526_784,
        "decoder": 19_597_824,
        "classifier": 29 * 48 + 29,
    }
    assert sum(counts.values()) == 62_188_031
    assert sum(p.numel() for p in published_size.parameters()) == 62_188_031
    assert counts["classifier"] == 1_421
    # A residual block a -> b: kernels of 3^3, and one of 1 on the way around if a != b.
    block = lambda a, b: 27 * a * b + 27 * b * b + (a * b if a != b else 0)  # noqa: E731
    skips = [(1, 48), (48, 48), (96, 96), (192, 192), (768, 768)]
    assert sum(block(*p) for p in skips) == counts["bottleneck-and-skips"]
    up = [(768, 384), (384, 192), (192, 96), (96, 48), (48, 48)]
    ups = sum(8 * a * b + block(2 * b, b) for a, b in up)  # transposed 2^3, then joined
    assert ups == counts["decoder"]


def test_counts_of_the_small_one():
    counts = parts(build_swin_unetr(12, 29))
    assert sum(counts.values()) == 4_078_415
    assert 2 * sum(counts.values()) < 9_000_000  # float16


def test_an_unknown_part_is_counted_under_its_own_name(small):
    model = copy.deepcopy(small)
    model.extra = nn.Linear(2, 3)
    assert parts(model)["extra"] == 9
    assert sum(parts(model).values()) == sum(p.numel() for p in model.parameters())


def test_the_way_through_is_monais(small):
    from monai.networks.nets import SwinUNETR

    theirs = SwinUNETR(1, 3, feature_size=12).eval()
    state = small.state_dict()
    renamed = {k.replace("classifier", "out.conv.conv"): v for k, v in state.items()}
    theirs.load_state_dict(renamed)  # strict: MONAI's names, nothing more or less
    with torch.no_grad():
        x = region()
        ours = small(x)
        assert torch.equal(ours, theirs(x))
        found = features(small, x)
        assert found.shape == (1, 12, 32, 32, 64)
        assert torch.equal(small.classifier(found), ours)
        assert ours.shape == (1, 3, 32, 32, 64)


def test_architecture(published_size):
    swin = published_size.swinViT
    blocks = [m for m in swin.modules() if hasattr(m, "attn")]
    assert [b.num_heads for b in blocks] == [3, 3, 6, 6, 12, 12, 24, 24]
    assert [b.dim for b in blocks] == [48, 48, 96, 96, 192, 192, 384, 384]
    assert {tuple(b.window_size) for b in blocks} == {(7, 7, 7)}
    assert all(b.attn.qkv.bias is not None for b in blocks)
    norms = [m for m in published_size.encoder1.modules() if "Norm" in str(type(m))]
    assert norms
    assert {type(m) for m in norms} == {nn.InstanceNorm3d}
    assert swin.patch_embed.proj.kernel_size == (2, 2, 2)
    assert published_size.classifier.kernel_size == (1, 1, 1)


def test_same_seed_same_weights_and_no_trace():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, two, other = (build_swin_unetr(12, 1, seed=s) for s in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    first = [m.classifier.weight for m in (one, two, other)]
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first[0], first[2])


def test_checkpointing_changes_memory_not_numbers(small):
    twice = build_swin_unetr(12, 3, use_checkpoint=True)
    blocks = [m for m in twice.swinViT.modules() if hasattr(m, "attn")]
    assert all(b.use_checkpoint for b in blocks)
    for model in (twice, small):
        model.zero_grad()
        model(region()).square().mean().backward()
    pairs = zip(twice.named_parameters(), small.parameters(), strict=True)
    for (name, a), b in pairs:
        assert torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-7), name
        assert a.grad.abs().sum() > 0 or "norm" in name or "conv" in name, name


@pytest.mark.parametrize("shape", [(96, 96, 96), (64, 32, 32), (2, 1, 64, 64, 64)])
def test_regions_it_takes(shape):
    check_roi(shape)


@pytest.mark.parametrize(
    ("shape", "hint"),
    [
        ((48, 48, 48), r"\[64, 64, 64\]"),
        ((1, 1, 64, 64, 60), r"\[64, 64, 64\]"),
        ((32, 32, 32), r"\[32, 32, 64\]"),
        ((4, 1, 32, 32, 32), r"\[32, 32, 64\]"),
        ((5, 5, 5), r"\[32, 32, 64\]"),
        ((0, 32, 64), r"\[32, 32, 64\]"),
        ((1, 2, 64, 64, 64), "batch and channel"),
        ((1, 64, 64, 64), "batch and channel"),
    ],
)
def test_regions_it_cannot_take(shape, hint):
    with pytest.raises(MedtutError, match=hint):
        check_roi(shape)


@pytest.mark.parametrize("train", [True, False])
def test_the_network_says_so_before_it_crashes(small, train):
    model = copy.deepcopy(small).train(train)
    for side in (32, 48):
        with pytest.raises(MedtutError, match="multiple of 32"):
            model(torch.zeros(1, 1, side, side, side))
    unet = build_suprem_unet(1, 4).train(train)
    for side in (8, 12):
        with pytest.raises(MedtutError, match="multiple of 8"):
            unet(torch.zeros(1, 1, side, side, side))


def test_windows_of_four(tmp_path):
    """Tables of 7³ offsets in the place of 13³, everything else as it is."""
    seven, four = (build_swin_unetr(12, 3, window_size=n) for n in (7, 4))
    blocks = [m for m in four.swinViT.modules() if hasattr(m, "attn")]
    assert {tuple(b.window_size) for b in blocks} == {(4, 4, 4)}
    tables = [b.attn.relative_position_bias_table for b in blocks]
    assert {len(t) for t in tables} == {7**3}
    heads = sum(t.shape[1] for t in tables)
    gone = sum(parts(seven).values()) - sum(parts(four).values())
    assert gone == (13**3 - 7**3) * heads
    assert four.config["window_size"] == 4
    assert build_swin_unetr(12, 3).config["window_size"] == 7, "as published"
    with torch.no_grad():
        assert four.eval()(region()).shape == (1, 3, 32, 32, 64)
    again = load_swin_unetr(save_swin_unetr(four, tmp_path / "w4.st", NAMES, 6.0))
    assert again.config == four.config
    with torch.no_grad():
        near = torch.allclose(again(region()), four.half().float()(region()), atol=1e-3)
    assert near
    with pytest.raises(MedtutError, match="window_size=0"):
        build_swin_unetr(12, 3, window_size=0)


@pytest.mark.parametrize("size", [(0, 1), (18, 1), (12, 0)])
def test_sizes_it_refuses(size):
    with pytest.raises(MedtutError, match="multiple of 12"):
        build_swin_unetr(*size)


def test_saved_and_loaded(small, tmp_path):
    how = {"structures": NAMES, "spacing": 5.0, "command": "make", "dice": [0.5, None]}
    path = save_swin_unetr(small, tmp_path / "new" / "swin.safetensors", **how)
    # float16 and no position index: that alone would be 7.5 MB
    assert path.stat().st_size < 2 * sum(parts(small).values()) + 60_000
    model = load_swin_unetr(path)
    assert not model.training
    how = {"feature_size": 12, "out_channels": 3, "window_size": 7}
    assert model.config == how
    expected = {"structures": tuple(NAMES), "spacing": 5.0, "hu": [-175.0, 250.0]}
    assert model.facts == expected | {"command": "make", "dice": [0.5, None]}
    stored = small.state_dict()
    for name, tensor in model.state_dict().items():
        same = stored[name]  # the position index is computed again
        same = same.half().float() if same.is_floating_point() else same
        assert tensor.dtype == same.dtype
        assert torch.equal(tensor, same), name
    again = load_swin_unetr(path, use_checkpoint=True)
    assert again.swinViT.layers1[0].blocks[0].use_checkpoint


def test_what_is_not_saved(small, tmp_path):
    path = tmp_path / "swin.safetensors"
    with pytest.raises(MedtutError, match="2 structures for 3 outputs"):
        save_swin_unetr(small, path, NAMES[:2], 5.0)
    model = copy.deepcopy(small)
    model.classifier.bias.data[0] = 1e6
    with pytest.raises(MedtutError, match=r"classifier.bias is not finite"):
        save_swin_unetr(model, path, NAMES, 5.0)
    model = copy.deepcopy(small)
    model.classifier.adapter = nn.Linear(2, 2)
    with pytest.raises(MedtutError, match=r"classifier.adapter.*plain"):
        save_swin_unetr(model, path, NAMES, 5.0)
    assert not list(tmp_path.iterdir())


def test_damaged_and_foreign_files(small, tmp_path):
    from safetensors.torch import save_file

    path = save_swin_unetr(small, tmp_path / "swin.safetensors", NAMES, 5.0)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1000])
    foreign = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(2)}, foreign, {"config": "{}", "facts": "{}"})
    for bad in (path, foreign, tmp_path / "none.safetensors"):
        with pytest.raises(MedtutError, match="cannot be read as a Swin UNETR"):
            load_swin_unetr(bad)


def test_unet_counts_as_published():
    model = build_suprem_unet()
    unit = lambda a, b: 27 * a * b + b + 2 * b  # noqa: E731  kernel, bias, norm
    down = [(1, 32), (32, 64), (64, 64), (64, 128), (128, 128), (128, 256)]
    down += [(256, 256), (256, 512)]
    up = sum(
        8 * (2 * b) ** 2 + 2 * b + unit(3 * b, b) + unit(b, b) for b in (256, 128, 64)
    )
    counts = parts(model)
    assert counts["encoder"] == sum(unit(*p) for p in down)
    assert counts["decoder"] == up
    assert counts["classifier"] == 65
    assert sum(counts.values()) == 19_073_665
    assert sum(parts(build_suprem_unet(29)).values()) == 19_073_665 + 28 * 65
    keys = model.state_dict()
    for key in (
        "down_tr64.ops.0.conv1.weight",
        "down_tr512.ops.1.bn1.running_var",
        "up_tr256.up_conv.bias",
        "up_tr64.ops.1.bn1.num_batches_tracked",
    ):
        assert key in keys


def unet_by_hand(state, x):
    """Published order of operations, from the names in a state dict."""

    def pair(y, name):
        for at in (f"{name}.ops.0.", f"{name}.ops.1."):
            conv, norm = (
                [state[at + k + p] for p in (".weight", ".bias")] for k in KEYS
            )
            y = F.batch_norm(F.conv3d(y, *conv, padding=1), None, None, *norm, True)
            y = F.relu(y)
        return y

    maps = [pair(x, "down_tr64")]
    for name in ("down_tr128", "down_tr256", "down_tr512"):
        maps.append(pair(F.max_pool3d(maps[-1], 2), name))
    y = maps[3]
    for name, skip in (("up_tr256", 2), ("up_tr128", 1), ("up_tr64", 0)):
        up = [state[f"{name}.up_conv.{p}"] for p in ("weight", "bias")]
        y = F.conv_transpose3d(y, *up, stride=2)
        y = pair(torch.cat((y, maps[skip]), 1), name)
    return y


def test_unet_features_are_the_published_ones():
    model = build_suprem_unet(3, 8).eval()
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if "bn1" in name:  # 1 and 0 would hide a mistake
            p.data.add_(torch.rand(p.shape, generator=generator) - 0.5)
    x = region((2, 1, 16, 16, 24))
    with torch.no_grad():
        found = model.features(x)
        assert found.shape == (2, 8, 16, 16, 24)
        assert torch.allclose(found, unet_by_hand(model.state_dict(), x), atol=1e-4)
        assert torch.equal(model(x), model.classifier(found))
    assert model(x).shape == (2, 3, 16, 16, 24)


def test_unet_always_normalises_by_the_batch():
    model = build_suprem_unet(1, 4).eval()
    before = copy.deepcopy(model.state_dict())
    x = region((2, 1, 16, 16, 16))
    x[1] *= 9
    with torch.no_grad():
        alone, together = model(x[:1]), model(x)[:1]
        assert not torch.allclose(alone, together, atol=1e-3)
        assert torch.equal(model.train()(x), model.eval()(x))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name  # running statistics too
    norm = BatchStatNorm3d(2).eval()
    y = norm(region((3, 2, 4, 4, 4)) * 7 + 1)
    assert y.mean((0, 2, 3, 4)).abs().max() < 1e-5
    assert (y.var((0, 2, 3, 4), unbiased=False) - 1).abs().max() < 1e-3
