"""``data_scripts/brats_men.py`` on a small folder in the layout of the set."""

import importlib.util
import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
from brats_small import LPS, SHAPE, arrays, rewrite

from medtut.data.brats import load_split
from medtut.data.brats_men import MEN

IDS = [f"BraTS-MEN-{n:05d}-000" for n in (3, 7, 9)]
SCRIPTS = Path(__file__).parents[2] / "data_scripts"


@pytest.fixture
def script(monkeypatch, tmp_path):
    monkeypatch.setenv("MEDTUT_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(SCRIPTS)  # as Python does for a script
    spec = importlib.util.spec_from_file_location(
        "brats_men_script", SCRIPTS / "brats_men.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def root(tmp_path):
    for seed, name in enumerate(IDS):
        folder = tmp_path / "set" / name
        folder.mkdir(parents=True)
        images, label = arrays(seed)
        volumes = dict(zip(MEN, images, strict=True))
        volumes["seg"] = np.where(label == 4, 3, label).astype(np.uint8)
        for kind, voxels in volumes.items():
            path = folder / f"{name}-{kind}.nii.gz"
            nibabel.save(nibabel.Nifti1Image(voxels, LPS), path)
    return tmp_path / "set"


def run(script, root, *extra):
    out = root.parent / "out"
    code = script.main([str(root), "--out", str(out), *extra])
    card = out / "passport.json"
    return code, json.loads(card.read_text(encoding="utf-8")) if card.exists() else None


def test_passport_crop_and_split(script, root, capsys, monkeypatch):
    code, card = run(script, root, "--hash")
    assert code == 1, "it is not the published set"
    masks = np.array([arrays(seed)[1] for seed in range(3)])
    assert card["slices_with_tumour"] == masks.any((1, 2)).sum()
    assert card["label_voxels"]["enhancing tumour"] == (masks == 4).sum()
    assert (card["cases"], card["patients"], len(card["files"])) == (3, 3, 15)
    assert len(next(iter(card["files"].values()))["sha256"]) == 64
    derived = card["crop"]["derived"]
    brain = np.any([arrays(s)[0].any(0)[::-1, ::-1] for s in range(3)], axis=0)
    assert [high - low for low, high in derived] == [
        int(np.ptp(axis)) + 1 for axis in np.nonzero(brain)
    ]
    lost = card["crop"]["tumour_voxels_lost_by_published"]
    assert sum(lost.values()) == np.count_nonzero(masks), "far from 51, 19, 9"
    printed = capsys.readouterr().out
    assert "138 x 202 x 138, ((51, 189), (19, 221), (9, 147)): another" in printed
    assert "voxels of tumour in 3 cases" in printed
    assert "0 cases have tumour where all four images are 0" in printed
    assert "DIFFERENT: 3 cases, the published set has 1000" in printed
    assert "DIFFERENT: 3 cases are not (240, 240, 155)" in printed
    assert len(load_split(root.parent / "out" / "split.json", IDS).test) == 1
    monkeypatch.setattr(script, "CASES", 3)
    monkeypatch.setattr(script, "SHAPE", SHAPE)
    assert run(script, root)[0] == 0
    assert "this is the published set" in capsys.readouterr().out


def test_bad_files_are_all_named_and_nothing_is_written(script, root, capsys):
    rewrite(root / IDS[0] / f"{IDS[0]}-seg.nii.gz", lambda v: v + 5)
    (root / IDS[1] / f"{IDS[1]}-t2w.nii.gz").write_bytes(b"cut")
    assert run(script, root) == (2, None)
    said = capsys.readouterr().err
    assert "2 of 3 cases" in said
    assert f"{IDS[0]}-seg.nii.gz has labels other" in said
    assert f"{IDS[1]}-t2w.nii.gz cannot be used" in said


def test_other_folders_and_empty_masks(script, root, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert run(script, tmp_path / "empty")[0] == 2
    assert "-t1c.nii" in capsys.readouterr().err
    rewrite(root / IDS[0] / f"{IDS[0]}-seg.nii.gz", lambda v: v * 0)
    assert run(script, root)[0] == 1
    assert f"1 cases have an empty mask: {IDS[0]}" in capsys.readouterr().out
