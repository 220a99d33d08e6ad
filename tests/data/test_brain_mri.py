"""The Kaggle folder of brain tumour pictures: reader, copies, folds, script."""

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from medtut.data import brain_mri
from medtut.data.brain_mri import (
    CLASSES,
    FOLDERS,
    REAL_COUNTS,
    Picture,
    check_apart,
    count_report,
    counts,
    duplicates,
    find_pictures,
    grouped_folds,
    groups,
    load_pictures,
    read_grey,
    scan,
    size_features,
    sources,
)
from medtut.errors import MedtutError


def head(seed, size=192):
    """A bright ellipse with a texture of its own, (size, size) uint8."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    texture = ndimage.gaussian_filter(rng.normal(size=(size, size)), size / 24)
    texture /= texture.std()
    inside = (x / 0.7) ** 2 + (y / 0.85) ** 2 < 1
    return np.uint8(inside * (140 + 40 * texture).clip(40, 255))


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Three pictures in every class of both parts, all different."""
    monkeypatch.setenv("MEDTUT_CACHE", str(tmp_path / "cache"))
    for p, part in enumerate(("Training", "Testing")):
        for k, name in enumerate(FOLDERS):
            home = tmp_path / "set" / part / name
            home.mkdir(parents=True)
            for i in range(3):
                picture = Image.fromarray(head(100 * p + 10 * k + i))
                picture.convert("RGB").save(home / f"image({i}).jpg", quality=95)
    return tmp_path / "set"


