"""The scripts that check the abdominal sets, on small folders in their layouts."""

import hashlib
import json
import re
import zipfile

import abdomen_pretraining_sets
import flare22
import nibabel
import numpy as np
import pytest
import totalsegmentator
from organ_small import SHAPE, affine, arrays, save, write_case, write_flare
from pretraining_layout import cases_of, pairs, place

from medtut.data.few_shot import load_protocol
from medtut.data.organs import FLARE22, STRUCTURES
from medtut.data.partial import pretraining_sets, set_of
from medtut.data.totalseg import load_case, read_labels
from medtut.errors import MedtutError

ORGANS = ("aorta", "liver", "spleen")


def run(script, folder, *more):
    out = folder.parent / "out"
    code = script.main([str(folder), "--out", str(out), *map(str, more)])
    card = out / "passport.json"
    return code, json.loads(card.read_text("utf-8")) if card.exists() else None


# --- TotalSegmentator --------------------------------------------------------------


@pytest.fixture
def totalseg(tmp_path):
    for i in range(4):
        folder = write_case(tmp_path / "set", f"s{i:04}", seed=i)
        heart = np.zeros(SHAPE, np.uint8)
        save(folder / "segmentations" / "heart_myocardium.nii.gz", heart, affine())
    return tmp_path / "set"


def test_totalsegmentator(totalseg, monkeypatch, capsys):
    code, card = run(totalsegmentator, totalseg, "--hash")
    assert code == 1
    assert (card["cases"], card["labelled"], card["files"]) == (4, 4, 20)
    assert card["bytes"] == sum(p.stat().st_size for p in totalseg.rglob("*.gz"))
    facts = card["looked_at"][0]
    ml = arrays()[1]["liver"].sum() * 2 * 2.5 * 3 / 1000
    assert facts["ml"]["liver"] == pytest.approx(ml, abs=0.01)
    assert facts["stored"] == "RAS"
    assert card["empty_among_those"]["heart_myocardium"] == [
        f"s{i:04}" for i in range(4)
    ]
    want = hashlib.sha256((totalseg / "s0001" / "ct.nii.gz").read_bytes()).hexdigest()
    assert card["sha256"]["s0001/ct.nii.gz"] == want
    said = capsys.readouterr().out
    assert "DIFFERENT: 4 cases, v1 has 1,204" in said
    assert "DIFFERENT: 4 structures, v1 has 104" in said
    assert "heart_myocardium: in none, empty in 4" in said
    monkeypatch.setitem(totalsegmentator.PUBLISHED, "v1", (4, 4, "heart_myocardium"))
    assert run(totalsegmentator, totalseg)[0] == 0
    assert "this is the published set" in capsys.readouterr().out
    (totalseg / "s0002" / "segmentations" / "liver.nii.gz").unlink()
    assert run(totalsegmentator, totalseg)[0] == 1
    assert "1 structures are not in all cases: liver in 3" in capsys.readouterr().out


def test_totalsegmentator_bad_files(totalseg, capsys):
    save(totalseg / "s0000" / "ct.nii.gz", arrays()[0] + 1024, affine())
    bad = arrays()[1]["spleen"][:-1]
    save(totalseg / "s0003" / "segmentations" / "spleen.nii.gz", bad, affine())
    assert run(totalsegmentator, totalseg) == (2, None)
    said = capsys.readouterr().err
    assert "2 of 4 cases" in said
    assert "not in HU" in said
    assert "spleen.nii.gz belongs to another volume" in said
    assert run(totalsegmentator, totalseg / "none")[0] == 2


