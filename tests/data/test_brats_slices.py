"""Slices of BraTS cases: what is stored, how it is normalised, and the way back."""

import multiprocessing
import pickle
from dataclasses import replace

import nibabel
import numpy as np
import pytest
import torch
from brats_small import SHAPE, arrays, rewrite, write_case

from medtut.data import brats_slices
from medtut.data.brats import find_cases, load_case
from medtut.data.brats_slices import (
    SliceDataset,
    normalise_volume,
    to_volume,
    tumour_slices,
    volume_slices,
)
from medtut.errors import MedtutError

SIDE = 48  # twice and 2.4 times the sides of the small cases


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDTUT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def cases(tmp_path):
    for i in range(2):
        write_case(tmp_path / "data", f"case{i}", seed=i)
    return find_cases(tmp_path / "data")


def expected(case, z, modality=0, how="brain", size=SIDE):
    """The slice made directly: normalise, turn, resize in float64."""
    image = load_case(case, ("flair", "t1", "t1ce", "t2")).image.astype(float)[modality]
    if how == "brain":
        inside = image[image != 0]
        image = np.where(image != 0, (image - inside.mean()) / inside.std(), 0)
        picture = image[:, :, z]
    else:
        picture = image[:, :, z]
        picture = (picture - picture.mean()) / (picture.std() or 1)
    turned = torch.from_numpy(np.rot90(picture).copy())[None, None]
    return torch.nn.functional.interpolate(turned, (size, size), mode="bilinear")[0, 0]


# --- items -----------------------------------------------------------------------


