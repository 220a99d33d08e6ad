"""The numbers of the published loss and validation, derived again."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from medtut.errors import MedtutError
from medtut.evaluate.published_sam import (
    correct_loss,
    one_slice_validation,
    self_target_course,
    self_target_loss,
    stripped_axis_loss,
    validation_loss,
)


def logits_and_square():
    generator = torch.Generator().manual_seed(0)
    logits = 0.5 * torch.randn(1, 1, 64, 64, generator=generator)
    target = torch.zeros(1, 1, 64, 64)
    target[..., 20:40, 20:40] = 1
    return logits, target


def test_the_loss_that_looks_at_itself_falls_while_dice_stands_still():
    logits, target = logits_and_square()
    start = logits.clone()
    course = self_target_course(logits, target)
    assert len(course) == 301
    assert course[0][1] == pytest.approx(0.665, abs=5e-4)
    assert course[-1][1] == pytest.approx(0.003, abs=5e-4)
    assert {dice for _, _, dice in course} == {course[0][2]}
    assert course[0][2] == pytest.approx(0.1639, abs=5e-5)
    falls = np.diff([loss for _, loss, _ in course])
    assert (falls < 0).all()
    assert torch.equal(logits, start)


def test_its_dice_part_is_zero_and_the_rest_is_the_entropy():
    logits, target = logits_and_square()
    p = logits.sigmoid()
    entropy = -(p * p.log() + (1 - p) * (1 - p).log()).mean()
    torch.testing.assert_close(self_target_loss(logits), entropy)
    assert self_target_loss(logits, target) == self_target_loss(logits, 1 - target)


def disc():
    """The size of a cropped slice; logits of 8 are a probability of 0.9997."""
    y, x = np.ogrid[:138, :202]
    mask = (y - 69) ** 2 + (x - 101) ** 2 < 20**2
    return torch.from_numpy(mask)[None, None].float()


def test_the_stripped_batch_axis_scores_a_perfect_mask_22():
    target = disc()
    sure = 8 * (2 * target - 1)
    nothing = torch.full_like(target, -8)
    assert stripped_axis_loss(sure, target).item() == pytest.approx(22.06, abs=5e-3)
    assert stripped_axis_loss(nothing, target).item() == pytest.approx(31.1, abs=0.05)
    assert correct_loss(sure, target).item() == pytest.approx(0.0003, abs=5e-5)


def test_stripped_means_one_signal_of_h_channels_per_item():
    target = torch.cat([disc(), disc().roll(30, -1)])
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(target.shape, generator=generator)
    one = [stripped_axis_loss(logits[k : k + 1], target[k : k + 1]) for k in (0, 1)]
    torch.testing.assert_close(stripped_axis_loss(logits, target), sum(one) / 2)
    row = logits[0].softmax(1).log()  # over the rows of the image
    entropy = -(target[0] * row).sum(1).mean()
    p, t = logits[0].sigmoid(), target[0]
    both, sizes = (p * t).sum(2), (p**2).sum(2) + (t**2).sum(2)
    dice = (1 - (2 * both + 1e-5) / (sizes + 1e-5)).mean()
    torch.testing.assert_close(one[0], entropy + dice)


def test_correct_loss_is_dice_and_cross_entropy_one_to_one():
    logits, target = logits_and_square()
    p = logits.sigmoid()
    dice = 1 - 2 * (p * target).sum() / (p**2 + target**2).sum()
    bce = F.binary_cross_entropy_with_logits(logits, target)
    got = correct_loss(logits, target.long())
    torch.testing.assert_close(got, dice + bce, atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def tumour():
    """A lesion of 30 slices, core, enhancing rim and a shell of oedema."""
    x, y, z = np.ogrid[:138, :202, :138]
    radius = ((x - 69) ** 2 + (y - 101) ** 2) / 12.85**2 + ((z - 69.2) / 15.2) ** 2
    label = np.zeros(radius.shape, np.uint8)
    for limit, value in ((1, 2), (0.9, 3), (0.75, 1)):
        label[radius < limit] = value
    assert label.any((0, 1)).sum() == 30
    return label


def knows(x):
    return 20 * (x > 0).float() - 10


def test_validation_of_one_slice_cannot_tell_perfect_from_nothing(tumour):
    assert validation_loss(tumour > 0, tumour) == pytest.approx(1.667, abs=1e-3)
    assert validation_loss(0 * tumour, tumour) == pytest.approx(1.6766, abs=5e-5)
    score = one_slice_validation(knows, tumour, tumour)
    assert score["loss"] == pytest.approx(1.6765, abs=5e-5)
    assert score["dice"] == pytest.approx(0.013, abs=5e-4)
    blind = one_slice_validation(lambda x: x - 99, tumour, tumour)
    assert blind["dice"] == 0
    assert blind["loss"] == validation_loss(0 * tumour, tumour)


def test_one_slice_validation_takes_the_first_slice_with_tumour():
    label = np.zeros((6, 5, 4), np.int64)
    label[1:3, 1:3, 1:4] = 3
    label[:, :, 1][label[:, :, 1] > 0] = [1, 2, 3, 1]
    asked = []

    def model(x):
        asked.append(x)
        return knows(x)

    score = one_slice_validation(model, label * 0.5, label)
    assert [tuple(x.shape) for x in asked] == [(1, 1, 6, 5)]
    assert asked[0].sum() == 3.5
    assert score["dice"] == pytest.approx(2 * 4 / (4 + 12))


@pytest.mark.parametrize(
    ("image", "label"),
    [
        (np.ones((4, 4, 3)), np.ones((4, 4, 2))),
        (np.ones((4, 4)), np.ones((4, 4))),
        (np.ones((4, 4, 3)), np.zeros((4, 4, 3))),
    ],
)
def test_what_is_no_volume_with_a_tumour_is_refused(image, label):
    with pytest.raises(MedtutError, match="with tumour"):
        one_slice_validation(knows, image, label)
