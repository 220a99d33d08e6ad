"""Folders of images with masks, as people have them, and the real patients."""

import numpy as np
import pytest
from PIL import Image

from medtut.data import image_folder
from medtut.data.assets import AssetUnavailable
from medtut.data.image_folder import (
    find_pairs,
    load_pair,
    read_image,
    read_mask,
    real_slices,
)
from medtut.errors import MedtutError

SHAPE = (14, 18)
MASK = np.zeros(SHAPE, bool)
MASK[4:9, 6:15] = True
GREY = np.random.default_rng(0).integers(0, 256, SHAPE).astype(np.uint8)


def save(path, values, mode=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = values if isinstance(values, Image.Image) else Image.fromarray(values)
    (image.convert(mode) if mode else image).save(path, **options)
    return path


def mask(value=255):
    return (MASK * value).astype(np.uint8)


# --- finding ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image", "mask_name"),
    [
        ("images/a b.png", "masks/a b.png"),
        ("images/a b.jpg", "masks/a b.PNG"),
        ("images/a b.tif", "masks/a b_mask.bmp"),
        ("a b.png", "a b_mask.png"),
    ],
)
def test_arrangements(tmp_path, image, mask_name):
    root = tmp_path / "Übung"
    save(root / image, GREY)
    save(root / mask_name, mask())
    save((root / image).with_name("é.png"), GREY)
    save((root / mask_name).with_name("é_mask.png"), mask() * 0)
    (root / "notes.txt").write_text("not an image")
    (root / image).with_name("._a b.png").write_bytes(b"a leaving of macOS")
    first, second = find_pairs(str(root))
    assert (first.name, second.name) == ("a b", "é")
    assert (first.image, first.mask) == (root / image, root / mask_name)
    item = load_pair(first)
    assert item.keys() == {"image", "mask", "name"}
    np.testing.assert_array_equal(item["mask"], MASK)
    assert item["name"] == "a b"
    assert not load_pair(second)["mask"].any(), "an empty mask is a mask"


def test_folders_without_pairs(tmp_path):
    with pytest.raises(MedtutError, match=r"images/x\.png.*There is no such file"):
        find_pairs(tmp_path)
    with pytest.raises(MedtutError, match="nowhere"):
        find_pairs(tmp_path / "nowhere")
    save(tmp_path / "images" / "a.png", GREY)
    with pytest.raises(MedtutError, match=r"a \(1 images, 0 masks\)"):
        find_pairs(tmp_path)
    save(tmp_path / "masks" / "a.png", mask())
    assert len(find_pairs(tmp_path)) == 1
    save(tmp_path / "masks" / "b.png", mask())
    with pytest.raises(MedtutError, match=r"Not so: b \(0 images, 1 masks\)"):
        find_pairs(tmp_path)
    (tmp_path / "masks" / "b.png").unlink()
    save(tmp_path / "images" / "a.jpg", GREY)
    with pytest.raises(MedtutError, match=r"a \(2 images, 1 masks\)"):
        find_pairs(tmp_path)


def test_other_folders_beside_are_left_alone(tmp_path):
    for place in ("images", "masks", "previews"):
        save(tmp_path / place / "a.png", mask())
    save(tmp_path / "previews" / "b.png", mask())
    save(tmp_path / "overview.png", GREY)
    assert [pair.name for pair in find_pairs(tmp_path)] == ["a"]


