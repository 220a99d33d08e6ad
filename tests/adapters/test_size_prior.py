"""The size prior: closed forms, gradients on both sides of the margin, outliers."""

import numpy as np
import pytest
import torch
from torch import nn

from medtut.adapters import (
    AdapterError,
    SizePrior,
    size_prior_loss,
    support_prior,
    transduce,
)
from medtut.adapters.layers import SpatialAdapter


def loss_at(share, prior=0.2, margin=0.3):
    """Loss and its derivative by the share, of a volume with one probability."""
    p = torch.full((1, 2, 2, 2), share, requires_grad=True)
    loss = size_prior_loss(p, prior, margin)
    loss.backward()
    return loss.item(), p.grad.sum().item()


# --- the loss ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "value", "slope"),
    [
        (0.05, 0.75 - 0.3, -1 / 0.2),
        (0.1, 0.5 - 0.3, -1 / 0.2),
        (0.15, 0, 0),
        (0.2, 0, 0),
        (0.28, 0, 0),
        (0.4, 0.5 - 0.3, 0.2 / 0.4**2),
        (0.8, 0.75 - 0.3, 0.2 / 0.8**2),
    ],
)
def test_value_and_slope_in_closed_form(share, value, slope):
    assert loss_at(share) == pytest.approx((value, slope), abs=1e-6)


def test_slopes_are_those_of_finite_differences_on_both_sides():
    for share in (0.03, 0.12, 0.18, 0.25, 0.35, 0.6, 0.95):
        p = torch.full((1, 8), share, dtype=torch.float64)
        h = 1e-3
        up, down = (size_prior_loss(p + e, 0.2).item() for e in (h, -h))
        assert loss_at(share)[1] == pytest.approx((up - down) / (2 * h), rel=0.02)


def test_constant_denominator_would_be_too_steep_above_only():
    for share, factor in ((0.1, 1), (0.6, 3)):  # 0.6 is three times the prior
        p = torch.full((1, 8), share, requires_grad=True)
        mean = p.mean()
        ((0.2 - mean) / max(mean.item(), 0.2)).abs().backward()
        assert p.grad.sum().item() == pytest.approx(factor * loss_at(share)[1])


def test_a_factor_too_large_costs_what_it_costs_too_small():
    for factor in (1.2, 2, 4):
        small, large = loss_at(0.2 / factor)[0], loss_at(0.2 * factor)[0]
        assert small == pytest.approx(large, abs=1e-6)


def test_margin_is_where_it_begins_and_the_loss_is_continuous_there():
    for edge in (0.2 * 0.7, 0.2 / 0.7):
        assert loss_at(edge)[0] == pytest.approx(0, abs=1e-6)
    assert loss_at(0.139)[1] < 0 < loss_at(0.287)[1]
    assert loss_at(0.141)[1] == loss_at(0.285)[1] == 0
    assert loss_at(0.19, margin=0)[0] > 0


def test_structures_count_each_for_itself():
    p = torch.stack([torch.full((4,), 0.4), torch.full((4,), 0.01)]).requires_grad_()
    loss = size_prior_loss(p, [0.2, 0.01])
    loss.backward()
    assert loss.item() == pytest.approx(0.1)
    assert (p.grad[0] > 0).all()
    assert (p.grad[1] == 0).all()


def test_half_precision_keeps_a_small_organ():
    p = torch.zeros(1, 200_000).half()
    p[0, 0] = 1  # a share of 5e-6, of which float16 knows two digits
    loss = size_prior_loss(p, 5.5e-6, margin=0).item()
    assert loss == pytest.approx(1 - 5 / 5.5, rel=1e-3)


@pytest.mark.parametrize(
    ("prior", "margin"),
    [(0, 0.3), (1.5, 0.3), (float("nan"), 0.3), ([0.1, 0.2], 0.3), (0.2, 1), (0.2, -1)],
)
def test_what_is_no_prior_is_refused(prior, margin):
    with pytest.raises(AdapterError, match="size_prior_loss"):
        size_prior_loss(torch.rand(1, 4), prior, margin)


def test_a_size_in_voxels_is_a_share_of_each_volume():
    p = torch.full((1, 2, 2, 4), 0.5)  # 8 of 16 voxels
    assert SizePrior([8])(p) == 0
    assert SizePrior(4, weight=0.2)(p).item() == pytest.approx(0.2 * (0.5 - 0.3))
    two = torch.stack([p[0], p[0] / 2])
    assert SizePrior([8, 4])(two) == 0  # of 16 each, not of 32
    with pytest.raises(AdapterError, match="grid"):
        SizePrior([17])(p)


def test_sharpened_a_haze_is_no_size_and_has_hardly_a_pull():
    p = torch.full((1, 10, 100), 0.02)  # 20 voxels of haze
    p[0, 0, :10] = 0.9
    p.requires_grad_()
    soft, sharp = (SizePrior([10], margin=0, weight=1, sharpness=s) for s in (1, 8))
    hazy, clear = soft(p), sharp(p)
    assert hazy.item() == pytest.approx(1 - 10 / (9 + 0.02 * 990), abs=1e-5)
    assert clear.item() < 1e-4
    strong, weak = (
        torch.autograd.grad(x, p)[0][0, 5].abs().max() for x in (hazy, clear)
    )
    assert weak < 1e-3 * strong


# --- the prior ---------------------------------------------------------------------


def test_below_five_volumes_the_mean_of_all():
    assert support_prior([10.0]) == [10]
    assert support_prior([1, 2, 3, 100]) == [26.5]


