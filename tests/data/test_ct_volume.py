"""Hounsfield units once, the right way up, on the grid of the model."""

import gzip

import nibabel
import nrrd
import numpy as np
import pytest
from ct_small import SHAPE, SPACING, body, save

from medtut.data import ct_volume
from medtut.data.ct_volume import CT, CTError, fault, looks_like, prepare, read_hu


def ct(hu, spacing):
    return CT(np.asarray(hu, np.float32), spacing)


# ---- units ----------------------------------------------------------------------


def test_rescaled_by_metadata_once(tmp_path):
    path = save(tmp_path / "a.nii.gz", body() + np.int16(1024))
    read = read_hu(path, 1, -1024)
    assert read.hu.dtype == np.float32
    assert np.array_equal(read.hu, body())
    assert read.facts["rescale"] == (1, -1024)
    assert read.facts["orientation"] == "RAS"
    # A slope that is not 1, an intercept as some scanners of the set have it.
    path = save(tmp_path / "b.nii.gz", (body() * 2 + 16384).astype(np.int16))
    assert np.array_equal(read_hu(path, 0.5, -8192).hu, body())


@pytest.mark.parametrize("intercept", [-1024, -8192, -1000])
def test_hu_already_rescaled_is_refused(tmp_path, intercept):
    path = save(tmp_path / "hu.nii.gz", body())
    with pytest.raises(CTError, match=r"hu\.nii\.gz is in HU already") as caught:
        read_hu(path, 1.0, intercept)
    assert "rescale=False" in str(caught.value)
    # What it should be called with, both ways:
    assert np.array_equal(read_hu(path).hu, body())
    assert np.array_equal(read_hu(path, 1, 0).hu, body())


def test_padding_does_not_hide_or_fake_the_unit(tmp_path):
    hu = body()
    hu[:2], hu[-2:] = -2000, -3024  # outside the circle of the scanner
    path = save(tmp_path / "padded.nii.gz", hu)
    with pytest.raises(CTError, match="in HU already"):
        read_hu(path, 1, -1024)
    assert np.array_equal(read_hu(path).hu, hu)
    # GE stores air at 24 beside a padding of -2000: below 0, and yet not HU.
    stored = body() + np.int16(1024)
    stored[:2] = -2000
    path = save(tmp_path / "ge.nii.gz", stored)
    assert read_hu(path, 1, -1024).hu[5:].min() < -900
    with pytest.raises(CTError, match="not in HU"):
        read_hu(path)


def test_a_header_that_rescales_is_not_rescaled_again(tmp_path):
    image = nibabel.Nifti1Image(body() + np.int16(1024), np.diag([*SPACING, 1]))
    image.header.set_slope_inter(1, -1024)
    # nibabel writes its own scaling for floats only: set it in the file.
    raw = bytearray(image.to_bytes())
    raw[112:120] = np.array([1, -1024], "<f4").tobytes()
    path = tmp_path / "header.nii.gz"
    path.write_bytes(gzip.compress(bytes(raw)))
    read = read_hu(path)
    assert np.array_equal(read.hu, body())
    assert read.facts["header"] == (1, -1024)
    with pytest.raises(CTError, match=r"own header: \(1\.0, -1024\.0\)"):
        read_hu(path, 1, -1024)


def test_never_rescaled_is_refused(tmp_path):
    stored = np.maximum(body() + 1024, 0).astype(np.int16)
    path = save(tmp_path / "stored.nii.gz", stored)
    for given in ((), (1, 0)):
        with pytest.raises(CTError, match=r"stored.*RescaleIntercept"):
            read_hu(path, *given)
    # Metadata that do not lead to HU: -8192 where -1024 belongs.
    with pytest.raises(CTError, match="rescaled by"):
        read_hu(path, 1, -8192)


def test_a_file_that_was_rescaled_twice_is_refused(tmp_path):
    path = save(tmp_path / "t.nii.gz", body() - np.int16(1024))
    with pytest.raises(CTError, match="rescaled twice"):
        read_hu(path)


def test_a_windowed_picture_is_refused(tmp_path):
    for i, values in enumerate((body().clip(-1000, 1000) / 1000.0, np.zeros(SHAPE))):
        path = save(tmp_path / f"{i}.nii.gz", values.astype(np.float32))
        with pytest.raises(CTError, match="window"):
            read_hu(path)


def test_kinds_of_values():
    hu = body().astype(np.float32)
    assert looks_like(hu) == "hu"
    assert looks_like(hu + 1024) == "stored"
    assert looks_like(hu - 1024) == "twice"
    assert looks_like(hu / 1000) == "picture"
    inside = np.random.default_rng(0).choice([-90.0, 40, 60, 700], SHAPE)
    assert looks_like(inside) == "no air"
    assert looks_like(inside + 1024) == "stored"
    padded = hu + 8192  # as some scanners of the set store it, 0 outside their circle
    padded[:2] = 0
    assert looks_like(padded) == "stored"


