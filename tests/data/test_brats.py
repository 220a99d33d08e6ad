"""The reader of BraTS folders, the way back to them, and the splits."""

import json
import os
import shutil

import nibabel
import numpy as np
import pytest
from brats_small import LPS, MODALITIES, SHAPE, arrays, rewrite, write_case
from hypothesis import given, settings
from hypothesis import strategies as st

from medtut.data import brats
from medtut.data.brats import (
    find_cases,
    load_case,
    load_split,
    save_prediction,
    save_split,
    split_cases,
    split_slices,
)
from medtut.errors import MedtutError

ID = "BraTS20_Training_001"


@pytest.fixture
def folder(tmp_path):
    return write_case(tmp_path, ID)


def only(root, **kwargs):
    (case,) = find_cases(root, **kwargs)
    return case


# --- finding ---------------------------------------------------------------------


def test_cases_are_found_from_every_height_and_in_both_suffixes(tmp_path):
    inner = tmp_path / "BraTS2020_TrainingData" / "MICCAI_BraTS2020_TrainingData"
    write_case(inner, "BraTS20_Training_002", suffix=".nii")
    write_case(inner, ID)
    (inner / "survival_info.csv").write_text("Brats20ID,Age\n", encoding="utf-8")
    (inner / ID / f"._{ID}_flair.nii.gz").write_bytes(b"a leaving of macOS")
    for root in (tmp_path, str(inner)):
        cases = find_cases(root)
        assert [c.id for c in cases] == [ID, "BraTS20_Training_002"]
        assert tuple(cases[0].images) == MODALITIES
        assert cases[0].mask.name == f"{ID}_seg.nii.gz"
        assert cases[1].images["t1ce"].name == "BraTS20_Training_002_t1ce.nii"
        assert cases[1].images["t1"].name == "BraTS20_Training_002_t1.nii"
    assert only(inner / ID, modalities=("t2",)).images.keys() == {"t2"}


def test_the_misnamed_mask_of_case_355_is_taken_only_where_there_is_no_other(tmp_path):
    name = "BraTS20_Training_355"
    folder = write_case(tmp_path, name, suffix=".nii", mask="W39_1998.09.19_Segm")
    assert only(tmp_path).mask.name == "W39_1998.09.19_Segm.nii"
    assert load_case(only(tmp_path)).label.max() == 3
    shutil.copy(only(tmp_path).mask, folder / f"{name}_seg.nii")
    assert only(tmp_path).mask.name == f"{name}_seg.nii"


def test_validation_cases_without_masks(tmp_path):
    for i in (1, 2):
        write_case(tmp_path, f"BraTS20_Validation_00{i}", mask=None)
    with pytest.raises(MedtutError, match="this is the validation part, it has no mas"):
        find_cases(tmp_path)
    cases = find_cases(tmp_path, masks=False)
    assert [c.mask for c in cases] == [None, None]
    assert load_case(cases[0]).label is None
    write_case(tmp_path, ID)
    with pytest.raises(MedtutError, match=r"2 of 3 .*BraTS20_Validation_001, BraTS20"):
        find_cases(tmp_path)


def test_paths_with_spaces_and_other_letters(tmp_path):
    write_case(tmp_path / "Gehirn Übung 脳", ID)
    volume = load_case(only(tmp_path))
    assert volume.image.shape == (1, *SHAPE)
    path = tmp_path / "mes prédictions" / "a b.nii.gz"
    assert save_prediction(path, volume.label, only(tmp_path)) == path


def test_an_empty_folder_says_what_was_looked_for(tmp_path):
    with pytest.raises(MedtutError, match=r"<case>_flair.*\.nii\.gz.*Found nothing"):
        find_cases(tmp_path)
    (tmp_path / "archive.zip").write_bytes(b"")
    with pytest.raises(MedtutError, match=r"Found archive\.zip"):
        find_cases(tmp_path)
    with pytest.raises(MedtutError, match="nowhere"):
        find_cases(tmp_path / "nowhere")


def test_a_missing_modality_names_case_modality_and_files(folder):
    (folder / f"{ID}_t1ce.nii.gz").unlink()
    with pytest.raises(MedtutError, match=rf"{ID} has no .*_t1ce\..*{ID}_flair.nii.gz"):
        find_cases(folder.parent)
    assert only(folder.parent, modalities=("flair", "t2")).id == ID


@pytest.mark.parametrize("kind", ["flair", "seg"])
def test_two_candidates_are_named(folder, kind):
    shutil.copy(folder / f"{ID}_{kind}.nii.gz", folder / f"other_{kind}.nii.gz")
    with pytest.raises(MedtutError, match=rf"{ID} has 2 .*_{kind}.*other_{kind}"):
        find_cases(folder.parent)