def test_from_five_on_without_what_is_further_than_a_deviation_from_the_median():
    sizes = [10, 11, 12, 13, 100]
    assert np.median(sizes) + np.std(sizes) < 100
    assert support_prior(sizes) == [11.5]
    # As far from the median on the other side, and for each structure by itself.
    both = np.stack([sizes, np.multiply(sizes, 1000)], 1)
    assert support_prior(both).tolist() == [11.5, 11500]
    assert support_prior([100, 101, 102, 103, 1]) == [101.5]
    assert support_prior([1, 1, 1, 8, 10]) == [1]  # 8 is near to the mean


def test_the_bound_itself_is_near_and_something_is_always_left():
    assert support_prior([7.1] * 5) == pytest.approx([7.1])
    assert support_prior([0.1, 0.1, 0.1, 0.3, 0.3, 0.3]) == pytest.approx([0.2])


def test_no_size_is_refused():
    for sizes in (
        [],
        [3, 0],
        [3, float("nan")],
        [float("inf")],
        [-1],
        np.ones((2, 2, 2)),
    ):
        with pytest.raises(AdapterError, match="support_prior"):
            support_prior(sizes)


# --- a test volume -----------------------------------------------------------------


def problem(seed=0):
    """Support where the structure is feature 0 > 0; a test volume with a shift."""
    rng = np.random.default_rng(seed)
    x, other = rng.normal(size=(2, 3, 6, 6, 6)).astype(np.float32)
    other[0] += 0.3
    torch.manual_seed(seed)
    return nn.Conv3d(3, 1, 1), [(x, x[:1] > 0)], other


def share_of(head, volume):
    with torch.no_grad():
        return head(torch.as_tensor(volume)[None]).sigmoid().mean().item()


def test_a_prior_moves_the_predicted_size_towards_it_from_either_side():
    head, support, volume = problem()
    plain = transduce(head, support, volume, steps=40, rate=0.1)
    share = share_of(plain, volume)
    for factor in (0.5, 1.4):
        wanted = factor * share * volume[0].size
        prior = SizePrior([wanted], margin=0, weight=3)
        held = transduce(head, support, volume, prior, steps=40, rate=0.1)
        moved = share_of(held, volume)
        assert abs(moved - factor * share) < 0.5 * abs(share - factor * share)


def test_within_the_margin_it_is_the_plain_adaptation_to_the_bit():
    head, support, volume = problem()
    plain = transduce(head, support, steps=5)
    wide = SizePrior([share_of(plain, volume) * 216], margin=0.9)
    same = transduce(head, support, volume, wide, steps=5)
    assert torch.equal(plain.weight, same.weight)


def test_the_head_that_was_given_stays_and_the_copy_learns():
    head, support, _ = problem()
    before = {k: v.clone() for k, v in head.state_dict().items()}
    adapted = transduce(head, support * 2, steps=60, rate=0.1)
    assert all(torch.equal(before[k], v) for k, v in head.state_dict().items())
    x, y = support[0]
    with torch.no_grad():
        found = adapted(torch.as_tensor(x)[None])[0] > 0
    assert (found.numpy() == y).mean() > 0.9


def test_support_volumes_take_turns():
    head, support, volume = problem()
    second = (volume, volume[:1] > 0)
    first, both = [*support, *support], [*support, second]
    one, same = (transduce(head, s, steps=1).weight for s in (first, both))
    assert torch.equal(one, same)
    two, other = (transduce(head, s, steps=2).weight for s in (first, both))
    assert not torch.equal(two, other)


def test_warm_up_has_no_prior():
    head, support, volume = problem()
    prior = SizePrior([20], margin=0, weight=5)
    plain = transduce(head, support, steps=6)
    whole = transduce(head, support, volume, prior, steps=6, warmup=6)
    part = transduce(head, support, volume, prior, steps=6, warmup=5)
    assert torch.equal(plain.weight, whole.weight)
    assert not torch.equal(plain.weight, part.weight)


def test_only_what_needs_a_gradient_moves_and_a_spatial_adapter_is_a_head():
    _, support, volume = problem()
    torch.manual_seed(0)
    head = nn.Sequential(SpatialAdapter(3, 1), nn.Conv3d(3, 1, 1).requires_grad_(False))
    adapted = transduce(head, support, volume, SizePrior([50]), steps=3)
    assert torch.equal(adapted[1].weight, head[1].weight)
    assert not torch.equal(adapted[0].up.weight, head[0].up.weight)


def test_structures_of_a_linear_probe_adapt_independently():
    _, ((x, y),), volume = problem()
    support = [(x, np.concatenate([y, ~y]))]
    torch.manual_seed(0)
    head = nn.Conv3d(3, 2, 1)
    how = {"margin": 0, "weight": 1}
    one = transduce(head, support, volume, SizePrior([50, 60], **how), steps=5)
    two = transduce(head, support, volume, SizePrior([50, 190], **how), steps=5)
    torch.testing.assert_close(one.weight[0], two.weight[0])
    assert not torch.allclose(one.weight[1], two.weight[1])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda a: a.update(support=[]), "support"),
        (lambda a: a.update(volume=None), "volume"),
        (lambda a: a.update(steps=0), "steps"),
        (lambda a: a.update(warmup=4), "warmup"),
        (lambda a: a["head"].requires_grad_(False), "gradient"),
        (lambda a: a.update(volume=a["volume"][:2]), "takes no"),
        (lambda a: a.update(support=[(a["volume"], np.ones((2, 6, 6, 6)))]), "labels"),
        (lambda a: a.update(prior=SizePrior([3, 4])), "priors"),
    ],
)
def test_what_does_not_fit_is_refused(change, said):
    head, support, volume = problem()
    given = {"head": head, "support": support, "volume": volume, "steps": 3}
    given |= {"prior": SizePrior([50])}
    change(given)
    with pytest.raises(AdapterError, match=said):
        transduce(**given)