@pytest.mark.parametrize("given", [(1, None), (None, -1024), (0, -1024), (-1, 0)])
def test_half_a_rescaling_is_refused(tmp_path, given):
    path = save(tmp_path / "a.nii.gz", body())
    with pytest.raises(CTError, match="Both are needed"):
        read_hu(path, *given)


# ---- files and places -----------------------------------------------------------


@pytest.mark.parametrize("axes", ["RAS", "LPS", "LAS", "SPL", "ARI"])
def test_every_orientation_comes_out_the_same(tmp_path, axes):
    path = save(tmp_path / "a.nii.gz", body(), axes)
    read = read_hu(path)
    assert read.facts["orientation"] == axes
    assert np.array_equal(read.hu, body())
    assert read.spacing == pytest.approx(SPACING)


def test_spacing_of_the_metadata_follows_the_axes_as_stored(tmp_path):
    path = save(tmp_path / "a.nii.gz", body(), "SPL", spacing=(1, 1, 1))
    assert read_hu(path, spacing=(6, 5, 4)).spacing == (4, 5, 6)
    for wrong in ((1, 2), (1, 2, 0), (1, 2, np.nan)):
        with pytest.raises(CTError, match="Three positive"):
            read_hu(path, spacing=wrong)


def test_no_orientation_is_refused(tmp_path):
    path = save(tmp_path / "a.nii.gz", body(), codes=0)
    with pytest.raises(CTError, match="no orientation"):
        read_hu(path)


def test_sheared_axes_are_refused_and_turned_ones_named(tmp_path):
    path = save(tmp_path / "a.nii.gz", body(), shear=1.0)
    with pytest.raises(CTError, match="sheared"):
        read_hu(path)
    angle = np.radians(20)
    affine = np.diag([*SPACING, 1.0])
    turn = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    affine[:2, :2] = turn @ affine[:2, :2]
    nibabel.save(nibabel.Nifti1Image(body(), affine), path)
    with pytest.warns(UserWarning, match="20° off"):
        assert np.array_equal(read_hu(path).hu, body())


@pytest.mark.parametrize("shape", [(24, 20, 1), (1, 20, 12), (24, 20, 12, 2), (24, 20)])
def test_one_slice_and_four_dimensions_are_refused(tmp_path, shape):
    path = tmp_path / "a.nii.gz"
    image = nibabel.Nifti1Image(np.zeros(shape, np.int16), np.eye(4))
    nibabel.save(image, path)
    with pytest.raises(CTError, match="at least 2 slices"):
        read_hu(path)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_infinity_are_refused(tmp_path, value):
    hu = body().astype(np.float32)
    hu[3, 4, 5] = value
    path = save(tmp_path / "a.nii.gz", hu)
    with pytest.raises(CTError, match="1 of 5760 voxels"):
        read_hu(path)


def test_a_damaged_or_missing_file_is_named(tmp_path):
    path = save(tmp_path / "cut.nii.gz", body())
    path.write_bytes(path.read_bytes()[:3000])
    for wrong in (path, tmp_path / "none.nii.gz"):
        with pytest.raises(CTError, match=wrong.name):
            read_hu(wrong)


def write_nrrd(path, values, space, directions):
    header = {"space origin": (0, 0, 0), "space directions": directions}
    nrrd.write(str(path), values, header | ({"space": space} if space else {}))
    return path


def test_nrrd_by_its_header(tmp_path):
    stored = body()[::-1, ::-1]
    turned = write_nrrd(
        tmp_path / "a.nrrd", stored, "left-posterior-superior", np.diag(SPACING)
    )
    plain = write_nrrd(
        tmp_path / "b.nrrd", body(), "left-posterior-superior",
        np.diag(SPACING) * [-1, -1, 1],
    )  # fmt: skip
    right = write_nrrd(
        tmp_path / "c.nrrd", body(), "right-anterior-superior", np.diag(SPACING)
    )
    for path in (turned, plain, right):
        assert np.array_equal(read_hu(path).hu, body()), path
        assert read_hu(path).spacing == pytest.approx(SPACING)
    for i, space in enumerate((None, "scanner-xyz")):
        path = write_nrrd(tmp_path / f"{i}.nrrd", body(), space, np.diag(SPACING))
        with pytest.raises(CTError, match="in the space"):
            read_hu(path)


def test_every_message_can_be_filled_in():
    import re

    for key, words in ct_volume._messages().items():
        fields = dict.fromkeys(re.findall(r"\{(\w+)", words), 1)
        assert "{" not in str(fault(key, **fields)), key


# ---- the grid of the model ------------------------------------------------------


def test_the_picture_is_a_radiologists(tmp_path):
    """Feet first, front on top, the patient's right on the left."""
    hu = np.full((20, 20, 20), -1000.0)
    hu[14:18, 8:12, 8:12] = 400  # right
    hu[8:12, 14:18, 8:12] = 200  # front
    hu[8:12, 8:12, 14:18] = 0  # head
    x = prepare(ct(hu, (1, 1, 1)), (20, 20, 20), (1, 1, 1))[0]
    assert x.shape == (20, 20, 20)
    assert x.dtype == np.float32
    where = {v: np.argwhere(np.isclose(x, v, atol=1e-6)).mean(0) for v in (0.4, 0.2, 0)}
    assert where[0.4] == pytest.approx([9.5, 9.5, 3.5])
    assert where[0.2] == pytest.approx([9.5, 3.5, 9.5])
    assert where[0] == pytest.approx([15.5, 9.5, 9.5])


