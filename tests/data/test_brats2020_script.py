"""``data_scripts/brats2020.py`` on a small folder in the layout of the set."""

import hashlib
import importlib.util
import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
from brats_small import SHAPE, arrays, rewrite, write_case

from medtut.data.brats import load_split

NAMES = [f"BraTS20_Training_{i}" for i in (353, 354, 355)]


@pytest.fixture(scope="module")
def script():
    path = Path(__file__).parents[2] / "data_scripts" / "brats2020.py"
    spec = importlib.util.spec_from_file_location("brats2020_script", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def root(tmp_path):
    for i, name in enumerate(NAMES):
        mask = "W39_1998.09.19_Segm" if name.endswith("355") else "{name}_seg"
        write_case(tmp_path / "set", name, seed=i, suffix=".nii", mask=mask)
    return tmp_path / "set"


def run(script, root, *extra):
    out = root.parent / "out"
    code = script.main([str(root), "--out", str(out), *extra])
    card = out / "passport.json"
    return code, json.loads(card.read_text(encoding="utf-8")) if card.exists() else None


def test_passport_and_split(script, root, capsys):
    code, card = run(script, root)
    assert code == 1, "it is not the published set"
    masks = [arrays(i)[1] for i in range(3)]
    kept = sum(int(m.any((0, 1)).sum()) for m in masks)
    assert card["slices"] == 36
    assert card["slices_with_tumour"] == kept
    assert card["label_voxels"]["enhancing tumour"] == sum(
        (m == 4).sum() for m in masks
    )
    assert sum(card["label_voxels"].values()) == 3 * np.prod(SHAPE)
    assert card["near_duplicates"] == []
    assert len(card["files"]) == 15
    assert "sha256" not in next(iter(card["files"].values()))
    brain = arrays(0)[0][3]
    want = np.quantile(brain[brain != 0], 0.5)
    assert card["per_case"][0]["quantiles"]["t2"][2] == pytest.approx(want, abs=0.01)
    printed = capsys.readouterr().out
    assert f"36 slices, {kept} of them" in printed
    assert "369 x 155 = 57,195" in printed
    assert "24,354" in printed
    assert "BraTS20_Training_355 is called W39_1998.09.19_Segm.nii" in printed
    assert "DIFFERENT: 3 cases, the published set has 369" in printed
    assert "DIFFERENT: 3 cases are not (240, 240, 155)" in printed
    split = load_split(root.parent / "out" / "split.json", NAMES)
    assert len(split.test) == 1
    assert run(script, root)[0] == 1, "a second run finds its own split and passport"


def test_the_published_set_is_recognised(script, root, monkeypatch, capsys):
    masks = [arrays(i)[1] for i in range(3)]
    monkeypatch.setattr(script, "CASES", 3)
    monkeypatch.setattr(script, "SHAPE", SHAPE)
    kept = sum(int(m.any((0, 1)).sum()) for m in masks)
    monkeypatch.setattr(script, "KEPT_BY_SOURCE", kept)
    assert run(script, root)[0] == 0
    assert "this is the published set" in capsys.readouterr().out
    monkeypatch.setattr(script, "KEPT_BY_SOURCE", kept * 2)
    assert run(script, root)[0] == 1


def test_hashes_and_near_duplicates(script, root):
    twin = write_case(root, "BraTS20_Training_400", seed=0, suffix=".nii")
    # One voxel of noise: not the same file, still the same head.
    rewrite(twin / "BraTS20_Training_400_flair.nii", lambda v: v + (v == v.max()))
    code, card = run(script, root, "--hash")
    assert code == 1
    assert card["near_duplicates"] == [[NAMES[0], "BraTS20_Training_400"]]
    name, facts = next(iter(card["files"].items()))
    assert facts["sha256"] == hashlib.sha256((root / name).read_bytes()).hexdigest()


def test_bad_files_are_all_named_and_nothing_is_written(script, root, capsys):
    rewrite(root / NAMES[0] / f"{NAMES[0]}_seg.nii", lambda v: v + 5)
    path = root / NAMES[1] / f"{NAMES[1]}_t2.nii"
    path.write_bytes(path.read_bytes()[:1000])
    code, card = run(script, root)
    assert (code, card) == (2, None)
    said = capsys.readouterr().err
    assert f"{NAMES[0]}_seg.nii has labels other" in said
    assert f"{NAMES[1]}_t2.nii cannot be used" in said


def test_other_folders(script, root, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert run(script, tmp_path / "empty")[0] == 2
    assert "No BraTS case" in capsys.readouterr().err
    assert run(script, tmp_path / "none")[0] == 2
    image = nibabel.load(root / NAMES[0] / f"{NAMES[0]}_seg.nii")
    empty = nibabel.Nifti1Image(np.zeros(SHAPE, "u1"), image.affine)
    nibabel.save(empty, root / NAMES[0] / f"{NAMES[0]}_seg.nii")
    assert run(script, root)[0] == 1
    assert f"1 cases have an empty mask: {NAMES[0]}" in capsys.readouterr().out