def test_doubled_case_ids(tmp_path):
    for part in ("a", "b"):
        write_case(tmp_path / part, ID)
    with pytest.raises(MedtutError, match=rf"{ID} stands twice"):
        find_cases(tmp_path)


def test_unknown_modalities(folder):
    with pytest.raises(MedtutError, match=rf"{ID} has no files \*_adc.*_t1ce.nii"):
        find_cases(folder.parent, modalities=("adc",))
    with pytest.raises(MedtutError, match=r"found with flair.*t1"):
        load_case(only(folder.parent, modalities=("flair",)), ("t1",))


# --- reading ---------------------------------------------------------------------


def test_arrays_labels_order_and_spacing(folder):
    images, mask = arrays(0)
    volume = load_case(only(folder.parent), ("t2", "flair"))
    # LPS on disk: x and y turn.
    np.testing.assert_array_equal(volume.image, images[[3, 0], ::-1, ::-1])
    assert volume.image.dtype == np.float32
    want = np.where(mask == 4, 3, mask)[::-1, ::-1]
    np.testing.assert_array_equal(volume.label, want)
    assert volume.label.dtype == np.uint8
    assert set(np.unique(volume.label)) == {0, 1, 2, 3}
    assert volume.spacing == (1, 1, 2)
    assert nibabel.aff2axcodes(volume.affine) == ("R", "A", "S")
    # The same voxel lies at the same place in the world as on disk.
    there = volume.affine @ [0, 0, 0, 1]
    np.testing.assert_allclose(there, LPS @ [SHAPE[0] - 1, SHAPE[1] - 1, 0, 1])


def test_a_mask_stored_in_another_orientation_still_lies_on_the_image(folder):
    want = load_case(only(folder.parent)).label
    path = folder / f"{ID}_seg.nii.gz"
    nibabel.save(nibabel.as_closest_canonical(nibabel.load(path)), path)
    np.testing.assert_array_equal(load_case(only(folder.parent)).label, want)


def test_rounding_in_a_header_is_no_error(folder):
    rewrite(folder / f"{ID}_seg.nii.gz", lambda v: v, LPS + 1e-4)
    load_case(only(folder.parent))


def damaged(change, kind="flair", affine=LPS):
    def do(folder):
        rewrite(folder / f"{ID}_{kind}.nii.gz", change, affine)

    return do


def truncated(kind):
    def do(folder):
        path = folder / f"{ID}_{kind}.nii.gz"
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return do


CORNER = np.zeros((4, 4))
CORNER[:3, 3] = (LPS @ [SHAPE[0] - 1, SHAPE[1] - 1, 0, 1])[:3]


def with_values(*values):
    def change(voxels):
        voxels.flat[: len(values)] = values
        return voxels

    return change


def with_floats(*values):
    return lambda voxels: with_values(*values)(voxels.astype(np.float32))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncated("flair"), ["_flair.nii.gz", "get it again"]),
        (truncated("seg"), ["_seg.nii.gz", "get it again"]),
        (
            damaged(with_values(3, 3, 7, 9), "seg"),
            ["_seg", "3 (2 voxels)", "7 (1 ", "9 (1 ", "resampled"],
        ),
        (
            damaged(lambda v: np.where(v == 4, 3, v), "seg"),
            ["_seg", "3 (", "remapped to 0..3"],
        ),
        (damaged(with_floats(0.5), "seg"), ["_seg", "0.5 (1 voxels)", "resampled"]),
        (damaged(lambda v: v[:, :, 1:], "seg"), ["_seg", "(24, 20, 11), (24, 20, 12)"]),
        (damaged(lambda v: v[1:], "t2"), ["_t2", "(23, 20, 12), (24, 20, 12)"]),
        (damaged(with_floats(np.nan, np.inf, -np.inf)), ["_flair", "3 of 5760"]),
        (damaged(with_floats(np.nan), "seg"), ["_seg", "1 of 5760", "NaN"]),
        (damaged(lambda v: v[..., None]), ["_flair", "not a 3-D", "(24, 20, 12, 1)"]),
        (damaged(lambda v: v[..., 0]), ["_flair", "not a 3-D", "(24, 20)"]),
        (damaged(lambda v: v * 0, "t2"), ["_t2", "every voxel is 0"]),
        (
            damaged(lambda v: v, "seg", np.diag([1, 1, 2, 1])),
            ["_seg", "16.4 mm apart", "header"],
        ),
        (
            damaged(lambda v: v, "t2", LPS @ np.diag([2, 1, 1, 1])),
            ["_t2", "mm apart"],
        ),
        (  # the first voxel in its place, the others not
            damaged(lambda v: v, "t2", np.diag([1.2, 1, 2, 1]) + CORNER),
            ["_t2", "4.6 mm apart"],
        ),
        (lambda f: (f / f"{ID}_t2.nii.gz").write_text("no"), ["_t2", "get it again"]),
        (lambda f: (f / f"{ID}_t2.nii.gz").unlink(), ["_t2", "get it again"]),
    ],
)  # fmt: skip
def test_bad_files_are_named_with_what_is_wrong(folder, damage, words):
    case = only(folder.parent)
    load_case(case, ("flair", "t2"))
    damage(folder)
    with pytest.raises(MedtutError) as caught:
        load_case(case, ("flair", "t2"))
    for word in words:
        assert word in str(caught.value)