def test_centre_cut_and_padding():
    hu = np.arange(5 * 7 * 9, dtype=float).reshape(5, 7, 9)
    x = prepare(ct(hu, (1, 1, 1)), (4, 10, 3), (1, 1, 1))[0]
    whole = hu.T[:, ::-1, ::-1] / 1000
    assert np.allclose(x[:, 1:8], whole[2:6, :, 1:4])  # (9 - 4) // 2, (5 - 3) // 2
    assert (x[:, 0] == -1).all()
    assert (x[:, 8:] == -1).all()


def test_size_is_truncated_as_published():
    hu = np.full((10, 10, 10), 500.0)
    x = prepare(ct(hu, (1.0, 1.0, 1.0)), (9, 9, 9), (1.15, 1.15, 1.15))[0]
    inside = np.argwhere(x > 0)  # int(10 / 1.15) = int(8.7) = 8
    assert (np.ptp(inside, axis=0) + 1).tolist() == [8, 8, 8]


def test_without_averaging_it_is_the_published_interpolation():
    import torch

    hu = np.random.default_rng(0).uniform(-900, 900, (14, 12, 10)).astype(np.float32)
    # D 10 · 3 / 2 = 15, H 12 · 1 / 2 = 6, W 14 · 1 / 2 = 7
    x = prepare(ct(hu, (1, 1, 3)), (15, 6, 7), (2, 2, 2), antialias=False)[0]
    turned = torch.from_numpy(hu.T[:, ::-1, ::-1].copy())[None, None]
    want = torch.nn.functional.interpolate(turned, (15, 6, 7), mode="trilinear")
    assert np.allclose(x, want[0, 0] / 1000, atol=1e-5)
    # Nothing is reduced: averaging makes no difference.
    both = [prepare(ct(hu, (2, 2, 2)), (20, 24, 28), (1, 1, 1), antialias=a)
            for a in (True, False)]  # fmt: skip
    assert np.allclose(*both, atol=1e-5)


def test_reducing_averages_instead_of_skipping():
    hu = np.full((40, 40, 40), -800.0)
    hu[20:22, 20:22, 20:22] = 40  # a nodule of 2 mm between the samples
    averaged, skipped = (
        prepare(ct(hu, (1, 1, 1)), (8, 8, 8), (5, 5, 5), antialias=a) for a in (1, 0)
    )
    mass = 8 * 0.84 / 125
    assert (averaged + 0.8).sum() == pytest.approx(mass, rel=0.1)
    assert (skipped + 0.8).sum() == pytest.approx(0, abs=1e-4)
    noise = np.random.default_rng(0).normal(0, 100, (40, 40, 40))
    quiet, loud = (
        prepare(ct(noise, (1, 1, 1)), (8, 8, 8), (5, 5, 5), antialias=a).std()
        for a in (True, False)
    )
    assert quiet < loud / 5


def test_window_comes_after_resampling():
    hu = np.full((8, 8, 8), -850.0)
    hu[::2] = 3000
    x = prepare(ct(hu, (1, 1, 1)), (8, 8, 4), (1, 1, 2), antialias=False)
    # Half metal and half lung, (3000 - 850) / 2 = 1075 HU: 1 in the window. Windowed
    # first it would be (1000 - 850) / 2 = 75 HU.
    assert np.allclose(x, 1)
    wide = prepare(ct(hu, (1, 1, 1)), (8, 8, 4), (1, 1, 2), (-1000, 2000), False)
    assert np.allclose(wide, (1075 - 500) / 1500)


def test_default_grid():
    x = prepare(ct(body(), SPACING))
    assert x.shape == (1, 48, 96, 96)
    assert x.flags.c_contiguous
    assert x.min() == -1
    assert x.max() <= 1


# ---- the real ones, where they are ----------------------------------------------


def fetched(name):
    from medtut.data import assets

    if not assets.status(name)["cached"]:
        pytest.skip(f"asset {name} is not in the cache")
    return assets.fetch(name)


def test_the_untouched_real_ct_lies_right():
    files = fetched("slicerio-chest")
    chest = read_hu(files["image"])
    assert chest.hu.shape == (128, 128, 34)
    assert chest.spacing == pytest.approx((3.046876, 3.046876, 10), rel=1e-5)
    assert chest.facts["orientation"] == "RAS"
    label = np.asarray(ct_volume.load_image(files["label"]).dataobj)
    right, left, spine = (
        np.argwhere(np.isin(label, k)).mean(0) for k in ([5], [6], [2, 3, 4])
    )
    assert right[0] > 64 > left[0]
    assert spine[1] < right[1]
    assert chest.hu[label == 5].mean() < -600
    with pytest.raises(CTError, match="in HU already"):
        read_hu(files["image"], 1, -1024)
