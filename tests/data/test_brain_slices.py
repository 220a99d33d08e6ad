"""The slices of lesson 01: deterministic, labelled, and not solved by a threshold."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from medtut.data.brain_slices import (
    SIDE,
    SLABS,
    SliceSpec,
    brain_slices,
    template,
)
from medtut.errors import MedtutError


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDTUT_CACHE", str(tmp_path))


def test_shapes_labels_and_normalisation():
    drawn = brain_slices(SliceSpec("t2", "train", 4))
    assert drawn["image"].shape == (4, 1, SIDE, SIDE)
    assert drawn["label"].shape == (4, SIDE, SIDE)
    assert set(np.unique(drawn["label"])) == {0, 1, 2, 3}
    for image, label in zip(drawn["image"][:, 0], drawn["label"], strict=True):
        assert abs(image[label > 0].mean()) < 1e-4
        assert image[label > 0].std() == pytest.approx(1, abs=1e-3)


def test_same_seed_same_slices_and_a_longer_list_begins_with_the_shorter(
    tmp_path, monkeypatch
):
    short = brain_slices(SliceSpec("flair", "test", 2))
    monkeypatch.setenv("MEDTUT_CACHE", str(tmp_path / "other"))  # drawn, not read back
    again = brain_slices(SliceSpec("flair", "test", 3))
    for key in short:
        np.testing.assert_array_equal(short[key], again[key][:2])


def test_seed_and_split_change_the_subjects():
    spec = SliceSpec("t1", "train", 1)
    first = brain_slices(spec)["image"]
    for other in (replace(spec, seed=1), replace(spec, split="test")):
        assert not np.array_equal(first, brain_slices(other)["image"])


def test_the_order_of_tissues_is_that_of_the_contrast():
    means = {}
    for contrast in ("t1", "t2"):
        drawn = brain_slices(SliceSpec(contrast, "train", 4, noise=0.001, bias=0.0))
        picture, label = drawn["image"][:, 0], drawn["label"]
        means[contrast] = [picture[label == k].mean() for k in (1, 2, 3)]
    assert means["t1"] == sorted(means["t1"])  # fluid dark, white matter bright
    assert means["t2"] == sorted(means["t2"], reverse=True)


def test_slabs_of_the_splits_do_not_touch():
    slabs = sorted(slab for slabs in SLABS.values() for slab in slabs)
    for (_, top), (bottom, _) in pairwise(slabs):
        assert bottom - top >= 4, "at least one level of 2 mm lies between"
    levels = {
        split: set(brain_slices(SliceSpec("t2", split, 6))["z"]) for split in SLABS
    }
    assert not levels["train"] & levels["test"]


def test_template_is_the_expected_brain():
    maps = template()
    assert maps["t1"].shape == maps["gm"].shape == maps["wm"].shape == (99, 117, 95)
    assert (np.diff(maps["z"]) == 2).all()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (SliceSpec("pd", "train", 1), "unknown contrast 'pd'"),
        (SliceSpec("t1", "all", 1), "unknown split 'all'"),
        (SliceSpec("t1", "train", 0), "at least 1"),
    ],
)
def test_bad_specs_say_what_there_is(spec, message):
    with pytest.raises(MedtutError, match=message):
        brain_slices(spec)