def test_a_truncated_plain_file(tmp_path):
    path = write_case(tmp_path, ID, suffix=".nii") / f"{ID}_flair.nii"
    case = only(tmp_path)
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(MedtutError, match=r"_flair\.nii cannot be used"):
        load_case(case)


def test_a_mask_without_tumour_is_read(folder):
    rewrite(folder / f"{ID}_seg.nii.gz", lambda v: v * 0)
    assert not load_case(only(folder.parent)).label.any()


# --- the way back ----------------------------------------------------------------

TURNS = {
    "LPS": LPS,
    "RAS": np.diag([1.0, 1, 2, 1]),
    "ASL": np.array([[0, 0, -1.0, 9], [1, 0, 0, -3], [0, 2, 0, 4], [0, 0, 0, 1]]),
}


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("turn", TURNS)
def test_a_prediction_lies_on_the_files_of_the_case(tmp_path, turn, suffix):
    folder = write_case(tmp_path / "in", ID, affine=TURNS[turn])
    case = only(tmp_path / "in")
    path = save_prediction(tmp_path / f"out{suffix}", load_case(case).label, case)
    saved, mask = nibabel.load(path), nibabel.load(folder / f"{ID}_seg.nii.gz")
    np.testing.assert_array_equal(np.asarray(saved.dataobj), np.asarray(mask.dataobj))
    np.testing.assert_array_equal(saved.affine, mask.affine)
    assert saved.get_data_dtype() == np.uint8
    assert set(np.unique(saved.dataobj)) == {0, 1, 2, 4}
    for form in ("sform", "qform"):
        image = nibabel.load(folder / f"{ID}_flair.nii.gz")
        assert saved.header[f"{form}_code"] == image.header[f"{form}_code"]


def test_the_scaling_and_window_of_the_image_are_not_those_of_the_labels(folder):
    path = folder / f"{ID}_flair.nii.gz"
    image = nibabel.Nifti1Image(arrays(0)[0][0], LPS)
    image.header.set_slope_inter(0.5, 10)
    image.header["cal_max"] = 900
    nibabel.save(image, path)
    case = only(folder.parent)
    assert load_case(case).image.max() > 100
    out = save_prediction(folder.parent / "p.nii", load_case(case).label, case)
    assert set(np.unique(nibabel.load(out).get_fdata())) == {0, 1, 2, 4}
    assert nibabel.load(out).header["cal_max"] == 0


def test_predictions_that_do_not_fit_are_refused(folder, tmp_path):
    case, label = only(folder.parent), np.zeros(SHAPE, int)
    for wrong in (label[:-1], label + 4, label - 1):
        with pytest.raises(MedtutError, match=r"0\.\.3"):
            save_prediction(tmp_path / "p.nii.gz", wrong, case)
    with pytest.raises(MedtutError, match=r"nii\.gz, not .*p\.png"):
        save_prediction(tmp_path / "p.png", label, case)
    (tmp_path / "file").write_text("")
    with pytest.raises(MedtutError, match="file"):
        save_prediction(tmp_path / "file" / "p.nii.gz", label, case)
    assert not (tmp_path / "p.nii.gz").exists()


def test_an_interrupted_prediction_leaves_the_old_file(folder, tmp_path, monkeypatch):
    case, path = only(folder.parent), tmp_path / "p.nii.gz"
    save_prediction(path, np.zeros(SHAPE, int), case)
    before = path.read_bytes()

    def stop(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        save_prediction(path, np.ones(SHAPE, int), case)
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == [ID, "p.nii.gz"]


# --- splits ----------------------------------------------------------------------

IDS = [f"case{i:03d}" for i in range(50)]


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(3, 60),
    seed=st.integers(0, 5),
    fractions=st.sampled_from([(0.7, 0.1, 0.2), (0.5, 0, 0.5), (0, 0, 1), (1, 0, 0)]),
    studies=st.integers(1, 3),
)
def test_splits_keep_patients_together_and_use_everybody(n, seed, fractions, studies):
    ids = [f"p{i}-{s}" for i in range(n) for s in range(studies)]
    split = split_cases(ids, fractions, seed, lambda i: i.split("-")[0])
    assert sorted(split.train + split.validation + split.test) == sorted(ids)
    of = (split.train, split.validation, split.test)
    parts = [{i.split("-")[0] for i in part} for part in of]
    assert sum(map(len, parts)) == n
    for part, fraction in zip(parts, fractions, strict=True):
        assert abs(len(part) - fraction * n) <= 1 or n < 10
        assert bool(part) == (fraction > 0)
    again = split_cases(ids[::-1], fractions, seed, lambda i: i.split("-")[0])
    assert again == split


