"""The tables of CT-RATE, strictly, and the volumes through the cache."""

import os

import numpy as np
import pytest
from ct_small import NAMES, SHAPE, body, ct_rate, save

from medtut.data import ct_rate as module
from medtut.data.ct_rate import FINDINGS, find_volumes, load, patient_of, text
from medtut.data.ct_volume import CT, CTError, prepare
from medtut.data.splits import split_cases

GRID = {"size": (12, 20, 24), "spacing": (6, 5, 4), "progress": False}


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("MEDTUT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def root(tmp_path):
    return ct_rate(tmp_path / "set")


def change(root, table, old, new, count=-1):
    (path,) = (root / "dataset").rglob(table)
    before = path.read_text(encoding="utf-8")
    assert old in before
    path.write_text(before.replace(old, new, count), encoding="utf-8")


REPORTS, LABELS, META = "*_reports.csv", "*_labels.csv", "*_metadata.csv"


def test_records(root):
    records = find_volumes(root)
    assert [r.key for r in records] == list(NAMES), "2 before 10"
    one = records[1]
    assert one.patient == "train_10"
    assert one.path.is_file()
    assert (one.slope, one.intercept, one.spacing) == (1, -1024, (4, 5, 6))
    assert one.labels.tolist() == [0, 1] + [0] * 16
    assert one.labels.dtype == np.uint8
    assert one.impression == one.clinical == "", "Not given."
    assert len(FINDINGS) == len(set(FINDINGS)) == 18
    order = {"Medical material": 0, "Cardiomegaly": 2, "Pericardial effusion": 3}
    order |= {"Lung nodule": 9, "Lung opacity": 10, "Consolidation": 15}
    order["Interlobular septal thickening"] = 17
    assert {k: FINDINGS.index(k) for k in order} == order
    assert [r.key for r in find_volumes(root / "dataset")] == list(NAMES)


def test_text_as_published(root):
    record = find_volumes(root)[0]
    words = "Nodule of 0 mm small, in the right lung. No more."
    assert text(record) == text(record, ("findings",)) == words
    assert text(record, ("impression",)) == ""
    both = module.Record("a_1_a_1.nii.gz", record.path, "a_1", "Findings.", "So.")
    assert text(both) == "Findings. So."
    with pytest.raises(CTError, match="No part"):
        text(record, ("findings_EN",))


def test_patients_stay_together(root):
    names = [r.name for r in find_volumes(root)]
    split = split_cases(names, (0.5, 0, 0.5), patient_of=patient_of)
    parts = [{patient_of(n) for n in p} for p in (split.train, split.test)]
    assert parts[0] & parts[1] == set()
    assert patient_of("dataset/valid/valid_3_b_2.nii.gz") == "valid_3"
    with pytest.raises(CTError, match="patients must stay together"):
        patient_of("scan12.nii.gz")


def test_second_release_is_not_rescaled(tmp_path):
    root = ct_rate(tmp_path, split="valid_fixed", stored=False)
    records = find_volumes(root, "valid_fixed")
    assert {(r.slope, r.intercept, r.spacing) for r in records} == {(None,) * 3}
    assert len(load(records, **GRID)) == 4
    # The same files in the folder of the first release: issue 50.
    (root / "dataset" / "valid_fixed").rename(root / "dataset" / "valid")
    with pytest.raises(CTError, match=r"train_2_a_1\.nii\.gz is in HU already"):
        load(find_volumes(root, "valid"), **GRID)
    assert len(load(find_volumes(root, "valid", rescale=False), **GRID)) == 4


@pytest.mark.parametrize("table", [REPORTS, LABELS, META])
def test_a_missing_column_is_named(root, table):
    column = {REPORTS: "Findings_EN", LABELS: "Lung nodule", META: "RescaleSlope"}
    change(root, table, column[table], "Something else", 1)
    with pytest.raises(CTError, match=f"no column {column[table]}") as caught:
        find_volumes(root)
    assert ".csv" in str(caught.value)


def test_a_missing_table_is_named(root):
    next(root.rglob(LABELS)).unlink()
    with pytest.raises(CTError, match=r"train_predicted_labels\.csv cannot be read"):
        find_volumes(root)
    assert find_volumes(root, labels=False)[0].labels is None


@pytest.mark.parametrize("how", ["row", "empty"])
def test_a_missing_report(root, how):
    if how == "row":
        change(root, REPORTS, "train_10_a_2.nii.gz", "train_99_a_2.nii.gz")
    else:
        words = '"Nodule of 2 mm (""small""), in the right lung.\nNo more."'
        change(root, REPORTS, words, "Not given.")
    with pytest.raises(CTError, match=r"1 of 4 volumes have no report.*train_10_a_2"):
        quiet(find_volumes, root)
    with pytest.warns(UserWarning, match="Left out"):
        skipped = find_volumes(root, missing="skip")
    assert [r.key for r in skipped] == [n for n in NAMES if n != "train_10_a_2"]
    assert len(quiet(find_volumes, root, missing="keep")) == 4


def quiet(function, *args, **kwargs):
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)