@pytest.mark.parametrize("how", ["brain", "slice"])
def test_items_are_the_slices_of_the_case(cases, how):
    data = SliceDataset(cases, ("flair", "t1ce"), how, size=SIDE)
    for i in (0, len(data) // 2, len(data) - 1):
        item, (name, z) = data[i], data.index[i]
        assert (item["case"], item["z"]) == (name, z)
        assert item["image"].shape == (2, SIDE, SIDE)
        assert item["image"].dtype == torch.float32
        assert item["label"].shape == (SIDE, SIDE)
        assert item["label"].dtype == torch.int64
        case = cases[int(name[-1])]
        for channel, modality in enumerate((0, 2)):
            want = expected(case, z, modality, how)
            np.testing.assert_allclose(item["image"][channel], want, 1e-3, 1e-3)
        label = np.rot90(load_case(case).label[:, :, z])
        assert set(np.unique(item["label"])) <= set(np.unique(label))
        # Each native pixel of the lesion covers 2 by 2.4 stored ones.
        for value in (1, 2, 3):
            share = (item["label"] == value).float().mean()
            assert share == pytest.approx((label == value).mean(), abs=0.01)


def test_anterior_is_up_and_label_and_image_fit(tmp_path):
    folder = write_case(tmp_path / "data", "one", affine=np.diag([1.0, 1, 2, 1]))
    picture = np.zeros(SHAPE, np.int16)
    picture[2:6, 14:18, 6] = 100  # to the left of the array's x, to the front of y
    nibabel.save(
        nibabel.Nifti1Image(picture, np.diag([1.0, 1, 2, 1])),
        folder / "one_flair.nii.gz",
    )
    rewrite(
        folder / "one_seg.nii.gz",
        lambda v: (picture > 0).astype("u1"),
        np.diag([1.0, 1, 2, 1]),
    )
    cases = find_cases(tmp_path / "data", ("flair",))
    (item,) = SliceDataset(cases, normalise="slice", size=SIDE)
    rows, columns = np.nonzero(item["label"].numpy())
    assert rows.mean() < SIDE / 2, "the front is in the upper half"
    assert columns.mean() < SIDE / 2
    bright = item["image"][0] > item["image"].max() / 2
    both = (bright & (item["label"] > 0)).sum() * 2
    assert both / (bright.sum() + (item["label"] > 0).sum()) > 0.9


def test_index_step_and_slices(cases):
    kept = tumour_slices(cases[0])
    mask = arrays(0)[1]
    assert kept == tuple(np.flatnonzero(mask.any((0, 1))))
    assert 0 < len(kept) < SHAPE[2]
    data = SliceDataset(cases, size=16)
    assert data.index == [(c.id, z) for c in cases for z in tumour_slices(c)]
    assert len(data) == len(data.index)
    every = SliceDataset(cases, slices="all", size=16)
    assert [z for _, z in every.index] == 2 * list(range(SHAPE[2]))
    assert every.case_slices("case1") == list(range(SHAPE[2], 2 * SHAPE[2]))
    assert [data[i]["case"] for i in data.case_slices("case1")] == ["case1"] * len(kept)
    # The published order: every step-th level first, then those without tumour go.
    third = SliceDataset(cases[:1], step=3, size=16)
    assert [z for _, z in third.index] == [z for z in range(0, 12, 3) if z in kept]
    for i, (_, z) in enumerate(third.index):
        torch.testing.assert_close(third[i]["image"], every[z]["image"])
        torch.testing.assert_close(third[i]["label"], every[z]["label"])
    with pytest.raises(IndexError):
        data[len(data)]


def test_cases_without_masks(tmp_path):
    write_case(tmp_path / "data", "one", mask=None)
    (case,) = find_cases(tmp_path / "data", masks=False)
    with pytest.raises(MedtutError, match=r"one has no mask.*slices='all'"):
        SliceDataset([case])
    data = SliceDataset([case], slices="all", size=16)
    assert len(data) == SHAPE[2]
    assert data[5].keys() == {"image", "case", "z"}
    assert volume_slices(case, size=16).shape == (SHAPE[2], 1, 16, 16)


def test_wrong_arguments(cases):
    for kwargs in ({"slices": "some"}, {"normalise": "none"}, {"modalities": ("x",)}):
        with pytest.raises(MedtutError, match=next(iter(kwargs.values()))[0]):
            SliceDataset(cases, **{"size": 16, **kwargs})
    with pytest.raises(MedtutError, match="once"):
        SliceDataset([*cases, cases[0]], size=16)
    with pytest.raises(MedtutError, match="no slice is left of 0 cases"):
        SliceDataset([])


# --- normalisation ---------------------------------------------------------------


def test_brain_normalisation_leaves_the_background_at_zero():
    image = arrays(0)[0].astype(np.float32)
    scaled = normalise_volume(image, "brain")
    for before, after in zip(image, scaled, strict=True):
        assert not after[before == 0].any()
        assert after[before != 0].mean() == pytest.approx(0, abs=1e-5)
        assert after[before != 0].std() == pytest.approx(1, abs=1e-5)
    # Gain of the scanner does not matter, nor does the amount of air.
    np.testing.assert_allclose(normalise_volume(image * 7, "brain"), scaled, atol=1e-4)
    wide = np.pad(image, [(0, 0), (9, 9), (9, 9), (0, 0)])
    inner = normalise_volume(wide, "brain")[:, 9:-9, 9:-9]
    np.testing.assert_allclose(inner, scaled, atol=1e-5)


def test_published_normalisation_depends_on_the_air_around():
    image = arrays(0)[0].astype(np.float32)
    scaled = normalise_volume(image, "slice")
    np.testing.assert_allclose(scaled.mean((1, 2)), 0, atol=1e-4)
    full = image.any((1, 2))
    np.testing.assert_allclose(scaled.std((1, 2))[full], 1, atol=1e-4)
    assert np.isfinite(scaled).all(), "a slice of air stays 0"
    wide = np.pad(image, [(0, 0), (9, 9), (9, 9), (0, 0)])
    inner = normalise_volume(wide, "slice")[:, 9:-9, 9:-9]
    assert np.abs(inner - scaled).max() > 0.5


# --- the cache -------------------------------------------------------------------


@pytest.fixture
def reads(monkeypatch):
    """Names of the cases that are read from NIfTI."""
    seen = []

    def read(case, modalities):
        seen.append(case.id)
        return load_case(case, modalities)

    monkeypatch.setattr(brats_slices, "load_case", read)
    return seen


def test_a_case_is_prepared_once_also_after_an_interruption(cases, reads, monkeypatch):
    def stops(case, modalities):
        if case.id == "case1":
            raise KeyboardInterrupt
        reads.append(case.id)
        return load_case(case, modalities)

    with monkeypatch.context() as patch:
        patch.setattr(brats_slices, "load_case", stops)
        with pytest.raises(KeyboardInterrupt):
            SliceDataset(cases, size=16)
    assert reads == ["case0"]
    first = SliceDataset(cases, size=16)
    assert reads == ["case0", "case1"]
    SliceDataset(cases[::-1], size=16, step=2)
    assert reads == ["case0", "case1"]
    monkeypatch.setattr(brats_slices, "read_mask", None)
    again = SliceDataset(cases, size=16)
    torch.testing.assert_close(again[3]["image"], first[3]["image"])


def test_what_changes_the_result_changes_the_entry(cases, reads, monkeypatch):
    SliceDataset(cases[:1], size=16)
    others = [
        {"size": 20},
        {"normalise": "slice"},
        {"slices": "all"},
        {"modalities": ("t1",)},
        {"modalities": ("flair", "t1")},
        {"modalities": ("t1", "flair")},
    ]
    for kwargs in others:
        SliceDataset(cases[:1], **{"size": 16, **kwargs})
    assert len(reads) == 1 + len(others)
    monkeypatch.setattr(brats_slices, "VERSION", brats_slices.VERSION + 1)
    SliceDataset(cases[:1], size=16)
    assert len(reads) == 2 + len(others)


@pytest.mark.parametrize("kind", ["flair", "seg"])
def test_a_changed_file_is_prepared_again(cases, kind):
    before = SliceDataset(cases[:1], size=16)
    path = cases[0].mask if kind == "seg" else cases[0].images[kind]
    rewrite(path, lambda v: v[::-1])
    after = SliceDataset(cases[:1], size=16)
    field = "label" if kind == "seg" else "image"
    assert not torch.equal(before[2][field], after[2][field])


def test_other_modalities_of_the_case_do_not_matter(cases, reads):
    SliceDataset(cases[:1], size=16)
    flair = replace(cases[0], images={"flair": cases[0].images["flair"]})
    SliceDataset([flair], size=16)
    assert len(reads) == 1


def test_a_case_that_cannot_be_read_leaves_no_entry(cases, cache):
    path = cases[0].images["flair"]
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(MedtutError, match="case0_flair"):
        SliceDataset(cases, size=16)
    assert not list(cache.rglob("*.npy"))


def _sum(data, results):
    results.put(float(sum(data[i]["image"].double().sum() for i in range(len(data)))))


def test_it_travels_to_workers_with_nothing_open(cases):
    data = SliceDataset(cases, size=32)
    want = sum(float(data[i]["image"].double().sum()) for i in range(len(data)))
    packed = pickle.dumps(data)
    assert len(packed) < 5000, "paths and numbers, no voxels"
    assert torch.equal(pickle.loads(packed)[1]["label"], data[1]["label"])
    results = multiprocessing.Queue()
    worker = multiprocessing.Process(target=_sum, args=(data, results))
    worker.start()
    assert results.get(timeout=60) == pytest.approx(want)
    worker.join()


def test_batches_by_the_loader(cases):
    data = SliceDataset(cases, size=16)
    loader = torch.utils.data.DataLoader(data, batch_size=4, shuffle=True)
    batch = next(iter(loader))
    assert batch["image"].shape == (4, 1, 16, 16)
    assert batch["label"].shape == (4, 16, 16)
    assert len(batch["case"]) == 4


# --- volumes and the way back ----------------------------------------------------


def test_all_slices_of_a_case_are_those_of_the_data_set(cases):
    stack = volume_slices(cases[0], ("flair", "t2"), size=SIDE)
    assert stack.shape == (SHAPE[2], 2, SIDE, SIDE)
    assert stack.dtype == torch.float32
    data = SliceDataset(cases, ("flair", "t2"), size=SIDE)
    for i in data.case_slices("case0"):
        torch.testing.assert_close(stack[data[i]["z"]], data[i]["image"])


@pytest.mark.parametrize("size", [24, 25, 48, 57])
@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_the_way_back_is_exact(cases, size, kind):
    data = SliceDataset(cases[:1], slices="all", size=size)
    stack = np.stack([data[i]["label"] for i in range(len(data))])
    label = load_case(cases[0]).label
    back = to_volume(kind(stack), SHAPE)
    assert back.dtype == np.uint8
    np.testing.assert_array_equal(back, label)


def test_the_way_back_from_224_to_240_loses_little():
    x, y, _ = np.indices((240, 240, 3))
    label = np.zeros((240, 240, 3), np.uint8)
    label[((x - 100) ** 2 + (y - 80) ** 2) < 30**2] = 2
    label[200:, 10:20] = 1
    stack = brats_slices._to_slices(label[None], 224, brats_slices.NEAREST)[:, 0]
    back = to_volume(stack, label.shape)
    for value in (1, 2):
        one, other = back == value, label == value
        assert 2 * (one & other).sum() / (one.sum() + other.sum()) > 0.97
        for axis in (x, y):  # and is not moved
            assert axis[one].mean() == pytest.approx(axis[other].mean(), abs=0.3)


def test_slices_that_do_not_make_a_volume():
    for stack in (np.zeros((11, 8, 8)), np.zeros((12, 1, 8, 8))):
        with pytest.raises(MedtutError, match="12"):
            to_volume(stack, SHAPE)