def halves(grey, side):
    """Another preparation, with a name."""
    return np.asarray(Image.fromarray(grey // 2).resize((side, side)))


def thirds(grey, side):
    """And one more of the same module."""
    return np.asarray(Image.fromarray(grey // 3).resize((side, side)))


def test_parts_classes_and_order(root):
    found = find_pictures(root)
    assert found == find_pictures(str(root))
    assert len(found) == 24
    assert [p.part for p in found] == ["Training"] * 12 + ["Testing"] * 12
    assert [p.label for p in found[:12]] == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    assert found[0] == Picture(
        root / "Training" / "glioma_tumor" / "image(0).jpg", "Training", 0
    )
    for picture in found:
        kind = picture.path.parent.name.removesuffix("_tumor")
        assert CLASSES[picture.label].removesuffix("_tumor") == kind
    assert counts(found) == {"Training": (3, 3, 3, 3), "Testing": (3, 3, 3, 3)}


def test_case_suffixes_and_junk(root):
    (root / "Training").rename(root / "x")
    (root / "x").rename(root / "training")
    home = root / "training" / "no_tumor"
    home.rename(home.with_name("n"))
    home.with_name("n").rename(home.with_name("No_Tumor"))
    home = home.with_name("No_Tumor")
    (home / "image(0).jpg").rename(home / "UPPER.JPG")
    (home / "image(1).jpg").rename(home / "b.jpeg")
    Image.fromarray(head(7)).save(home / "c.PNG")
    for junk in ("Thumbs.db", ".DS_Store", "._UPPER.JPG", "readme.txt"):
        (home / junk).write_bytes(b"junk")
    (root / "__MACOSX").mkdir()
    (root / ".git").mkdir()
    (root / "notes.txt").write_text("mine", "utf-8")
    found = [p for p in find_pictures(root) if p.path.parent == home]
    assert [p.path.name for p in found] == [
        "UPPER.JPG", "b.jpeg", "c.PNG", "image(2).jpg",
    ]  # fmt: skip
    assert {(p.part, p.label) for p in found} == {("Training", 2)}


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda r: shutil.rmtree(r / "Testing"), "Testing missing"),
        (lambda r: shutil.rmtree(r / "Testing/no_tumor"), "no_tumor missing"),
        (lambda r: (r / "Training/sarcoma_tumor").mkdir(), "sarcoma_tumor not known"),
        (lambda r: (r / "Validation").mkdir(), "Validation not known"),
        (lambda r: shutil.rmtree(r), "is no folder"),
        (
            lambda r: [p.unlink() for p in (r / "Testing/no_tumor").iterdir()],
            "no_tumor holds no picture",
        ),
    ],
)
def test_a_folder_of_another_kind_is_named(root, spoil, says):
    spoil(root)
    with pytest.raises(MedtutError, match=says) as error:
        find_pictures(root)
    assert str(root) in str(error.value)


def test_two_spellings_and_the_folder_above(root):
    with pytest.raises(MedtutError, match="Did you mean") as error:
        find_pictures(root.parent)
    assert str(root) in str(error.value)
    (root / "training").mkdir(exist_ok=True)
    if len(list(root.iterdir())) == 3:  # where the file system tells the two apart
        with pytest.raises(MedtutError, match="Training there twice"):
            find_pictures(root)


def test_counts_of_the_published_set():
    assert sum(REAL_COUNTS["Training"]) == 2870
    assert sum(REAL_COUNTS["Testing"]) == 394
    full = [
        Picture(Path("x"), part, k)
        for part, row in REAL_COUNTS.items()
        for k, n in enumerate(row)
        for _ in range(n)
    ]
    assert count_report(full) == []
    (line,) = count_report(full[1:])
    assert "Training" in line
    assert "825 glioma" in line
    assert "826" in line
    (line,) = count_report([*full, full[-1]])
    assert "Testing: 75 pituitary" in line


def test_every_kind_of_picture_becomes_the_same_grey(tmp_path):
    grey = head(3, 40)[:, :32]
    plain = Image.fromarray(grey)
    full = Image.new("L", plain.size, 255)
    kinds = {
        "grey.png": plain,
        "rgb.png": plain.convert("RGB"),
        "palette.png": plain.convert("P"),
        "rgba.png": Image.merge("RGBA", (plain, plain, plain, full)),
        "la.png": Image.merge("LA", (plain, full)),
    }
    for name, image in kinds.items():
        image.save(tmp_path / name)
        read = read_grey(tmp_path / name)
        assert (read.dtype, read.shape) == (np.uint8, (40, 32)), name
        assert np.array_equal(read, grey), name
    rgb = plain.convert("RGB")
    lossy = {"grey.jpg": plain, "rgb.jpg": rgb, "cmyk.jpg": rgb.convert("CMYK")}
    for name, image in lossy.items():
        image.save(tmp_path / name, quality=100)
        read = read_grey(tmp_path / name)
        assert np.abs(read.astype(int) - grey).max() <= 3, name
    deep = 1000 + 20 * grey.astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    low, high = int(grey.min()), int(grey.max())
    stretched = (grey.astype(float) - low) / (high - low) * 255
    assert np.abs(read_grey(tmp_path / "deep.png") - stretched).max() <= 0.5


def test_colour_is_luminance_and_transparent_is_black(tmp_path):
    Image.new("RGB", (8, 8), (255, 0, 0)).save(tmp_path / "red.png")
    assert np.unique(read_grey(tmp_path / "red.png")).tolist() == [76]
    Image.new("RGB", (8, 8), (255, 0, 0)).save(tmp_path / "red.jpg")
    assert abs(int(read_grey(tmp_path / "red.jpg")[4, 4]) - 76) <= 1
    Image.new("RGBA", (8, 8), (255, 255, 255, 0)).save(tmp_path / "clear.png")
    assert not read_grey(tmp_path / "clear.png").any()


def test_a_turned_photograph_is_upright(tmp_path):
    image = Image.fromarray(head(1, 40)[:, :20])
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif, quality=100)
    assert read_grey(tmp_path / "turned.jpg").shape == (20, 40)


def test_bombs_and_several_pages_are_refused(tmp_path, monkeypatch):
    Image.new("L", (30, 40)).save(tmp_path / "large.png")
    monkeypatch.setattr(brain_mri, "LARGEST", 1199)
    with pytest.raises(MedtutError, match=r"large\.png.*30 × 40"):
        read_grey(tmp_path / "large.png")
    monkeypatch.setattr(brain_mri, "LARGEST", 1200)
    read_grey(tmp_path / "large.png")
    pages = [Image.new("L", (8, 8), v) for v in (0, 255)]
    pages[0].save(tmp_path / "two.tif", save_all=True, append_images=pages[1:])
    with pytest.raises(MedtutError, match="several pages"):
        read_grey(tmp_path / "two.tif")