@pytest.mark.parametrize("table", [LABELS, META])
def test_a_volume_without_a_row_is_refused(root, table):
    change(root, table, "train_10_b_1.nii.gz", "train_99_b_1.nii.gz")
    with pytest.raises(CTError, match=r"1 of 4 volumes have no row.*train_10_b_1"):
        quiet(find_volumes, root)


def test_rows_without_a_volume_are_named(root):
    next(root.rglob("train_10_b_1.nii.gz")).unlink()
    with pytest.warns(UserWarning, match=r"1 of 4 rows have no volume.*train_10_b_1"):
        assert len(find_volumes(root)) == 3


def test_a_name_twice_is_refused(root):
    change(root, LABELS, "train_10_b_1.nii.gz", "train_10_a_1.nii.gz")
    with pytest.raises(CTError, match=r"line 5: train_10_a_1\.nii\.gz stands twice"):
        find_volumes(root)


def test_a_file_twice_is_refused(root):
    save(root / "dataset" / "train" / "copy" / "train_2_a_1.nii.gz", body())
    with pytest.raises(CTError, match="is there twice"):
        find_volumes(root)


@pytest.mark.parametrize(
    ("table", "old", "new", "said"),
    [
        (LABELS, "train_2_a_1.nii.gz,1", "train_2_a_1.nii.gz,2", "0 or 1"),
        (LABELS, "train_2_a_1.nii.gz,1", "train_2_a_1.nii.gz,", "0 or 1"),
        (LABELS, "train_2_a_1.nii.gz,1", "train_2_a_1.nii.gz", "number of cells"),
        (LABELS, "train_2_a_1.nii.gz,1", "train_2_a_1.nii.gz,1,0", "number of cells"),
        (META, ",-1024,", ",unknown,", "a number"),
        (META, ",-1024,", ",nan,", "a number"),
        (META, '"[4.0, 5.0]"', "4.0", "XYSpacing"),
        (META, '"[4.0, 5.0]"', '"[4.0, 5.0, 6]"', "XYSpacing"),
    ],
)
def test_a_bad_cell_is_refused(root, table, old, new, said):
    change(root, table, old, new, 1)
    with pytest.raises(CTError, match=said) as caught:
        find_volumes(root)
    assert ".csv" in str(caught.value)


def test_labels_may_be_written_as_floats(root):
    change(root, LABELS, "train_2_a_1.nii.gz,1,0", "train_2_a_1.nii.gz,1.0,0.0")
    assert find_volumes(root)[0].labels.tolist() == [1] + [0] * 17


def test_wrong_arguments_and_folders(root, tmp_path):
    with pytest.raises(CTError, match="there are train, valid"):
        find_volumes(root, "validation")
    with pytest.raises(CTError, match="there are train, valid"):
        find_volumes(root, missing="ignore")
    with pytest.raises(CTError, match="No volume"):
        find_volumes(root, "valid")
    with pytest.raises(CTError, match="No volume"):
        find_volumes(tmp_path / "nowhere")
    (root / "dataset" / "train" / "._train_2_a_1.nii.gz").write_bytes(b"macOS")
    assert len(find_volumes(root)) == 4


def test_load_is_what_prepare_gives_and_is_read_once(root, monkeypatch):
    records = find_volumes(root)
    array = load(records, **GRID)
    assert array.shape == (4, 12, 20, 24)
    assert array.dtype == np.float16
    assert isinstance(array, np.memmap)
    for i in range(4):
        want = prepare(
            CT(body(i).astype(np.float32), (4, 5, 6)), *list(GRID.values())[:2]
        )
        assert np.abs(array[i] - want[0]).max() * 1000 <= 0.25
    monkeypatch.setattr(module, "read_hu", None)  # nobody reads again
    assert np.array_equal(load(records, **GRID), array)
    with pytest.raises(CTError, match="no records"):
        load([])


def test_another_content_is_another_entry(root):
    first = load(find_volumes(root), **GRID)
    path = find_volumes(root)[0].path
    times = path.stat()
    save(path, body(9) + np.int16(1024), "LPS")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    second = load(find_volumes(root), **GRID)
    assert not np.array_equal(first[0], second[0])
    assert np.array_equal(first[1:], second[1:])
    change(root, META, ",-1024,", ",-1014,", 1)
    third = load(find_volumes(root), **GRID)
    assert not np.array_equal(third[0], second[0])


def test_same_size_is_not_same_content(tmp_path):
    import gzip

    seen = set()
    for i, content in enumerate((b"one", b"two")):
        for suffix in (".nii.gz", ".nii"):
            path = tmp_path / f"{i}{suffix}"
            path.write_bytes(
                gzip.compress(content, 0) if suffix[-1] == "z" else content
            )
            seen.add(str(module._content(path)))
    assert len(seen) == 4


def test_a_bad_volume_leaves_no_entry(root, tmp_path):
    records = find_volumes(root)
    save(records[2].path, np.zeros((*SHAPE[:2], 1), np.int16))
    with pytest.raises(CTError, match="train_10_a_2"):
        load(records, **GRID)
    assert not list((tmp_path / "cache").rglob("*.npy"))