def test_published_lists(totalseg, tmp_path, capsys):
    lists, line = (
        tmp_path / "lists",
        "data/{0}/ct.nii.gz data/{0}/segmentations/{1}.nii.gz",
    )
    lists.mkdir()

    def write(name, *ids):
        organ = name.rsplit("_", 1)[0]
        text = "\n".join(line.format(f"s{i:04}", organ) for i in ids)
        (lists / f"{name}.txt").write_text(text)

    write("spleen_train", 0, 1, 2)
    write("spleen_test", 3)
    write("liver_train", 0, 1, 1, 7)
    write("liver_test", 3)
    code, _ = run(totalsegmentator, totalseg, "--lists", lists, "--shots", 1, 3)
    said = capsys.readouterr().out
    assert code == 1
    assert "s0001 stands twice, kept once" in said
    assert "liver: 1 listed cases are not there (s0007)" in said
    assert "liver: 2 volumes to learn from, no k = [3]" in said
    protocol = load_protocol(tmp_path / "out" / "protocol_spleen.json")
    assert set(protocol.support(3, 0)) == {"s0000", "s0001", "s0002"}
    assert protocol.test == ("s0003",)
    assert load_protocol(tmp_path / "out" / "protocol_liver.json").shots == (1,)
    write("liver_test", 0)
    assert run(totalsegmentator, totalseg, "--lists", lists)[0] == 2
    assert "in the pool and in the test set" in capsys.readouterr().err
    empty = tmp_path / "empty"
    empty.mkdir()
    assert run(totalsegmentator, totalseg, "--lists", empty)[0] == 2


def test_archive(totalseg, tmp_path, monkeypatch, capsys):
    archive, new = tmp_path / "a.zip", tmp_path / "new"
    with zipfile.ZipFile(archive, "w") as out:
        for path in sorted(totalseg.rglob("*.gz")):
            out.write(path, f"Totalsegmentator_dataset/{path.relative_to(totalseg)}")
        out.writestr("../evil.txt", "no")
        out.writestr("x/../../s0099/ct.nii.gz.exe", "no")
    md5 = hashlib.md5(archive.read_bytes()).hexdigest()
    monkeypatch.setitem(totalsegmentator.MD5, md5, "the small one")
    assert run(totalsegmentator, new, "--archive", archive)[0] == 1
    assert f"md5 {md5} (the small one), 20 files unpacked" in capsys.readouterr().out
    for path in totalseg.rglob("*.gz"):
        assert (new / path.relative_to(totalseg)).read_bytes() == path.read_bytes()
    assert not list(tmp_path.rglob("evil*"))
    assert len([p for p in new.rglob("*") if p.is_file()]) == 20
    run(totalsegmentator, new, "--archive", archive)
    assert "0 files unpacked" in capsys.readouterr().out
    archive.write_bytes(archive.read_bytes()[:5000])
    assert run(totalsegmentator, new, "--archive", archive)[0] == 2
    assert "no whole zip" in capsys.readouterr().err


# --- FLARE22 -----------------------------------------------------------------------


def test_flare(tmp_path, monkeypatch, capsys):
    for i in range(1, 5):
        write_flare(tmp_path / "set", f"FLARE22_Tr_000{i}", FLARE22, i, labels=i < 4)
        write_flare(tmp_path / "tuning", f"FLARETs_000{i}", FLARE22, 9 + i)
    more = ("--test", tmp_path / "tuning", "--shots", 1, 2)
    code, card = run(flare22, tmp_path / "set", *more)
    assert (code, card["cases"], card["labelled"]) == (1, 4, 3)
    assert card["empty_among_those"]["pancreas"] == [
        f"FLARE22_Tr_000{i}" for i in (1, 2, 3)
    ]
    protocol = load_protocol(tmp_path / "out" / "protocol.json")
    assert len(protocol.test) == 4
    assert protocol.test[0] == "FLARETs_0001"
    said = capsys.readouterr().out
    assert "DIFFERENT: 3 labelled cases, the published set has 50" in said
    assert "DIFFERENT: 1 images have no labels" in said
    (tmp_path / "set" / "images" / "FLARE22_Tr_0004_0000.nii.gz").unlink()
    monkeypatch.setattr(flare22, "CASES", 3)
    assert run(flare22, tmp_path / "set")[0] == 0
    code = run(flare22, tmp_path / "set", "--test", tmp_path / "set")[0]
    assert code == 2
    assert "in the pool and in the test set" in capsys.readouterr().err


