"""``data_scripts/pretrain_swin_unetr_small.py``: patches, loss and scores."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from medtut.data.abdomen_cohort import annotated_by, source_hospitals
from medtut.data.organs import BASE, NOVEL, STRUCTURES
from medtut.data.partial import annotated_mask

SHAPE = (70, 50, 90)


@pytest.fixture(scope="module")
def script():
    root = Path(__file__).parents[2] / "data_scripts"
    spec = importlib.util.spec_from_file_location(
        "pretrain_swin_script", root / "pretrain_swin_unetr_small.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def volume(script, group="a", names=("liver", "spleen"), shape=SHAPE):
    """A bright liver on one side and high, a darker spleen on the other and low."""
    image, index = np.full((1, *shape), 0.4, np.float16), np.zeros(shape, np.uint8)
    first, last = slice(0, 30), slice(-30, None)
    for name, x, z, value in (
        ("liver", first, last, 0.9),
        ("spleen", last, first, 0.1),
    ):
        where = (x, slice(10, 40), z)
        image[(0, *where)] = value
        if name in names:
            index[where] = 1 + STRUCTURES.index(name)
    return script.Case(image, index, annotated_mask(names), group)


def number(name):
    return 1 + STRUCTURES.index(name)


def test_what_is_taught_is_the_base_and_nothing_novel(script):
    assert set(BASE) <= set(script.TAUGHT) <= set(STRUCTURES)
    assert not set(script.TAUGHT) & set(NOVEL)
    outlined = set().union(*map(annotated_by, source_hospitals()))
    assert outlined == set(script.TAUGHT)


def test_targets_are_the_numbers(script):
    index = torch.zeros(2, 3, 4, dtype=torch.uint8)
    index[1, 2, 3] = number("aorta")
    found = script.targets(index)
    assert found.shape == (29, 2, 3, 4)
    assert found.sum() == 1
    assert found[STRUCTURES.index("aorta"), 1, 2, 3] == 1


def test_patches_keep_image_and_labels_together(script):
    torch.manual_seed(0)
    patches = script.Patches([volume(script)], 6)
    seen = set()
    for n in range(6):
        one = patches[n]
        assert one["image"].shape == (1, *script.PATCH)
        assert one["index"].shape == script.PATCH
        assert one["image"].min() >= 0
        assert one["image"].max() <= 1
        bright, dark = (one["image"][0][one["index"] == number(k)] for k in
                        ("liver", "spleen"))  # fmt: skip
        rest = one["image"][0][(one["index"] == 0) & (one["image"][0] > 0)]
        if len(bright) > 500:
            assert bright.median() > rest.median() + 0.1
        if len(dark) > 500:
            assert dark.median() < rest.median() - 0.05
        assert set(one["index"].unique().tolist()) <= {
            0,
            number("liver"),
            number("spleen"),
        }
        # What is high and on one side stays there.
        at = [(one["index"] == number(k)).nonzero().float().mean(0) for k in
              ("liver", "spleen")]  # fmt: skip
        if len(bright) and len(dark):
            assert at[0][0] < at[1][0]
            assert at[0][2] > at[1][2]
        seen.add(tuple(one["index"].sum((0, 1)).tolist()))
    assert len(seen) == 6, "every patch is another"


def test_a_patch_reaches_every_part_and_is_mostly_inside(script):
    torch.manual_seed(1)
    patches = script.Patches([volume(script)], 40)
    shares = []
    for n in range(40):
        one = patches[n]
        shares.append([(one["index"] == number(k)).any() for k in ("liver", "spleen")])
        assert (one["image"] > 0).float().mean() > 0.3
    assert torch.tensor(shares).float().mean(0).min() > 0.5


def test_hospitals_are_seen_equally_often(script):
    cases = [volume(script, "a")] * 8 + [volume(script, "b")] * 2
    patches = script.Patches(cases, 60)
    groups = [cases[i].group for i in patches.order]
    assert groups.count("a") == groups.count("b") == 30
    assert len(set(patches.order)) == 10


def test_what_is_not_outlined_gives_no_gradient(script):
    torch.manual_seed(0)
    case = volume(script, names=("liver",))
    logits = torch.randn(1, 29, 4, 4, 4, requires_grad=True)
    batch = {
        "image": torch.zeros(1, 1, 4, 4, 4),
        "index": torch.full((1, 4, 4, 4), number("liver"), dtype=torch.uint8),
        "annotated": case.annotated[None],
    }
    loss = script.Loss()(lambda x: logits, batch)
    loss.backward()
    at = STRUCTURES.index("liver")
    assert logits.grad[:, at].abs().min() > 0
    assert logits.grad.abs().sum() == logits.grad[:, at].abs().sum()
    sure = torch.full_like(logits, -20.0)
    sure[:, at] = 20
    assert script.Loss()(lambda x: sure, batch) < 1e-3 < loss
    assert script.Loss()(lambda x: -sure, batch) > 5


def test_dice_is_that_of_the_whole_volume(script):
    case = volume(script, shape=(70, 66, 64))

    def perfect(x):  # by density, which a window cannot change
        y = torch.full((len(x), 29, *x.shape[2:]), -9.0)
        y[:, STRUCTURES.index("liver")][(x[:, 0] > 0.8)] = 9
        y[:, STRUCTURES.index("spleen")][(x[:, 0] > 0.05) & (x[:, 0] < 0.2)] = 9
        return y

    found = script.dice_by_organ(perfect, [case])
    assert found == {"spleen": 1.0, "liver": 1.0}

    def half(x):
        y = perfect(x)
        y[:, STRUCTURES.index("liver")][x[:, 0] < 0.5] = 9  # and all that is dark
        return y

    found = script.dice_by_organ(half, [case])
    n = int((case.index == number("liver")).sum())
    wrong = int((case.image < 0.5).sum())
    assert found["liver"] == pytest.approx(2 * n / (2 * n + wrong), abs=1e-4)
    assert found["spleen"] == 1


def test_augmentation_changes_the_scanner_and_not_the_air(script):
    torch.manual_seed(0)
    image = volume(script).image[:, :32, :32, :32].clone()
    image[:, :4] = 0
    pictures = [script.other_scanner(image) for _ in range(8)]
    for one in pictures:
        assert one.shape == image.shape
        assert one.min() >= 0
        assert one.max() <= 1
    medians = torch.stack([p[0, 6:, :8].median() for p in pictures])
    assert medians.std() > 0.02
    assert (image[:, :3] == 0).all()