def test_broken_files_are_all_named_and_may_be_left_out(root):
    found = find_pictures(root)
    cut, text, empty = found[1].path, found[5].path, found[20].path
    cut.write_bytes(cut.read_bytes()[:-800])
    text.write_text("not a picture", "utf-8")
    empty.write_bytes(b"")
    with pytest.raises(MedtutError, match="3 of 24") as error:
        load_pictures(found, side=32)
    for path in (cut, text, empty):
        assert str(path) in str(error.value)
    images, kept, broken = load_pictures(found, side=32, skip_broken=True)
    assert set(broken) == {cut, text, empty}
    assert kept == [p for p in found if p.path not in broken]
    assert len(images) == len(kept) == 21
    assert np.array_equal(images, load_pictures(kept, side=32))


def test_prepared_once_and_again_when_something_changed(root, monkeypatch):
    found = find_pictures(root)
    first = load_pictures(found, halves, side=24)
    assert (first.shape, first.dtype) == ((24, 24, 24), np.uint8)
    assert np.array_equal(first[5], halves(read_grey(found[5].path), 24))
    with monkeypatch.context() as patch:
        patch.setattr(brain_mri, "read_grey", lambda path: 1 / 0)
        assert np.array_equal(load_pictures(found, halves, side=24), first)
    assert load_pictures(found, halves, side=16).shape == (24, 16, 16)
    other = load_pictures(found, thirds, side=24)
    assert (other != first).any(), "another preparation is another entry"
    path = found[0].path
    Image.fromarray(255 - head(5)).save(path)
    again = load_pictures(found, halves, side=24)
    assert (again[0] != first[0]).any()
    assert np.array_equal(again[1:], first[1:])
    with pytest.raises(MedtutError, match="name of its own"):
        load_pictures(found, lambda grey, side: grey)
    with pytest.raises(MedtutError, match="0 pictures"):
        load_pictures([])


def test_sizes_and_sources(root):
    found = find_pictures(root)
    Image.new("L", (512, 512), 9).save(found[2].path)
    Image.new("L", (512, 300), 9).save(found[3].path)
    sizes = size_features(found)
    assert sizes[2].tolist() == [512, 512, found[2].path.stat().st_size]
    assert sizes[3, :2].tolist() == [512, 300]
    assert sources(found).tolist() == [1, 1, 0] + [1] * 21


def test_copies_share_a_group_and_nothing_else_does(root):
    found = find_pictures(root)
    original = found[0].path
    shutil.copy(original, found[13].path)  # same bytes, in the other part
    grey = read_grey(original)
    Image.fromarray(grey).save(png := original.with_name("same_pixels.png"))
    small = Image.fromarray(grey).resize((120, 120), Image.Resampling.BICUBIC)
    small.save(saved := original.with_name("smaller.jpg"), quality=60)
    Image.fromarray(grey[:, ::-1]).save(mirror := original.with_name("mirror.png"))
    found = find_pictures(root)
    images = load_pictures(found, side=64)
    ids = groups(found, images)
    place = {p.path: i for i, p in enumerate(found)}
    same = [i for p, i in place.items() if p in (original, png, saved)]
    other = original.parents[2] / "Testing" / "glioma_tumor" / "image(1).jpg"
    same.append(place[other])
    assert len(set(ids[same])) == 1
    assert (ids == ids[same[0]]).sum() == 4
    assert ids[place[mirror]] != ids[same[0]]
    assert len(set(ids)) == len(found) - 3
    pairs = duplicates(images)
    assert {tuple(p) for p in pairs} == {
        (i, j) for i in same for j in same if i < j
    }  # fmt: skip
    known = scan(found)
    assert known["content"][same[0]] == known["content"][same[3]]
    assert known["content"][same[0]] != known["content"][place[png]]
    assert known["pixels"][same[0]] == known["pixels"][place[png]]


