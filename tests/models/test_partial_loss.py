"""Partial-label loss against hand-computed cases; the adaptation's against MONAI."""

import pytest
import torch
from torch import nn

from medtut.data.organs import OrganError
from medtut.models.partial_loss import (
    AdaptationLoss,
    PartialDice,
    balanced_cross_entropy,
    soft_dice,
)

BIG = 200.0  # a logit whose sigmoid is exactly 0 or 1 in float32


def volumes(batch=2, channels=4, seed=0):
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, channels, 3, 4, 5, generator=rng, requires_grad=True)
    target = (torch.rand(batch, channels, 3, 4, 5, generator=rng) > 0.6).float()
    return logits, target


def hard(voxels, size=8):
    """(1, 1, 2, 2, 2) with the first voxels set."""
    out = torch.zeros(size)
    out[:voxels] = 1
    return out.view(1, 1, 2, 2, 2)


@pytest.mark.parametrize(
    ("predicted", "true", "shared", "want"),
    [(3, 3, 3, 0), (0, 0, 0, 0), (4, 0, 0, 4 / 5), (0, 3, 0, 3 / 4), (2, 4, 2, 2 / 7)],
)
def test_soft_dice_by_hand(predicted, true, shared, want):
    p, t = hard(predicted), hard(true)
    assert int((p * t).sum()) == shared
    assert soft_dice(p, t).shape == (1, 1)
    assert soft_dice(p, t).item() == pytest.approx(want, abs=1e-6)


def test_a_perfect_organ_of_100_voxels_has_no_loss():
    """Unlike upstream's metric, which adds 1 to the denominator only: 200 / 201."""
    one = torch.zeros(1, 1, 10, 10, 10)
    one[..., 0] = 1
    assert one.sum() == 100
    assert soft_dice(one, one).item() == 0
    assert round(2 * 100 / (200 + 1), 3) == 0.995


def test_masked_mean_by_hand():
    """Two volumes, three structures: losses 0, 4/5, 3/4 with masks 110 and 001."""
    p = torch.cat([hard(3), hard(4), hard(0)], 1).repeat(2, 1, 1, 1, 1)
    t = torch.cat([hard(3), hard(0), hard(3)], 1).repeat(2, 1, 1, 1, 1)
    mask = torch.tensor([[1, 1, 0], [0, 0, 1]])
    got = PartialDice()(BIG * (2 * p - 1), t, mask)
    assert got.item() == pytest.approx(((0 + 4 / 5) / 2 + 3 / 4) / 2, abs=1e-6)
    all_ = PartialDice("background")(BIG * (2 * p - 1), t, mask)
    assert all_.item() == pytest.approx((0 + 4 / 5 + 3 / 4) / 3, abs=1e-6)


def test_an_unannotated_structure_has_exactly_no_gradient():
    logits, target = volumes()
    mask = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 1]], dtype=torch.bool)
    PartialDice()(logits, target, mask).backward()
    grad = logits.grad.flatten(2).abs().sum(2)
    assert (grad[~mask] == 0).all()
    assert (grad[mask] > 0).all()
    other = volumes()[0]
    PartialDice("background")(other, target, mask).backward()
    assert (other.grad.flatten(2).abs().sum(2) > 0).all(), "the demonstration"


def test_unlabelled_as_background_pushes_down():
    """What a hospital did not outline is learned as absent: its logits fall."""
    logits, target = volumes(1, 2)
    target[:, 1] = 0  # there, but not outlined
    mask = torch.tensor([[1, 0]])
    PartialDice("background")(logits, target, mask).backward()
    assert (logits.grad[:, 1] > 0).all()


def test_the_labels_of_the_unannotated_do_not_matter():
    logits, target = volumes()
    mask = torch.tensor([[1, 0, 1, 1], [1, 0, 0, 1]])
    one = PartialDice()(logits, target, mask)
    target[:, 1] = 1 - target[:, 1]
    assert PartialDice()(logits, target, mask) == one


def test_what_is_not_annotated_may_be_anything():
    logits, target = volumes()
    bad = logits.detach().clone()
    bad[:, 1] = float("nan")
    bad[:, 2] = float("inf")
    bad.requires_grad_()
    mask = torch.tensor([[1, 0, 0, 1]] * 2)
    loss = PartialDice()(bad, target, mask)
    assert loss == PartialDice()(logits, target, mask)
    loss.backward()
    assert torch.isfinite(bad.grad).all()


def test_nothing_annotated():
    logits, target = volumes()
    loss = PartialDice()(logits, target, torch.zeros(2, 4))
    loss.backward()
    assert loss.item() == 0
    assert (logits.grad == 0).all()
    # A volume that says nothing does not make the other one count half.
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0]])
    one = PartialDice()(logits[:1], target[:1], mask[:1])
    assert PartialDice()(logits, target, mask) == one


