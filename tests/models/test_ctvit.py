"""The image tower: published shapes, and switches that do what they say."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from medtut.errors import MedtutError
from medtut.models.ctvit import PEG, CTViT, FeedForward, PositionBias, ffn_width

SMALL = {"dim": 16, "image": (8, 6, 8), "patch": (2, 2, 2), "spatial_depth": 2,
         "temporal_depth": 2, "heads": 2, "dim_head": 8}  # fmt: skip


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def small(seed: int = 0, **kw) -> CTViT:
    torch.manual_seed(seed)
    return CTViT(**{**SMALL, **kw})


def volume(seed: int = 5, batch: int = 2) -> torch.Tensor:
    torch.manual_seed(seed)
    return torch.randn(batch, 1, 8, 6, 8)


def test_published_shapes_and_counts():
    with torch.device("meta"):
        tower = CTViT(norm="layer", ffn="geglu", ffn_multiple=None)
        tokens = tower(torch.empty(1, 1, 240, 480, 480))
    assert tokens.shape == (1, 24, 24, 24, 512)
    assert count(tower.embed) == 2_057_536
    assert count(tower.bias) == 268_296
    layer = tower.spatial.layers[0]
    assert count(layer) == 2_637_376 - 512 == 2_636_864
    assert count(layer.peg) == 14_336
    assert count(layer.ffn) == 2_097_664
    for stack in (tower.spatial, tower.temporal):
        assert count(stack) == 10_550_016 - 4 * 512
    assert count(tower) == 23_425_864 - 8 * 512


def test_width_rule():
    assert ffn_width(512, None) == 1365
    assert ffn_width(512) == 1408
    assert ffn_width(96) == 256
    with torch.device("meta"):
        assert CTViT().spatial.layers[0].ffn.to_out.in_features == 1408


@pytest.mark.parametrize(
    ("norm", "kind"), [("layer", nn.LayerNorm), ("rms", nn.RMSNorm)]
)
def test_the_norm_switch_reaches_every_norm(norm, kind):
    norms = [m for m in small(norm=norm).modules() if "Norm" in type(m).__name__]
    assert all(isinstance(m, kind) for m in norms)
    assert len(norms) == 2 + 2 * 4 + 2  # patches, layers, ends


def test_one_weight_layout_for_both_gates():
    torch.manual_seed(0)
    one, two = FeedForward(8, "geglu", "rms", 4), FeedForward(8, "swiglu", "rms", 4)
    two.load_state_dict(one.state_dict())
    x = torch.randn(3, 8)
    gate, value = F.linear(one.norm(x), one.to_gate_value.weight).split(24, -1)
    torch.testing.assert_close(one(x), one.to_out(F.gelu(gate) * value))
    torch.testing.assert_close(two(x), one.to_out(F.silu(gate) * value))


# -- patches ---------------------------------------------------------------------------
def test_a_patch_holds_the_voxels_it_covers():
    tower, x = small(), volume()
    got = tower.patches(x)
    assert got.shape == (2, 4, 3, 4, 8)
    want = x[1, 0, 4:6, 2:4, 6:8].flatten()
    assert torch.equal(got[1, 2, 1, 3], want)


def test_normalised_patches_lose_hounsfield_units():
    x = volume()
    with torch.no_grad():
        for on in (True, False):
            tower = small(patch_norm=on, norm="layer")
            same = torch.allclose(tower(x), tower(2 * x + 1), atol=1e-3)
            assert same == on


def test_what_does_not_fit_is_refused():
    for image in ((8, 6, 9), (7, 6, 8)):
        with pytest.raises(MedtutError, match="whole number of patches"):
            small(image=image)
    for shape in ((2, 1, 1, 6, 8), (2, 8, 6, 8), (2, 2, 8, 6, 8), (1, 1, 6, 8, 8)):
        with pytest.raises(MedtutError, match="expected volumes"):
            small()(torch.zeros(shape))
    for wrong in ({"position": "alibi"}, {"ffn": "relu"}, {"norm": "group"},
                  {"attention": "slow"}):  # fmt: skip
        with pytest.raises(MedtutError, match=next(iter(wrong))):
            small(**wrong)
    with pytest.raises(MedtutError, match="flash"):
        small(attention="flash", position="bias")
    small(attention="flash", position="rope")  # built without the package


# -- positions -------------------------------------------------------------------------
def test_the_bias_changes_the_output_and_learns():
    tower, x = small(), volume()
    before = tower(x)
    before.square().sum().backward()
    assert all(p.grad.any() for p in list(tower.bias.parameters())[:-1])
    torch.manual_seed(9)
    with torch.no_grad():
        for p in tower.bias.parameters():
            p.copy_(torch.randn_like(p))
        assert (tower(x) - before).norm() > 1e-3 * before.norm()


def test_the_bias_of_a_pair_is_the_networks_for_its_offset():
    torch.manual_seed(0)
    net = PositionBias(3, 8)
    bias = net(3, 4)
    assert bias.shape == (3, 12, 12)
    for i in range(12):
        for j in range(12):
            step = torch.tensor([i // 4 - j // 4, i % 4 - j % 4])
            place = step.sign() * (step.abs() + 1).float().log()
            torch.testing.assert_close(bias[:, i, j], net.net(place), rtol=0, atol=1e-6)


@torch.no_grad()
def test_without_positions_the_order_in_a_plane_does_not_matter():
    x = torch.randn(1, 4, 3, 4, 16)
    for kw, same in (
        ({"position": "none", "peg": False}, True),
        ({"position": "none", "peg": True}, False),
        ({"position": "bias", "peg": False}, False),
        ({"position": "rope", "peg": False}, False),
    ):
        tower = small(**kw)
        bias = tower.bias(3, 4) if tower.bias else None
        args = bias, tower.plane_rope
        mirrored = tower.spatial(x.flip(3), *args).flip(
            3
        )  # every offset's sign changes
        assert torch.allclose(tower.spatial(x, *args), mirrored, atol=1e-5) == same, kw
    tower = small(position="rope", peg=False)
    flipped = tower.temporal(x.flip(1), None, tower.depth_rope).flip(1)
    straight = tower.temporal(x, None, tower.depth_rope)
    assert not torch.allclose(straight, flipped, atol=1e-4)
    plain = [tower.temporal(t, None, None) for t in (x, x.flip(1))]
    torch.testing.assert_close(plain[0], plain[1].flip(1), rtol=0, atol=1e-5)


def test_peg_is_one_convolution_in_three_dimensions():
    torch.manual_seed(0)
    peg, x = PEG(6), torch.randn(2, 4, 5, 7, 6, requires_grad=True)
    padded = torch.nn.functional.pad(x.movedim(-1, 1), (1, 1, 1, 1, 2, 0))
    wanted, found = peg.conv(padded).movedim(1, -1), peg(x)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    slope = torch.randn(wanted.shape)
    both = (
        torch.autograd.grad((y * slope).sum(), (x, *peg.parameters()))
        for y in (found, wanted)
    )
    for mine, conv in zip(*both, strict=True):
        torch.testing.assert_close(mine, conv, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_peg_sees_the_slab_and_two_below_and_all_around_in_plane():
    torch.manual_seed(0)
    peg, x = PEG(4), torch.randn(1, 6, 5, 5, 4)
    changed = x.clone()
    changed[0, 2, 2, 2] += 1
    where = (peg(changed) - peg(x)).abs().sum(-1)[0].gt(1e-6).nonzero()
    assert {tuple(w.tolist()) for w in where} == {
        (d, i, j) for d in (2, 3, 4) for i in (1, 2, 3) for j in (1, 2, 3)
    }
    y = peg(
        x
    )  # the tap of a channel: no other channel, and the right end of the kernel
    weight, bias = peg.conv.weight, peg.conv.bias
    want = (weight[1, 0] * x[0, 1:4, 1:4, 1:4, 1]).sum() + bias[1]
    torch.testing.assert_close(y[0, 3, 2, 2, 1], want)


@torch.no_grad()
def test_a_stack_mixes_a_plane_or_a_column_and_nothing_else():
    tower = small(position="none", peg=False)
    x = torch.randn(2, 4, 3, 4, 16)
    changed = x.clone()
    changed[1, 2, 1, 3] += torch.randn(16)
    moved = [
        (stack(changed, None, None) - stack(x, None, None))
        .abs().sum(-1).gt(1e-6)
        for stack in (tower.spatial, tower.temporal)
    ]  # fmt: skip
    plane, column = torch.zeros(2, 2, 4, 3, 4, dtype=torch.bool)
    plane[1, 2], column[1, :, 1, 3] = True, True
    assert torch.equal(moved[0], plane)
    assert torch.equal(moved[1], column)


# -- the same result in other ways -----------------------------------------------------
def gradients(tower: CTViT) -> dict[str, torch.Tensor]:
    y = tower(volume())
    y.square().mean().backward()
    return {"y": y} | {n: p.grad for n, p in tower.named_parameters()}


@pytest.mark.parametrize("position", ["bias", "rope"])
def test_backends_agree_through_the_whole_tower(position):
    one, two = (
        gradients(small(attention=a, position=position)) for a in ("explicit", "fused")
    )
    assert all(g is not None for g in one.values())
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-5, msg=name)


def test_checkpointing_changes_memory_and_nothing_else():
    kept = []
    results = []
    for on in (False, True):
        total = 0

        def keep(t: torch.Tensor) -> torch.Tensor:
            nonlocal total
            total += t.nbytes
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            small(checkpoint=on)(volume()).sum()
        kept.append(total)
        results.append(gradients(small(checkpoint=on)))
    assert kept[1] < 0.5 * kept[0]
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name], msg=name)


@pytest.mark.slow
def test_it_compiles_without_a_break():
    tower, x = small(position="rope").eval(), volume()
    fast = torch.compile(tower, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), tower(x), rtol=0, atol=1e-5)


def test_half_precision_autocast_stays_close():
    tower, x = small(), volume()
    with torch.no_grad():
        whole = tower(x)
        with torch.autocast("cpu", torch.bfloat16):
            half = tower(x)
    assert (half.float() - whole).norm() < 0.05 * whole.norm()