def test_groups_are_connected_and_exact_copies_need_no_likeness(root):
    found = find_pictures(root)
    shutil.copy(found[0].path, found[4].path)
    black = np.zeros(
        (24, 16, 16), np.uint8
    )  # blank pictures are not each other's copies
    assert len(duplicates(black)) == 0
    ids = groups(found, black)
    assert ids[0] == ids[4]
    assert len(set(ids)) == 23
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (24, 16, 16), np.uint8)
    images[9] = images[0]  # 4 is joined to 9 through 0
    ids = groups(found, images)
    assert ids[4] == ids[9]
    assert len(set(ids)) == 22


def test_many_pictures_are_compared_with_all_others():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (1100, 32, 32), np.uint8)
    images[1050], images[600] = images[3], images[550]
    assert {tuple(p) for p in duplicates(images)} == {(3, 1050), (550, 600)}


def test_folds_keep_groups_together_and_classes_in_proportion():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2, 3], [80, 80, 40, 80])
    ids = np.arange(280) // 2
    folds = grouped_folds(labels, ids, 5, seed=1)
    held = np.concatenate([test for _, test in folds])
    assert sorted(held) == list(range(280))
    for train, test in folds:
        assert not set(ids[train]) & set(ids[test])
        assert len(train) + len(test) == 280
        share = np.bincount(labels[test]) / len(test)
        assert share == pytest.approx([2 / 7, 2 / 7, 1 / 7, 2 / 7], abs=0.03)
    again = grouped_folds(labels, ids, 5, seed=1)
    other = grouped_folds(labels, ids, 5, seed=2)
    assert all(np.array_equal(a[1], b[1]) for a, b in zip(folds, again, strict=True))
    assert any(
        not np.array_equal(a[1], b[1]) for a, b in zip(folds, other, strict=True)
    )
    random = rng.permutation(280)
    with pytest.raises(MedtutError, match="side 0 and on side 1"):
        check_apart(ids, random[:140], random[140:])
    check_apart(ids, np.arange(140), np.arange(140, 280))


@pytest.fixture(scope="module")
def script():
    path = Path(__file__).parents[2] / "data_scripts" / "brain_tumor_mri.py"
    spec = importlib.util.spec_from_file_location("brain_tumor_mri_script", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_script_places_an_archive_and_writes_its_passport(
    script, root, capsys, monkeypatch
):
    base = root.parent
    shutil.copy(root / "Training/glioma_tumor/image(0).jpg",
                root / "Testing/meningioma_tumor/again.jpg")  # fmt: skip
    (base / "archive").mkdir()
    root.rename(base / "archive" / "set")
    out, placed = base / "card.json", base / "placed"
    arguments = [str(base / "archive"), "--place", str(placed), "--out", str(out)]
    assert script.main(arguments) == 1
    card = json.loads(out.read_text("utf-8"))
    assert card["counts"]["Testing"]["meningioma"] == 4
    assert "Testing: 4 meningioma, the published set has 115" in card["different"]
    for kind in ("same_bytes", "same_pixels", "near_duplicates"):
        assert card[kind]["pairs"] == card[kind]["across_parts"] == 1
        assert len(card[kind]["contradictory"]) == 1
    assert card["groups"] == {
        "all": 24, "of_several": 1, "largest": 2, "across_parts": 1,
    }  # fmt: skip
    assert len(card["files"]) == 25
    assert {p.name for p in placed.iterdir()} == {"Training", "Testing"}
    assert len(find_pictures(placed)) == 25
    printed = capsys.readouterr().out
    assert "two labels" in printed
    assert f"medtut run 04 --data {placed}" in printed
    assert script.main(arguments) == 2, "what is there is not overwritten"
    real = {"Training": (3, 3, 3, 3), "Testing": (3, 4, 3, 3)}
    monkeypatch.setattr(brain_mri, "REAL_COUNTS", real)
    assert script.main([str(placed), "--out", str(out)]) == 0
    (placed / "Training" / "no_tumor" / "image(0).jpg").write_bytes(b"")
    assert script.main([str(placed), "--out", str(out)]) == 1
    assert "DIFFERENT" in capsys.readouterr().out


def test_script_refuses_what_is_no_such_set(script, tmp_path, capsys):
    assert script.main([str(tmp_path)]) == 2
    assert script.main([str(tmp_path / "none")]) == 2
    assert "Unpack" in capsys.readouterr().err