def test_flare_placed_by_name(tmp_path, capsys):
    write_flare(tmp_path / "set", "FLARE22_Tr_0001", FLARE22)
    write_flare(tmp_path / "set", "FLARETs_0001", FLARE22)
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in (tmp_path / "set").rglob("*.gz"):
        path.rename(flat / path.name)
    (flat / "FLARE22_other.nii.gz").write_bytes(b"")
    code, card = run(flare22, flat, "--place", tmp_path / "to")
    assert (code, card["cases"]) == (1, 1)
    names = {
        p.relative_to(tmp_path / "to").as_posix()
        for p in (tmp_path / "to").rglob("*.gz")
    }
    assert names == {
        "train/images/FLARE22_Tr_0001_0000.nii.gz",
        "train/labels/FLARE22_Tr_0001.nii.gz",
        "tuning/images/FLARETs_0001_0000.nii.gz",
        "tuning/labels/FLARETs_0001.nii.gz",
    }
    assert run(flare22, flat, "--place", tmp_path / "to")[0] == 2
    assert "is there already" in capsys.readouterr().err
    assert run(flare22, tmp_path / "set", "--place", tmp_path / "x")[0] == 2


# --- the nine pretraining sets -----------------------------------------------------


def native_name(ending, number):
    """A path that ends as a download's: the number in place of the first bracket."""
    name = re.sub(r"\((?:[^()]|\\.)*\)", number, ending, count=1)
    return name.replace("\\d", "0").replace("\\.", ".") + ".gz"


def write_native(folder, one, number, suffix=".gz"):
    """One case as the set is downloaded, with every id of the set somewhere."""
    hu, labels = arrays()[0], np.zeros(SHAPE, np.uint8)
    body = np.argwhere(hu > -200)
    highest = max(i if isinstance(i, int) else i[0] for i in one["ids"].values())
    for i in range(1, highest + 1):
        left, right = body[5 * i], body[-5 * i]
        labels[tuple(left)] = labels[tuple(right)] = i
    for ending, values in zip(one["native"], (hu, labels), strict=True):
        save(folder / native_name(ending, number), values, affine())
        if not suffix:
            path = folder / native_name(ending, number)
            image = nibabel.load(path)
            nibabel.save(image, path.with_suffix(""))
            path.unlink()
    return labels


@pytest.mark.parametrize("name", sorted(pretraining_sets()))
def test_every_set_from_download_to_template(tmp_path, name):
    """Placed, found again, and every structure of the template read by its id."""
    one = pretraining_sets()[name]
    number = "0007" if name == "amos" else "007"
    labels = write_native(tmp_path / "native", one, number)
    root = tmp_path / "root"
    assert place(tmp_path / "native", root, one) == 1
    (record,), alone = cases_of(root, one)
    assert not alone
    relative = record.image.relative_to(root).as_posix()
    assert set_of(relative, "here") is one
    case = load_case(record, STRUCTURES, (2.0, 2.5, 3.0), partial=True)
    assert {s for s, a in zip(STRUCTURES, case.annotated, strict=True) if a} == set(
        one["ids"]
    )
    assert case.empty == ()
    got = read_labels(record, list(one["ids"]))
    for mask, at in zip(got, one["ids"].values(), strict=True):
        wanted = labels == (at if isinstance(at, int) else at[0])
        if isinstance(at, list):
            half = np.arange(SHAPE[0])[:, None, None] > (SHAPE[0] - 1) / 2
            wanted = wanted & (half == (at[1] == "right"))
        np.testing.assert_array_equal(mask.astype(bool), wanted)
    with pytest.raises(MedtutError, match="is there already"):
        place(tmp_path / "native", root, one)


def test_lists_name_what_was_placed(tmp_path):
    """The layout is that of upstream's train.txt, as far as names go."""
    published = {
        "btcv": ("img/img0002.nii.gz", "label/label0002.nii.gz"),
        "chaos": ("ct/img/10_image.nii.gz", "ct/liver_label/10_segmentation.nii.gz"),
        "lits": ("img/liver_1.nii.gz", "label/liver_1.nii.gz"),
        "kits": ("img/img0000.nii.gz", "label/label0000.nii.gz"),
        "abdomenct_1k": ("img/Case_00001_0000.nii.gz", "label/Case_00001.nii.gz"),
        "amos": ("img/amos_0001.nii.gz", "label/amos_0001.nii.gz"),
        "msd_liver": ("imagesTr/liver_0.nii.gz", "labelsTr/liver_0.nii.gz"),
        "ct_org": ("img/volume-0.nii.gz", "label/labels-0.nii.gz"),
        "abdomenct_12organ": (
            "img/Organ12_0001_0000.nii.gz",
            "label/Organ12_0001.nii.gz",
        ),
    }
    for name, names in published.items():
        number = re.search(r"(\d+)(_image|_0000)?\.nii", names[0])[1]
        layout = pretraining_sets()[name]["layout"]
        assert [part.format(number) for part in layout] == list(names)