# --- images ----------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".png", ".tif", ".bmp"])
def test_eight_bits(tmp_path, suffix):
    found = read_image(save(tmp_path / f"a{suffix}", GREY))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, GREY / 255, atol=1e-6)
    colour = np.stack([GREY, GREY // 2, 255 - GREY], -1)
    found = read_image(save(tmp_path / f"b{suffix}", colour))
    np.testing.assert_allclose(found, colour / 255, atol=1e-6)


def test_other_modes(tmp_path):
    grey = read_image(save(tmp_path / "la.png", GREY, "LA"))
    np.testing.assert_allclose(grey, GREY / 255, atol=1e-6)
    bits = read_image(save(tmp_path / "bits.png", MASK))
    np.testing.assert_array_equal(bits, MASK.astype(np.float32))
    colour = Image.fromarray(np.stack([mask(255), mask(0), mask(102)], -1))
    for name, mode in (("p.png", "P"), ("rgba.png", "RGBA")):
        found = read_image(save(tmp_path / name, colour, mode))
        np.testing.assert_allclose(found, np.asarray(colour) / 255, atol=1e-6)
    photo = read_image(save(tmp_path / "a.jpg", GREY // 16 + 100))
    np.testing.assert_allclose(photo, (GREY // 16 + 100) / 255, atol=0.06)


@pytest.mark.parametrize(
    ("name", "dtype"), [("a.png", np.uint16), ("a.tif", np.uint16), ("b.tif", "f4")]
)
def test_deep_images_are_stretched(tmp_path, name, dtype):
    deep = (GREY.astype(np.int64) * 13 + 700).astype(dtype)
    found = read_image(save(tmp_path / name, deep))
    want = (GREY - float(GREY.min())) / np.ptp(GREY)
    np.testing.assert_allclose(found, want, atol=1e-6)
    flat = read_image(save(tmp_path / f"flat_{name}", np.full(SHAPE, 700, dtype)))
    assert not flat.any()


def test_a_photograph_lies_as_it_is_shown(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to see it upright
    path = save(tmp_path / "a.png", GREY, exif=exif)
    np.testing.assert_allclose(read_image(path), np.rot90(GREY, -1) / 255, atol=1e-6)


def test_images_that_cannot_be_used(tmp_path):
    pages = [Image.fromarray(GREY)] * 3
    save(tmp_path / "pages.tif", pages[0], save_all=True, append_images=pages[1:])
    save(tmp_path / "nan.tif", np.where(MASK, np.nan, 1).astype("f4"))
    whole = save(tmp_path / "cut.png", GREY).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("no image")
    for name, word in (
        ("pages.tif", "3 pages"),
        ("nan.tif", "NaN"),
        ("cut.png", "cannot be used"),
        ("text.png", "cannot be used"),
        ("gone.png", "cannot be used"),
    ):
        for read in (read_image, read_mask):
            with pytest.raises(MedtutError, match=word) as caught:
                read(tmp_path / name)
            assert name in str(caught.value)


# --- masks -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        mask(1),
        mask(255),
        mask(7),
        MASK,
        MASK.astype(np.uint16) * 1000,
        np.stack([mask(255)] * 3, -1),
        np.stack([mask(0), mask(90), mask(255)], -1),
    ],
)
def test_masks_of_one_object(tmp_path, values):
    found = read_mask(save(tmp_path / "a.png", values))
    assert found.dtype == bool
    np.testing.assert_array_equal(found, MASK)


def test_a_palette_is_read_by_its_colours(tmp_path):
    """An optimiser may have put white first: the index alone would turn the mask."""
    image = Image.fromarray((~MASK).astype(np.uint8), "P")
    image.putpalette([255, 255, 255, 0, 0, 0])
    np.testing.assert_array_equal(read_mask(save(tmp_path / "a.png", image)), MASK)


def test_masks_that_are_empty_or_full(tmp_path):
    for suffix in (".png", ".jpg"):
        assert not read_mask(save(tmp_path / f"no{suffix}", mask(0))).any()
        full = np.full(SHAPE, 255, np.uint8)
        assert read_mask(save(tmp_path / f"all{suffix}", full)).all()


@pytest.mark.parametrize("quality", [60, 75, 95])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_jpeg_mask_is_cut_at_half(tmp_path, quality, mode):
    path = save(tmp_path / "a.jpg", mask(), mode, quality=quality)
    with Image.open(path) as image:
        assert len(np.unique(np.asarray(image))) > 2, "JPEG has blurred it"
    np.testing.assert_array_equal(read_mask(path), MASK)


def classes(*values):
    labels = np.zeros(SHAPE, np.uint8)
    for row, value in enumerate(values):
        labels[row * 3 : row * 3 + 3] = value
    return labels


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("classes.png", classes(0, 1, 2, 3)),
        ("grey.png", GREY),
        ("smooth.png", classes(0, 128, 255)),
        ("not_black.png", classes(1, 2, 1, 2, 1)),
        (
            "colours.png",
            np.stack([classes(0, 255, 0), classes(0, 0, 255), classes(0)], -1),
        ),
        ("grey.jpg", GREY),
        ("classes.jpg", classes(0, 1, 2, 3)),
        ("ones.jpg", mask(1) * 3),
        ("greys.jpg", classes(0, 85, 170, 255)),
    ],
)
def test_what_is_no_mask_of_one_object_is_refused(tmp_path, name, values):
    with pytest.raises(MedtutError, match="is not the mask of one object") as caught:
        read_mask(save(tmp_path / name, values, quality=95))
    assert name in str(caught.value)


def test_a_mask_of_another_size(tmp_path):
    save(tmp_path / "a.png", GREY)
    save(tmp_path / "a_mask.png", mask()[:, :-1])
    (pair,) = find_pairs(tmp_path)
    with pytest.raises(MedtutError, match=r"a_mask\.png has \(14, 17\).*\(14, 18\)"):
        load_pair(pair)
    save(tmp_path / "a_mask.png", mask().T.copy())
    with pytest.raises(MedtutError, match=r"\(18, 14\)"):
        load_pair(pair)


# --- real patients ---------------------------------------------------------------


@pytest.fixture
def scan(tmp_path, monkeypatch):
    """A small file pair in the form of the data set: two orientations."""
    import nrrd

    def write(name, directions, values, label):
        header = {
            "space": "left-posterior-superior",
            "space directions": np.array(directions, float),
            "space origin": np.zeros(3),
        }
        files = {}
        for part, array in (("image", values), ("label", label)):
            files[f"{name}_{part}"] = tmp_path / f"{name}_{part}.nrrd"
            nrrd.write(str(files[f"{name}_{part}"]), array, header)
        monkeypatch.setattr(image_folder, "fetch", lambda asset: files)

    return write


def test_brain_slices_lie_with_the_front_up(scan):
    values = np.random.default_rng(0).integers(1, 900, (8, 10, 4)).astype(np.int16)
    label = np.zeros(values.shape, np.uint8)
    label[1, 7, 2] = 1  # LPS with y to the front: near the right, to the front
    scan("brain1", np.diag([0.8, -0.8, 6.5]), values, label)
    (item,) = real_slices("brain1")
    assert (item["z"], item["name"]) == (2, "brain1 z=2")
    assert item["image"].shape == item["mask"].shape == (10, 8)
    assert item["image"].dtype == np.float32
    assert item["image"].flags.c_contiguous
    assert item["mask"].flags.c_contiguous
    # x runs to the left on disk: the patient's right, x = 1, is column 8 - 1 - 1.
    assert np.argwhere(item["mask"]).tolist() == [[2, 6]]
    low, high = np.percentile(values, (0.5, 99.5))
    want = np.clip((values[1, 7, 2] - low) / (high - low), 0, 1)
    assert item["image"][2, 6] == pytest.approx(want, abs=1e-5)


def test_chest_slices_in_hounsfield_units(scan):
    values = np.full((6, 6, 5), -1000, np.int16)
    label = np.zeros(values.shape, np.uint8)
    values[2, 1, 1:3], label[2, 1, 1:3] = [40, 900], 1
    values[0, 0, 1] = -160 + 100
    scan("lung2", np.diag([0.6, 0.6, 5]), values, label)
    items = real_slices("lung2")
    assert [i["z"] for i in items] == [1, 2]
    # y runs to the back on disk, as rows do.
    assert np.argwhere(items[0]["mask"]).tolist() == [[1, 3]]
    assert items[0]["image"][1, 3] == pytest.approx(0.5)
    assert items[0]["image"][0, 5] == pytest.approx(0.25)
    assert items[1]["image"][1, 3] == 1
    assert items[0]["image"].min() == 0
    wide = real_slices("lung2", window=(-910, 590))
    assert wide[0]["image"][1, 3] == pytest.approx(950 / 1500)


def test_unknown_and_unreachable_patients(monkeypatch):
    with pytest.raises(MedtutError, match=r"'brain3', only.*brain1.*lung2"):
        real_slices("brain3")

    def offline(name):
        raise AssetUnavailable(name)

    monkeypatch.setattr(image_folder, "fetch", offline)
    with pytest.raises(AssetUnavailable, match="pyradiomics-lung"):
        real_slices("lung1")
