"""Losses and evaluations with planted defects, and sound ones that must pass."""

import math

import numpy as np
import pytest
import torch
from monai import losses
from torch.nn import functional as F

from medtut.audit import (
    Subject,
    SubjectError,
    audit,
    evaluation_misbehaves,
    loss_misbehaves,
)
from medtut.audit.loss_checks import free_course
from medtut.evaluate.published_sam import (
    one_slice_validation,
    self_target_loss,
    stripped_axis_loss,
)

CHANNEL = "without complaint"
bce = F.binary_cross_entropy_with_logits
dice_ce = losses.DiceCELoss(sigmoid=True, squared_pred=True)


def own(z, t, smooth=1.0):
    """Cross-entropy and Dice per image, written by hand."""
    p = z.sigmoid()
    both, sizes = (p * t).sum((1, 2, 3)), (p + t).sum((1, 2, 3))
    return 1 - ((2 * both + smooth) / (sizes + smooth)).mean() + bce(z, t)


def run(function):
    return loss_misbehaves(Subject(segmentation_loss=function))


@pytest.mark.parametrize(
    ("function", "needs_axis"),
    [
        (dice_ce, True),
        (losses.DiceLoss(sigmoid=True), True),
        (losses.DiceLoss(sigmoid=True, batch=True, squared_pred=True), True),
        (losses.DiceFocalLoss(sigmoid=True), True),
        (losses.GeneralizedDiceLoss(sigmoid=True), False),
        (losses.TverskyLoss(sigmoid=True, alpha=0.1, beta=0.9), True),
        (losses.FocalLoss(), False),
        (torch.nn.BCEWithLogitsLoss(), False),
        (torch.nn.BCEWithLogitsLoss(reduction="sum"), False),
        (own, False),
        (lambda z, t: bce(z, t, pos_weight=torch.tensor(20.0)), False),
        (lambda z, t: bce(z, 0.9 * t + 0.05), False),  # label smoothing
        (lambda z, t: F.mse_loss(z.sigmoid(), t), False),
        (lambda z, t: own(z, t).double().reshape(1), False),
        (lambda z, t: F.cross_entropy(torch.cat([0 * z, z], 1), t[:, 0].long()), None),
    ],
)
def test_sound_losses_pass(function, needs_axis):
    findings, notes = run(function)
    assert findings == []
    if needs_axis is not None:
        assert [CHANNEL in one for one in notes] == [True] * needs_axis


def test_silent_without_a_loss_or_an_evaluation():
    assert loss_misbehaves(Subject()) == ([], [])
    assert evaluation_misbehaves(Subject()) == ([], [])


def upper(t):
    """The target without its lower half, which the probe's lesions reach into."""
    return t * (torch.arange(t.shape[2])[:, None] < 14)


def detached(z, t):
    return dice_ce(z.detach(), t)


def hard(z, t):
    return 1 - 2 * ((z > 0) * t).sum() / ((z > 0) + t).sum()


@pytest.mark.parametrize(
    ("function", "severity", "where"),
    [
        (self_target_loss, "error", "target"),
        (lambda z, t: dice_ce(z, (z > 0).float()), "error", "target"),
        (detached, "error", "target"),
        (hard, "error", "target"),
        (lambda z, t: torch.tensor(1.0), "error", "target"),
        (lambda z, t: 0.5, "error", "target"),
        (losses.DiceLoss(), "error", "order"),  # takes probabilities
        (losses.DiceLoss(softmax=True), "error", "order"),  # of one channel: all 1
        (lambda z, t: -own(z, t), "error", "order"),
        (lambda z, t: own(z, 1 - t), "error", "order"),
        (lambda z, t: own(z, upper(t)), "error", "order"),
        (lambda z, t: torch.minimum(own(z, t), own(z, 1 - t)), "error", "order"),
        (lambda z, t: ((z.sigmoid() - t[:, 0]) ** 2).mean(), "error", "order"),
        (
            lambda z, t: (
                -(t * z.sigmoid().log() + (1 - t) * (1 - z.sigmoid()).log()).mean()
            ),
            "error",
            "order",
        ),
        # Sure logits are sound here, unsure ones are not: the cost of p has a hump.
        (lambda z, t: own(z, t) - 9 * (z.sigmoid() - t).abs().mean(), "error", "order"),
        (lambda z, t: dice_ce(z.squeeze(0), t.squeeze(0)), "error", "axes"),
        (lambda z, t: own(z[..., :16], t[..., :16]), "error", "axes"),
        (lambda z, t: dice_ce(z.sigmoid(), t), "warning", "floor"),
        (lambda z, t: bce(z.sigmoid(), t), "warning", "floor"),
        (lambda z, t: own(z[:1], t[:1]), "error", "overfit"),
    ],
)
def test_planted_defects(function, severity, where):
    findings, _ = run(function)
    assert (findings[0].severity, findings[0].where) == (severity, where)
    assert len(findings[0].numbers) >= 4
    assert where == "floor" or "floor" not in [one.where for one in findings]


