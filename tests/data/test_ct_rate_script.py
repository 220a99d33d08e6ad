"""``data_scripts/ct_rate.py`` on a small folder in the layout of the set."""

import importlib.util
import json
from pathlib import Path

import pytest
from ct_small import NAMES, ct_rate

from medtut.data.ct_rate import FINDINGS, find_volumes, patient_of
from medtut.data.splits import load_split

SCRIPT = Path(__file__).parents[2] / "data_scripts" / "ct_rate.py"


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("ct_rate_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(script, root, out, *extra):
    code = script.main([str(root), "--out", str(out), *map(str, extra)])
    card = out / "passport.json"
    return code, json.loads(card.read_text("utf-8"))[
        "splits"
    ] if card.exists() else None


def test_passport_and_split(script, tmp_path, capsys):
    root, out = ct_rate(tmp_path / "set"), tmp_path / "out"
    code, cards = run(script, root, out)
    assert code == 1, "it is not the published set"
    card = cards["train"]
    assert (card["volumes"], card["scans"], card["patients"]) == (4, 3, 2)
    assert card["rescaled_by"] == {"1 · x -1024": 4}
    assert card["share_with_finding"][FINDINGS[3]] == 0.25
    assert [f["spacing_mm"] for f in card["looked_at"]] == [[4, 5, 6]] * 4
    split = load_split(out / "split_train.json", [f"{n}.nii.gz" for n in NAMES])
    parts = [set(map(patient_of, p)) for p in (split.train, split.validation)]
    assert not parts[0] & parts[1]
    assert all(parts)
    printed = capsys.readouterr().out
    assert "DIFFERENT: train: 4 volumes, the published set has 47,149" in printed
    assert "25.00% Cardiomegaly" in printed


def test_the_published_counts_are_the_set(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "PUBLISHED", {"train": (4, 3, 2)})
    assert run(script, ct_rate(tmp_path / "set"), tmp_path / "out")[0] == 0
    assert "this is the published set" in capsys.readouterr().out
    next((tmp_path / "set").rglob("train_2_a_1.nii.gz")).unlink()
    assert run(script, tmp_path / "set", tmp_path / "again")[0] == 1
    assert "1 of 4 rows have no volume" in capsys.readouterr().out


def test_counts_add_up(script):
    total = [sum(n) for n in zip(*script.PUBLISHED.values(), strict=True)]
    assert total == [50_188, 25_692, 21_304]


def test_hu_in_the_folder_of_the_first_release(script, tmp_path, capsys):
    root = ct_rate(tmp_path / "set", stored=False)
    assert run(script, root, tmp_path / "out") == (2, None)
    assert "4 of 4 volumes" in (said := capsys.readouterr().err)
    assert "in HU already" in said
    (root / "dataset" / "train").rename(root / "dataset" / "train_fixed")
    code, cards = run(script, root, tmp_path / "out")
    assert code == 1
    assert cards["train_fixed"]["rescaled_by"] == {}


def test_place_by_name(script, tmp_path, capsys):
    root, flat = ct_rate(tmp_path / "set", stored=False), tmp_path / "flat"
    flat.mkdir()
    for path in [*root.rglob("*.nii.gz"), *root.rglob("*.csv")]:
        path.rename(flat / path.name)
    (flat / "notes.txt").write_text("mine")
    new = tmp_path / "placed"
    code, cards = run(script, flat, tmp_path / "out", "--place", new, "--fixed")
    assert code == 1
    assert list(cards) == ["train_fixed"]
    assert [r.key for r in find_volumes(new, "train_fixed")] == list(NAMES)
    assert "7 files placed" in capsys.readouterr().out
    assert run(script, flat, tmp_path / "out", "--place", new, "--fixed")[0] == 2
    assert "is there already" in capsys.readouterr().err


def test_a_folder_of_another_kind(script, tmp_path, capsys):
    assert run(script, tmp_path, tmp_path / "out") == (2, None)
    assert "has none of train" in capsys.readouterr().err