def test_a_download_that_is_not_compressed(tmp_path):
    one = pretraining_sets()["lits"]
    write_native(tmp_path / "native", one, "12", suffix="")
    assert [p.suffix for p in (tmp_path / "native").rglob("*.nii*")] == [".nii"] * 2
    assert list(pairs(tmp_path / "native", one)) == ["12"]
    place(tmp_path / "native", tmp_path / "root", one)
    (record,), _ = cases_of(tmp_path / "root", one)
    assert record.image.name == "liver_12.nii.gz"
    assert record.image.read_bytes()[:2] == b"\x1f\x8b"
    assert read_labels(record, ["liver_tumor"]).any()


def test_the_collection(tmp_path, capsys):
    root, sets = tmp_path / "root", pretraining_sets()
    for name in ("lits", "chaos"):
        for number in ("1", "2"):
            write_native(tmp_path / name, sets[name], number)
        place(tmp_path / name, root, sets[name])
    (root / "04_LiTS" / "label" / "liver_2.nii.gz").unlink()
    lists = tmp_path / "train.txt"
    lists.write_text(
        "04_LiTS/img/liver_1.nii.gz 04_LiTS/label/liver_1.nii.gz\n"
        "04_LiTS/img/liver_9.nii.gz 04_LiTS/label/liver_9.nii.gz\n"
    )
    code, card = run(abdomen_pretraining_sets, root, "--lists", lists)
    said = capsys.readouterr().out
    assert code == 1
    assert card["sets"]["lits"]["volumes"] == 1
    assert card["volumes_with_labels_of"]["liver"] == 3
    assert card["volumes_with_labels_of"]["liver_tumor"] == 1
    assert card["volumes_with_labels_of"]["pancreas"] == 0
    assert "lits: liver_2.nii.gz has no partner; 1 in all" in said
    assert "lits: 1 volumes, published are 131" in said
    assert "1 listed volumes are not there: 04_LiTS/img/liver_9.nii.gz" in said


def test_the_collection_is_whole(tmp_path, monkeypatch, capsys):
    one = dict(pretraining_sets()["chaos"], cases=1)
    monkeypatch.setattr(
        abdomen_pretraining_sets, "pretraining_sets", lambda: {"chaos": one}
    )
    write_native(tmp_path / "chaos", one, "1")
    place(tmp_path / "chaos", tmp_path / "root", one)
    assert run(abdomen_pretraining_sets, tmp_path / "root")[0] == 0
    assert "all that is there is whole" in capsys.readouterr().out
    path = tmp_path / "root" / one["folder"] / "ct/liver_label/1_segmentation.nii.gz"
    save(path, (255 * arrays()[1]["liver"]).astype(np.uint8), affine())
    assert run(abdomen_pretraining_sets, tmp_path / "root")[0] == 2
    assert "1_segmentation.nii.gz holds" in capsys.readouterr().err, "PNG's 255"
    save(path, 0 * arrays()[1]["liver"], affine())
    assert run(abdomen_pretraining_sets, tmp_path / "root")[0] == 1
    assert "chaos: liver is empty in all 1 read" in capsys.readouterr().out


def test_the_registry_is_printed(tmp_path, capsys):
    assert abdomen_pretraining_sets.main([]) == 0
    said = capsys.readouterr().out
    for one in pretraining_sets().values():
        assert all(one[key] in said for key in ("set", "where", "terms", "cite"))
    assert abdomen_pretraining_sets.main(["--set", "kits"]) == 0
    said = capsys.readouterr().out
    assert "kidney_left 1 (left half)" in said
    assert "CT-ORG" not in said
    assert abdomen_pretraining_sets.main([str(tmp_path)]) == 2
    assert abdomen_pretraining_sets.main([str(tmp_path), "--place", str(tmp_path)]) == 2
    words = [str(tmp_path), "--set", "chaos", "--place", str(tmp_path)]
    assert abdomen_pretraining_sets.main(words) == 2
    assert "DICOM" in capsys.readouterr().err, "what to do about it"