def test_numbers_of_the_loss_that_looks_at_itself():
    (one,), _ = run(self_target_loss)
    assert one.numbers["gradient_difference"] == 0
    assert one.numbers["loss_after"] < 0.02 < 0.5 < one.numbers["loss_before"]
    assert one.numbers["dice_after"] == one.numbers["dice_before"] < 0.4


def test_the_stripped_batch_axis():
    order, axes = run(stripped_axis_loss)[0]
    assert (order.where, axes.where) == ("order", "axes")
    assert axes.numbers["axes_exchanged"] != pytest.approx(axes.numbers["value"], 0.1)
    assert axes.numbers["perfect"] > 0.5 * axes.numbers["nothing_found"]
    assert "BCHW" in axes.message


def test_a_loss_that_is_not_finite_on_an_empty_target():
    def nan_there(z, t):
        return own(z, t) / (1 if t.flatten(1).any(1).all() else math.nan)

    (one, *_) = run(nan_there)[0]
    assert one.where == "order"
    assert math.isnan(one.numbers["perfect"])


@pytest.mark.parametrize(
    "function",
    [
        lambda z, t: bce(z, t, reduction="none"),
        lambda z, t: None,
        lambda z, t: (_ for _ in ()).throw(ValueError("three channels, please")),
    ],
)
def test_a_loss_that_cannot_be_asked_is_an_error_of_the_subject(function):
    with pytest.raises(SubjectError, match=r"segmentation_loss.*\(3, 1, 24, 32\)"):
        run(function)


def test_works_without_gradients_and_leaves_the_random_state():
    state = torch.get_rng_state()
    with torch.no_grad():
        assert run(own)[0] == []
        assert run(self_target_loss)[0][0].numbers["loss_after"] < 0.02
    assert torch.equal(state, torch.get_rng_state())


def test_free_course_leaves_its_start():
    start, target = torch.zeros(2, 1, 6, 5), torch.ones(2, 1, 6, 5)
    course = free_course(bce, start, target, steps=7)
    assert [step for step, *_ in course] == list(range(8))
    assert course[0] == (0, pytest.approx(math.log(2)), 0.0)
    assert course[-1][1] < course[0][1]
    assert course[-1][2] == 1
    assert not start.any()
    start[0], start[1, :, :3] = 9, 9  # right in one image, in half of the other
    assert free_course(bce, start, target, steps=0)[0][2] == pytest.approx(2 / 3)


# --------------------------------------------------------------------- evaluation
def overlap(p, t):
    return 2 * float((p * t).sum()) / max(float(p.sum() + t.sum()), 1)


def every_slice(model, image, label, prepare=lambda x: x, rows=None):
    """Predict slice by slice and judge the volume."""
    model.eval()
    assert next(model.parameters()).device.type == "cpu"
    found = np.zeros(label.shape)
    for z in range(label.shape[2]) if rows is None else rows(label):
        x = prepare(torch.from_numpy(image[:, :, z].copy())[None, None])
        logits = model(x, None, multimask_output=False).detach()
        assert logits.shape[1] == 1
        logits = F.interpolate(logits, label.shape[:2], mode="bilinear")
        found[:, :, z] = logits[0, 0].sigmoid() > 0.5
    return overlap(found, label)