def test_sizes_and_seed():
    for n, sizes in {
        3: (1, 1, 1),
        24: (17, 2, 5),
        50: (35, 5, 10),
        369: (258, 37, 74),
    }.items():
        split = split_cases([str(i) for i in range(n)])
        assert (len(split.train), len(split.validation), len(split.test)) == sizes
    for fractions, sizes in {
        (0.5, 0.05, 0.45): (4, 1, 3),
        (0.5, 0.45, 0.05): (4, 3, 1),
    }.items():
        split = split_cases(IDS[:8], fractions)
        assert (len(split.train), len(split.validation), len(split.test)) == sizes
    assert split_cases(IDS, seed=1).test != split_cases(IDS, seed=0).test


@pytest.mark.parametrize(
    "arguments",
    [
        (IDS, (0.7, 0.2, 0.2)),
        (IDS, (0.8, 0.2)),
        (IDS, (1.2, -0.2, 0)),
        (IDS + IDS[:1],),
        (IDS[:2],),
        ([],),
    ],
)
def test_impossible_splits(arguments):
    with pytest.raises(MedtutError, match="Cannot split"):
        split_cases(*arguments)


def test_a_split_that_shares_a_case_cannot_be_made():
    with pytest.raises(MedtutError, match=r"1 ids are in train and in test \(b\)"):
        brats.Split(("a", "b"), (), ("c", "b"))
    with pytest.raises(MedtutError, match="in validation and in test"):
        brats.Split((), ("c",), ("c",))


def test_a_saved_split_is_the_same_and_stays(tmp_path):
    path, split = tmp_path / "splits" / "one.json", split_cases(IDS, seed=3)
    assert save_split(path, split) == path
    assert load_split(path) == split == load_split(path, IDS[::-1])
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["seed"] == 3
    assert content["fractions"] == [0.7, 0.1, 0.2]
    assert len(content["digest"]) == 64
    save_split(path, split)
    with pytest.raises(MedtutError, match="holds another split"):
        save_split(path, split_cases(IDS, seed=4))
    assert load_split(path) == split
    with pytest.raises(MedtutError, match=r"2 are new, 1 are gone \(case000, new1, n"):
        load_split(path, [*IDS[1:], "new1", "new2"])
    with pytest.raises(MedtutError, match="50 are gone"):
        load_split(path, [])
    save_split(tmp_path / "by hand.json", brats.Split(("a",), (), ("b",)))
    assert load_split(tmp_path / "by hand.json").test == ("b",)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-40],
        lambda text: "[]",
        lambda text: "",
        lambda text: text.replace('"seed": 0', '"seed": 1'),
        lambda text: text.replace("case000", "case900"),
        lambda text: text.replace('"digest"', '"checksum"'),
        lambda text: text.replace('"train"', '"training"'),
    ],
)
def test_a_damaged_or_edited_split_is_refused(tmp_path, damage):
    path = save_split(tmp_path / "split.json", split_cases(IDS))
    before = path.read_text(encoding="utf-8")
    path.write_text(damage(before), encoding="utf-8")
    assert path.read_text(encoding="utf-8") != before
    with pytest.raises(MedtutError, match=r"split\.json is no split as save_split"):
        load_split(path)
    with pytest.raises(MedtutError, match=r"split\.json"):
        save_split(path, split_cases(IDS))


def test_no_split_there(tmp_path):
    with pytest.raises(MedtutError, match="No such file"):
        load_split(tmp_path / "split.json")


def test_the_published_split_puts_patients_on_both_sides():
    index = [(case, z) for case in IDS for z in range(20)]
    train, rest = split_slices(index, seed=0)
    assert (len(train), len(rest)) == (900, 100)
    assert sorted([*train, *rest]) == list(range(1000))
    assert not np.array_equal(train, split_slices(1000, seed=1)[0])
    np.testing.assert_array_equal(train, split_slices(1000, seed=0)[0])
    sides = [{index[i][0] for i in side} for side in (train, rest)]
    assert len(sides[0] & sides[1]) > 40