def test_balanced_cross_entropy_by_hand():
    """A quarter is inside with p = 0.8, the rest outside with p = 0.1; one is empty."""
    inside, outside = torch.tensor([0.8, 0.1]).logit()
    target = torch.zeros(1, 2, 2, 2, 2)
    target[0, 0, 0, 0] = 1
    logits = torch.where(target > 0, inside, outside)
    both = -(torch.tensor(0.8).log() + torch.tensor(0.9).log()) / 2
    rest = -torch.tensor(0.9).log() / 2
    got = balanced_cross_entropy(logits, target)
    assert got.shape == (1, 2)
    torch.testing.assert_close(got[0], torch.stack([both, rest]))
    # All of the volume: the other half is left.
    full = balanced_cross_entropy(inside.expand(target.shape), torch.ones(target.shape))
    assert full[0, 0].item() == pytest.approx(-torch.tensor(0.8).log().item() / 2)
    # However certain, and in half precision: no infinity.
    sure = torch.full((1, 1, 96, 96, 96), -300.0, dtype=torch.float16)
    assert balanced_cross_entropy(sure, torch.ones(sure.shape)).item() == 150


def test_as_heavy_as_all_others_however_small():
    """Dice alone hardly moves the voxels of a small organ that nothing predicts."""
    shares = {}
    for voxels in (1, 100):
        logits = torch.zeros(1, 1, 20, 20, 20, requires_grad=True)
        target = torch.zeros(logits.shape)
        target.view(-1)[:voxels] = 1
        balanced_cross_entropy(logits, target).sum().backward()
        grad = logits.grad.view(-1)
        shares[voxels] = -grad[:voxels].sum().item(), grad[voxels:].sum().item()
    assert shares[1] == pytest.approx((0.25, 0.25), rel=1e-4)
    assert shares[100] == pytest.approx((0.25, 0.25), rel=1e-4)


def test_balance_is_added_and_masked():
    logits, target = volumes()
    mask = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 1]], dtype=torch.bool)
    plain, loss = PartialDice()(logits, target, mask), PartialDice(balance=0.5)
    each = balanced_cross_entropy(logits, target)
    more = (each[0, [0, 2]].mean() + each[1, 3]) / 2
    got = loss(logits, target, mask)
    assert got.item() == pytest.approx((plain + 0.5 * more).item(), abs=1e-6)
    got.backward()
    grad = logits.grad.flatten(2).abs().sum(2)
    assert (grad[~mask] == 0).all()
    bad = logits.detach().clone()
    bad[:, 1] = float("nan")
    again = loss(bad.requires_grad_(), target, mask)
    assert again == got
    again.backward()
    assert bad.grad.isfinite().all()
    every = PartialDice("background", balance=1)
    want = soft_dice(logits.sigmoid(), target) + each
    assert every(logits, target, mask).item() == pytest.approx(
        want.mean().item(), abs=1e-6
    )


def test_half_precision_does_not_overflow():
    logits = torch.full((1, 1, 96, 96, 96), 5.0, dtype=torch.float16)
    loss = PartialDice()(logits, torch.ones(logits.shape), torch.ones(1, 1))
    assert 0 < loss.item() < 0.01


def test_gradient_numerically():
    logits, target = volumes(1, 3)
    mask = torch.tensor([[1, 0, 1]])
    loss = PartialDice()
    loss(logits, target, mask).backward()
    at, step = (0, 2, 1, 1, 1), 1e-2
    ends = []
    for sign in (1, -1):
        moved = logits.detach().clone()
        moved[at] += sign * step
        ends.append(loss(moved, target, mask).item())
    slope = (ends[0] - ends[1]) / (2 * step)
    assert logits.grad[at].item() == pytest.approx(slope, rel=0.02)


def test_shapes_are_checked():
    logits, target = volumes()
    with pytest.raises(OrganError, match=r"annotated.* \(4,\)\]; they must be"):
        PartialDice()(logits, target, torch.ones(4))
    with pytest.raises(OrganError, match="they must be"):
        PartialDice()(logits, target[:, :1], torch.ones(2, 4))
    with pytest.raises(OrganError, match="they must be"):
        AdaptationLoss()(logits, target[:, :1])


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("ce", [True, False])
@pytest.mark.parametrize("task", ["binary", "softmax"])
def test_adaptation(task, ce, background):
    """Against the formula written out: which activation, channels and smoothing."""
    logits, target = volumes(2, 3, seed=1)
    target = nn.functional.one_hot(target.argmax(1), 3).movedim(-1, 1).float()
    probability, first = logits.softmax(1), 0 if background else 1
    entropy = -(logits.log_softmax(1) * target).sum(1).mean()
    if task == "binary":
        logits, target, first = logits[:, :1], target[:, :1], 0
        probability = logits.sigmoid()
        entropy = nn.functional.binary_cross_entropy(probability, target)
    p, t = probability[:, first:].flatten(2), target[:, first:].flatten(2)
    each = 1 - (2 * (p * t).sum(2) + 1) / (p.sum(2) + t.sum(2) + 1)
    want = each.mean() + ce * entropy
    got = AdaptationLoss(task, background, ce)(logits, target)
    assert got.item() == pytest.approx(want.item(), rel=1e-5)
    torch.testing.assert_close(soft_dice(p[..., None], t[..., None]), each)


def test_background_takes_a_share():
    """A prediction without any organ: background is right, the organ is missed."""
    target = torch.zeros(1, 2, 10, 10, 10)
    target[:, 1, :2, :2, :2] = 1
    target[:, 0] = 1 - target[:, 1]
    none = torch.zeros_like(target)
    none[:, 0] = BIG
    with_it = AdaptationLoss("softmax")(none, target).item()
    without = AdaptationLoss("softmax", include_background=False)(none, target).item()
    assert without == pytest.approx(1 - 1 / 9, abs=1e-5)
    assert with_it == pytest.approx((without + 1 - 1985 / 1993) / 2, abs=1e-5)