def as_rgb(x):
    x = 255 * (x - x.min()) / (x.max() - x.min()).clamp(min=1e-6)
    return F.interpolate(x.byte().float().expand(-1, 3, -1, -1), scale_factor=4)


def whole(model, image, label):
    logits = model(torch.from_numpy((image - image.mean()) / image.std())[None, None])
    return overlap((logits[0, 0] > 0).float().detach(), torch.from_numpy(label))


def largest_slice(model, image, label):
    z = int(label.sum((0, 1)).argmax())
    return every_slice(model, image[:, :, [z]], label[:, :, [z]])


SOUND = {
    "every slice": every_slice,
    "prepared": lambda m, x, y: every_slice(m, x, y, as_rgb),
    "whole": whole,
    "tensor": lambda m, x, y: torch.tensor(whole(m, x, y)),
    "largest slice": largest_slice,
    "a loss": lambda m, x, y: 1 - whole(m, x, y),
}


@pytest.mark.parametrize("name", SOUND)
def test_sound_evaluations_pass(name):
    assert evaluation_misbehaves(Subject(evaluation=SOUND[name])) == ([], [])


def never_written(model, image, label):
    whole(model, image, label)
    return overlap(np.zeros(label.shape), label)


BROKEN = {
    "one slice": lambda m, x, y: one_slice_validation(m, x, y)["dice"],
    "its loss": lambda m, x, y: one_slice_validation(m, x, y)["loss"],
    "middle": lambda m, x, y: every_slice(m, x, y, rows=lambda y: [20]),
    "mixed up": lambda m, x, y: every_slice(m, x, y[:, :, ::-1]),
    "turned": lambda m, x, y: whole(m, x, y[::-1].copy()),
    "never written": never_written,
    "percent": lambda m, x, y: 100 * whole(m, x, y),
    "coding": lambda m, x, y: whole(m, x, 2 * y),
    "accuracy": lambda m, x, y: 0.95 + 0.05 * whole(m, x, y),
    "label only": lambda m, x, y: overlap(y, y),
    "nan": lambda m, x, y: math.nan,
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_evaluations(name):
    (one,), _ = evaluation_misbehaves(Subject(evaluation=BROKEN[name]))
    assert (one.severity, one.where) == ("error", "top")
    assert "Is the whole volume predicted" in one.message


def test_numbers_of_the_one_slice_evaluation():
    (one,), _ = evaluation_misbehaves(Subject(evaluation=BROKEN["one slice"]))
    assert one.numbers["perfect"] == pytest.approx(0.0134, abs=3e-3)
    assert one.numbers["nothing_found"] == 0
    assert (one.numbers["lesion_slices_seen"], one.numbers["of"]) == (1, 30)
    (one,), _ = evaluation_misbehaves(Subject(evaluation=BROKEN["mixed up"]))
    assert (one.numbers["lesion_slices_seen"], one.numbers["of"]) == (30, 30)


@pytest.mark.parametrize("value", [None, "good", np.zeros(2)])
def test_an_evaluation_without_a_number(value):
    with pytest.raises(SubjectError, match=r"evaluation .*\(\d+, \d+, \d+\)"):
        evaluation_misbehaves(Subject(evaluation=lambda *_: value))


# -------------------------------------------------------------------- registration
def test_audit_runs_them_without_a_model():
    report = audit({"segmentation_loss": self_target_loss, "evaluation": whole})
    assert report.checked == ("loss_misbehaves", "evaluation_misbehaves")
    assert [one.where for one in report.findings] == ["target"]
    assert audit(Subject(segmentation_loss=dice_ce)).exit_code == 0
    assert audit(Subject(evaluation=BROKEN["one slice"])).exit_code == 1
