"""Tokens from histograms: what is counted, where, and what the towers make of it."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from medtut.errors import MedtutError
from medtut.lora import find_dead
from medtut.models.ct_stem import CENTRES, HistogramStem, soft_histogram
from medtut.models.ctclip import CTCLIP, load_ctclip, save_ctclip
from medtut.models.ctvit import CTViT

SMALL = {"dim": 16, "image": (12, 16, 16), "patch": (6, 8, 8), "spatial_depth": 1,
         "temporal_depth": 1, "heads": 2, "dim_head": 8}  # fmt: skip


def tower(seed=0, **kw):
    torch.manual_seed(seed)
    return CTViT(**{**SMALL, "stem": "histogram", **kw})


def stem(patch=(6, 8, 8), seed=0, norm="rms"):
    torch.manual_seed(seed)
    return HistogramStem(16, patch, norm)


def volume(*shape, seed=3):
    torch.manual_seed(seed)
    return torch.rand(*shape) * 2.4 - 1.2  # some of it beyond the window


# -- counting --------------------------------------------------------------------------
def test_shares_are_those_of_a_hat_around_each_centre():
    centres = torch.tensor([-1.0, -0.5, 0.0, 2.0])
    values = torch.tensor([[-1.0, -0.6, -0.5, 0.25, 2.0], [-7.0, 9.0, 0.0, 1.5, -0.75]])
    got = soft_histogram(values, centres)
    hats = np.eye(4)
    want = [[np.interp(row, centres, hat).mean() for hat in hats] for row in values]
    np.testing.assert_allclose(got, want, atol=1e-6)
    by_hand = [0.24, 0.36, 0.175, 0.225]
    np.testing.assert_allclose(got[0], by_hand, atol=1e-6)


def test_shares_sum_to_one_and_keep_the_mean():
    centres = torch.tensor(CENTRES) / 1000
    values = volume(3, 2, 500)
    got = soft_histogram(values, centres)
    assert got.shape == (3, 2, len(CENTRES))
    assert (got >= 0).all()
    torch.testing.assert_close(got.sum(-1), torch.ones(3, 2))
    mean = values.clamp(-1, 1).mean(-1)
    torch.testing.assert_close(got @ centres, mean, atol=1e-5, rtol=0)
    # Every centre holds what lies on it, alone.
    torch.testing.assert_close(
        soft_histogram(centres[:, None], centres), torch.eye(len(CENTRES))
    )


def test_the_gradient_is_the_slope_of_the_hat():
    centres = torch.tensor([0.0, 1.0, 3.0])
    values = torch.tensor([0.25, 2.0, -4.0, 8.0], requires_grad=True)
    shares = soft_histogram(values, centres)
    for k, want in enumerate([(-1, 0, 0, 0), (1, -0.5, 0, 0), (0, 0.5, 0, 0)]):
        (grad,) = torch.autograd.grad(shares[k], values, retain_graph=True)
        torch.testing.assert_close(grad, torch.tensor(want) / 4)


def test_centres_ascend_and_reach_the_ends_of_the_window():
    assert list(CENTRES) == sorted(set(CENTRES))
    assert (CENTRES[0], CENTRES[-1]) == (-1000, 1000)


# -- parts of a patch ------------------------------------------------------------------
@pytest.mark.parametrize(
    ("patch", "part"), [((6, 8, 8), (3, 4, 4)), ((3, 4, 5), (3, 2, 5))]
)
def test_a_part_is_described_by_its_own_voxels(patch, part):
    x = volume(2, 1, *(2 * n for n in patch))
    module = stem(patch)
    assert module.part == part
    got = module.describe(x)
    grid = tuple(2 * n // p for n, p in zip(patch, part, strict=True))
    assert got.shape == (2, *grid, len(CENTRES) + 6)
    hats, centres = np.eye(len(CENTRES)), np.array(CENTRES) / 1000
    for b, at in ((0, (0, 0, 0)), (1, (1, 0, 1)), (1, tuple(n - 1 for n in grid))):
        box = tuple(slice(i * p, i * p + p) for i, p in zip(at, part, strict=True))
        v = x[b, 0][box].numpy().ravel()
        shares = [np.interp(v, centres, hat).mean() for hat in hats]
        place = [-1 + 2 * i / (n - 1) for i, n in zip(at, grid, strict=True)]
        want = [*np.sqrt(np.add(shares, 1e-4)), v.mean(), v.min(), v.max(), *place]
        np.testing.assert_allclose(got[b][at], want, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_a_token_sees_its_patch_and_the_parts_beside_it(norm):
    module, x = stem(norm=norm), volume(1, 1, 18, 24, 24)
    before = module(x)
    assert before.shape == (1, 3, 3, 3, 16)
    for voxel, seen in (
        ((8, 10, 10), [1, 1, 1]),  # in the first half of the middle patch
        ((11, 15, 15), [(1, 2), (1, 2), (1, 2)]),  # in the last part: the next see it
        ((0, 0, 23), [0, 0, 2]),
    ):
        y = x.clone()
        y[(0, 0, *voxel)] += 0.7
        moved = (module(y) - before).abs().amax(-1)[0] > 1e-6
        want = torch.zeros(3, 3, 3, dtype=torch.bool)
        want[np.ix_(*map(np.atleast_1d, seen))] = True
        assert torch.equal(moved, want), voxel


@torch.no_grad()
def test_only_the_values_of_a_part_count_not_their_order():
    module, x = stem(), volume(1, 1, 12, 16, 16)
    y = x.clone()
    y[0, 0, :3, :4, :4] = x[0, 0, :3, :4, :4].flip(0, 1, 2)
    assert not torch.equal(x, y)
    torch.testing.assert_close(module(x), module(y))
    # While the same voxels in another part are something else.
    z = x.clone()
    z[0, 0, :3, :4, :4], z[0, 0, 3:6, :4, :4] = (
        x[0, 0, 3:6, :4, :4],
        x[0, 0, :3, :4, :4],
    )
    assert (module(x) - module(z)).abs().max() > 1e-3
    # And an even patch of water is not one of air, nor one place another.
    water, air = module(torch.zeros_like(x)), module(-torch.ones_like(x))
    assert (water - air).abs().amax(-1).min() > 1e-2
    assert (water[0, 0, 0, 0] - water[0, 1, 1, 1]).abs().max() > 1e-2


def test_every_parameter_learns_even_from_air_alone():
    module = stem()
    for x in (volume(2, 1, 12, 16, 16), -torch.ones(2, 1, 12, 16, 16)):
        tokens = module(x)
        assert tokens.isfinite().all()
        value = (tokens * torch.linspace(-1, 1, 16)).sum()
        assert find_dead(module, value) == []
        module.zero_grad()
        value.backward()
        grads = [p.grad for p in module.parameters()]
        assert all(g.isfinite().all() and g.any() for g in grads)
    x = volume(1, 1, 12, 16, 16).clamp(-0.9, 0.9).requires_grad_()
    (module(x) ** 3).sum().backward()
    assert x.grad.isfinite().all()
    assert (x.grad != 0).float().mean() > 0.9


@torch.no_grad()
def test_half_precision_around_it_counts_in_full():
    module, x = stem(), volume(2, 1, 12, 16, 16)
    want = module(x)
    with torch.autocast("cpu", torch.bfloat16):
        got = module(x)
        assert module.describe(x).dtype == torch.float32
    assert (got.float() - want).abs().max() < 0.05 * want.abs().max()
    # Half precision as volumes are stored is read as it is.
    torch.testing.assert_close(
        module.describe(x.half()), module.describe(x.half().float())
    )


# -- in the tower ----------------------------------------------------------------------
@torch.no_grad()
def test_mixing_what_was_embedded_is_the_tower():
    x = volume(2, 1, 12, 16, 16)
    model = tower().eval()
    tokens = model.embed(x)
    assert tokens.shape == (2, 2, 2, 2, 16)
    torch.testing.assert_close(model(x), model.mix(tokens))
    plane = model.spatial(tokens, model.bias(2, 2), model.plane_rope)
    torch.testing.assert_close(model(x), model.temporal(plane, None, None))
    assert min((model(x) - t).abs().max() for t in (tokens, plane)) > 0.1
    model = tower(stem="linear").eval()
    torch.testing.assert_close(model(x), model.mix(model.embed(model.patches(x))))
    # Tokens from elsewhere need no volume of the tower's size, only its planes.
    assert model.mix(torch.randn(1, 5, 2, 2, 16)).shape == (1, 5, 2, 2, 16)


def test_the_switch_changes_the_embedding_alone():
    linear, histogram = tower(stem="linear"), tower()
    assert isinstance(histogram.embed, HistogramStem)
    above = [
        {k: v.shape for k, v in m.state_dict().items() if k.split(".")[0] != "embed"}
        for m in (linear, histogram)
    ]
    assert above[0] == above[1]
    assert CTViT(**SMALL).config["stem"] == "linear", "as published, unless asked"
    # It has no use for patch_norm, and its centres are no weights.
    names = set(histogram.state_dict())
    assert set(tower(patch_norm=False).state_dict()) == names
    assert not any("centres" in n for n in names)
    for norm in ("rms", "layer"):
        kinds = {type(m).__name__ for m in tower(norm=norm).modules()
                 if "Norm" in type(m).__name__}  # fmt: skip
        assert kinds == {{"rms": "RMSNorm", "layer": "LayerNorm"}[norm]}
    with pytest.raises(MedtutError, match=r"stem='conv': choose one of linear, hist"):
        tower(stem="conv")
    with pytest.raises(MedtutError, match="expected volumes"):
        histogram(torch.zeros(1, 1, 12, 16, 8))


# -- heads of the pooling --------------------------------------------------------------
def clip(**kw):
    model = tower()
    return CTCLIP(model, 12, 8, "attention", **kw)


@torch.no_grad()
def test_heads_of_the_pooling_are_those_asked_for():
    model = clip(pool_heads=4)
    query, value, out = model.to_image.parameters()
    assert query.shape == (4, 16)
    assert clip().to_image[0].query.weight.shape == (2, 16), "else the tower's"
    tokens = torch.randn(3, 2, 2, 2, 16)
    flat, parts = tokens.reshape(3, 8, 16), []
    for h in range(4):
        weight = (flat @ query[h]).softmax(1)
        own = flat @ value[4 * h : 4 * h + 4].T
        parts.append((weight[..., None] * own).sum(1))
    want = torch.cat(parts, 1) @ out.T
    torch.testing.assert_close(model.to_image(tokens), want, atol=1e-5, rtol=1e-5)
    with pytest.raises(MedtutError, match="5 heads cannot share 16"):
        clip(pool_heads=5)
    # Another projection has no heads, and nothing to divide.
    assert CTCLIP(tower(), 12, 8, "mean", pool_heads=5).config["pool_heads"] == 5


@torch.no_grad()
def test_the_file_keeps_both_choices(tmp_path):
    model, x = clip(pool_heads=8).eval(), volume(1, 1, 12, 16, 16)
    path = save_ctclip(model, tmp_path / "a.safetensors")
    again = load_ctclip(path)
    assert again.config == json.loads(json.dumps(model.config))
    assert again.to_image[0].query.weight.shape == (8, 16)
    gap = (again.encode_image(x) - model.encode_image(x)).abs().max()
    assert gap < 0.01
    # A file from before there was a choice is as published.
    torch.manual_seed(0)
    old = CTCLIP(CTViT(**SMALL), 12, 8).eval()
    with safe_open(save_ctclip(old, path), "pt") as file:
        config = json.loads(file.metadata()["config"])
        state = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    del config["pool_heads"], config["image_tower"]["stem"]
    save_file(state, path, {"config": json.dumps(config)})
    gap = (load_ctclip(path).encode_image(x) - old.encode_image(x)).abs().max()
    assert gap < 0.01
