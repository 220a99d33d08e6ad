"""Drawn chests on disk: CT-RATE's layout, reports that say what was drawn."""

import ast
import csv
import hashlib
import json
import re
from dataclasses import replace

import nibabel
import numpy as np
import pytest

from medtut.data import chest_cohort
from medtut.data.assets import AssetError
from medtut.data.cache import entry_path
from medtut.data.chest_anatomy import LABELS, recipe
from medtut.data.chest_cohort import ChestSpec, chest_folder, outlines_of
from medtut.data.chest_findings import (
    ChestPatient,
    Drawn,
    draw_patient,
    sample_findings,
)
from medtut.data.chest_reports import phrases, report, sentences
from medtut.data.ct_rate import FINDINGS, find_volumes
from medtut.data.ct_volume import CT, prepare, read_hu
from medtut.errors import MedtutError

# Every sentence about a finding has one of these words, and no other sentence has.
NAMED = {
    "Medical material": r"medical material|catheter|pacemaker|wires|implant|device",
    "Arterial wall calcification": r"arterial wall|aort",
    "Cardiomegaly": r"cardiomegaly|heart size|heart is (not )?enlarged",
    "Pericardial effusion": r"pericardial",
    "Coronary artery wall calcification": r"coronary",
    "Hiatal hernia": r"hernia",
    "Lymphadenopathy": r"lymph",
    "Emphysema": r"emphysem",
    "Atelectasis": r"atelecta",
    "Lung nodule": r"nodul",
    "Lung opacity": r"opacit",
    "Pulmonary fibrotic sequela": r"fibro|scar",
    "Pleural effusion": r"pleural (effusion|fluid)",
    "Mosaic attenuation pattern": r"mosaic",
    "Peribronchial thickening": r"peribronchial|bronchial wall|walls of the bronchi",
    "Consolidation": r"consolidat",
    "Bronchiectasis": r"bronchiecta|dilat",
    "Interlobular septal thickening": r"septa",
}


def person(number, scanner="source"):
    """A patient with findings drawn by lot and nothing drawn in the volume."""
    rng = np.random.default_rng([3, number])
    findings = {}
    for name, severity in sample_findings(rng).items():
        lobe = list(LABELS)[int(rng.integers(5))]
        kind = "pacemaker" if name == "Medical material" else ""
        size = float(rng.uniform(5, 50))
        findings[name] = Drawn(severity, lobe.split()[0], lobe, size, 9, kind)
    hu = rng.integers(-1000, 1000, (96, 96, 48)).astype(np.float32)
    masks = dict.fromkeys(findings, hu > 900)
    facts = {"contrast": bool(number % 2), "ratio": 0.47}
    spacing = np.array([3.6, 3.6, 6.0])
    return ChestPatient(hu, findings, masks, hu.astype(np.uint8), facts, spacing)


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """An empty cache and patients that need no drawing; lists whom it drew."""
    monkeypatch.setenv("MEDTUT_CACHE", str(tmp_path))
    drawn = []

    def draw(body, scanner, seed, difficulty):
        drawn.append((body, seed[1]))
        return person(seed[1], scanner)

    monkeypatch.setattr(chest_cohort, "draw_patient", draw)
    monkeypatch.setattr(chest_cohort, "load_body", lambda name: None)
    return drawn


def rows(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("split", ["train", "valid"])
def test_the_layout_is_that_of_the_set(quick, split):
    long = {"train": "train", "valid": "validation"}[split]
    root = chest_folder(ChestSpec(split=split, count=3, first=4)) / "dataset"
    names = [f"{split}_{n}_a_1.nii.gz" for n in (5, 6, 7)]
    labels = rows(root / "multi_abnormality_labels" / f"{split}_predicted_labels.csv")
    assert list(labels[0]) == ["VolumeName", *FINDINGS]
    texts = rows(root / "radiology_text_reports" / f"{long}_reports.csv")
    assert list(texts[0]) == [
        "VolumeName", "ClinicalInformation_EN", "Technique_EN", "Findings_EN",
        "Impressions_EN",
    ]  # fmt: skip
    meta = rows(root / "metadata" / f"{long}_metadata.csv")
    for table in (labels, texts, meta):
        assert [row["VolumeName"] for row in table] == names
    for number, label, info in zip((4, 5, 6), labels, meta, strict=True):
        patient = person(number)
        assert [int(label[f]) for f in FINDINGS] == [
            int(f in patient.findings) for f in FINDINGS
        ]
        one = f"{split}_{number + 1}"
        image = nibabel.load(root / split / one / f"{one}_a" / f"{one}_a_1.nii.gz")
        assert image.get_data_dtype() == np.int16
        stored = nibabel.as_closest_canonical(image)
        hu = stored.get_fdata() * float(info["RescaleSlope"]) + float(
            info["RescaleIntercept"]
        )
        assert np.array_equal(hu, patient.hu)
        assert ast.literal_eval(info["XYSpacing"]) == [3.6, 3.6]
        assert float(info["ZSpacing"]) == 6.0
        assert np.allclose(image.header.get_zooms(), (3.6, 3.6, 6))


def test_the_reader_of_the_set_reads_it(quick):
    folder = chest_folder(ChestSpec(count=2))
    records = find_volumes(folder, "train")
    for number, record in enumerate(records):
        patient = person(number)
        truth = [f in patient.findings for f in FINDINGS]
        assert np.array_equal(np.asarray(record.labels) > 0, truth)
        volume = read_hu(record.path, slope=record.slope, intercept=record.intercept)
        assert np.array_equal(volume.hu, patient.hu)


def test_an_interrupted_cohort_goes_on(quick, monkeypatch):
    spec, draw = ChestSpec(body="both", count=6), chest_cohort.draw_patient

    def stop(body, scanner, seed, difficulty):
        if seed[1] == 3:
            raise KeyboardInterrupt
        return draw(body, scanner, seed, difficulty)

    monkeypatch.setattr(chest_cohort, "draw_patient", stop)
    with pytest.raises(KeyboardInterrupt):
        chest_folder(spec)
    done = set(quick)
    assert ("lung1", 3) not in done
    monkeypatch.setattr(chest_cohort, "draw_patient", draw)
    folder = chest_folder(spec)
    assert len(quick) == len(set(quick)) == 6  # nobody twice
    assert dict(quick)["lung2"] % 2 == 1  # the bodies in turn
    passport = json.loads((folder / "passport.json").read_text("utf-8"))
    for facts in passport["patients"].values():
        content = (folder / facts["file"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == facts["sha256"]
    assert not list(folder.rglob(".making-*"))
    quick.clear()
    assert chest_folder(spec) == folder
    assert not quick
    assert chest_folder(replace(spec, seed=1)) != folder


def test_what_cannot_be_drawn_is_refused(quick):
    for wrong in (
        {"body": "lung3"}, {"scanner": "x"}, {"split": "test"}, {"count": 0},
        {"withheld": ("Plague",)},
    ):  # fmt: skip
        with pytest.raises(MedtutError, match="chest_folder"):
            chest_folder(ChestSpec(**wrong))


def test_a_report_says_what_was_drawn_and_denies_a_part_of_the_rest():
    denied = []
    for number in range(60):
        patient = person(number)
        told = sentences(patient, np.random.default_rng(number))
        for text, finding, affirmed in told:
            named = [f for f in FINDINGS if re.search(NAMED[f], text.lower())]
            assert named == ([] if finding is None else [finding]), text
            if finding:
                assert affirmed == (finding in patient.findings)
                assert affirmed != bool(re.search(
                    r"\b(no|not|free of|normal)\b", text.lower())), text  # fmt: skip
            assert "{" not in text
        assert {f for _, f, yes in told if yes} == set(patient.findings)
        denied.append(sum(f is not None and not yes for _, f, yes in told)
                      / (18 - len(patient.findings)))  # fmt: skip
        for name, drawn in patient.findings.items():
            text = next(t for t, f, _ in told if f == name)
            numbers = re.findall(r"(\d+) mm", text)
            assert all(float(n) == round(drawn.size_mm) for n in numbers)
            lobes = [lobe for lobe in list(LABELS)[:5] if lobe in text]
            assert set(lobes) <= {drawn.lobe}
    assert 0.3 < np.mean(denied) < 0.8


def test_what_is_withheld_is_never_named(quick):
    withheld = ("Hiatal hernia", "Lung nodule")
    for number in range(40):
        rng = np.random.default_rng(number)
        text = report(person(number), rng, frozenset(withheld))
        whole = " ".join(text.values()).lower()
        assert not re.search(r"hernia|nodul", whole)
    folder = chest_folder(ChestSpec(count=8, withheld=withheld))
    texts = next((folder / "dataset/radiology_text_reports").iterdir())
    assert not re.search(r"hernia|nodul", texts.read_text("utf-8").lower())
    table = rows(next((folder / "dataset/multi_abnormality_labels").iterdir()))
    assert any(int(row["Lung nodule"]) for row in table)  # the labels keep them


def test_there_are_several_ways_to_say_it():
    for name, words in phrases()["findings"].items():
        assert len(set(words["present"])) >= 4, name
        assert len(set(words["absent"])) >= 2, name
    assert tuple(phrases()["findings"]) == FINDINGS
    orders = {
        tuple(f for _, f, _ in sentences(person(1), np.random.default_rng(k)))
        for k in range(5)
    }
    assert len(orders) == 5


# -- outlines --------------------------------------------------------------------------
def outlined(number):
    """As `person`, with voxels of each finding, the last of none; 5 is healthy."""
    patient = person(number)
    if number == 5:
        return replace(patient, findings={}, masks={})
    rng = np.random.default_rng(number)
    masks = {f: rng.random(patient.hu.shape) > 0.97 for f in patient.findings}
    if len(masks) > 1:
        masks[list(masks)[-1]][:] = False
    return replace(patient, masks=masks)


@pytest.mark.parametrize("affine", [(-1, -1, 1), (1, -1, 1), (1, 1, -1)])
def test_outlines_lie_as_the_tower_sees_the_volume(quick, monkeypatch, affine):
    draw = lambda body, scanner, seed, difficulty: outlined(seed[1])  # noqa: E731
    monkeypatch.setattr(chest_cohort, "draw_patient", draw)
    monkeypatch.setitem(recipe()["scanners"]["target"], "affine", list(affine))
    spec = ChestSpec("lung2", "target", "valid", 1, outlines=True)
    for number in (5, 9):
        folder = chest_folder(replace(spec, first=number))
        (record,) = find_volumes(folder, "valid")
        patient, found = outlined(number), outlines_of(record.path)
        assert found.shape == (18, 48, 96, 96)
        assert found.dtype == bool
        for finding, got in zip(FINDINGS, found, strict=True):
            mask = patient.masks.get(finding, np.zeros(patient.hu.shape, bool))
            # A finding painted white and the rest black, brought to the tower's grid.
            painted = CT(np.where(mask, 1000, -1000).astype("f4"), (3.6, 3.6, 6.0))
            assert np.array_equal(got, prepare(painted)[0] > 0), finding
        ct = read_hu(record.path, record.slope, record.intercept)
        assert np.array_equal(ct.hu, patient.hu), "the volume is turned as well"
    assert patient.masks
    assert found.any()


def test_someone_in_whom_every_finding_has_voxels_of_its_own(quick, monkeypatch):
    patient = person(0)
    every = dict.fromkeys(FINDINGS, next(iter(person(9).findings.values())))
    band = np.arange(patient.hu.size).reshape(patient.hu.shape) % 18
    masks = {f: band == i for i, f in enumerate(FINDINGS)}
    whole = replace(patient, findings=every, masks=masks)
    monkeypatch.setattr(chest_cohort, "draw_patient", lambda *_: whole)
    (record,) = find_volumes(chest_folder(ChestSpec(count=1, outlines=True)), "train")
    found = outlines_of(record.path)
    assert (found.sum(0) == 1).all()
    assert np.array_equal(found.argmax(0), band.transpose(2, 1, 0)[:, ::-1, ::-1])


def test_a_cohort_without_outlines_is_the_one_it_was(quick):
    spec = ChestSpec(count=2)
    key = {
        "version": recipe()["version"], "anatomy": recipe()["anatomy_version"],
        "body": "lung1", "scanner": "source", "split": "train", "count": 2, "first": 0,
        "seed": 0, "difficulty": 1.0, "withheld": (),
    }  # fmt: skip
    plain, rich = chest_folder(spec), chest_folder(replace(spec, outlines=True))
    assert plain == entry_path("chest_cohort", key)
    assert rich != plain
    assert len(quick) == 4
    assert not (plain / "dataset" / "outlines").exists()
    # What is read of a real set is the same in both.
    one, two = (
        {p.relative_to(f).as_posix(): p.read_bytes() for p in f.rglob("*.*")
         if p.is_file() and "outlines" not in p.parts and p.suffix in (".gz", ".csv")}
        for f in (plain, rich)
    )  # fmt: skip
    assert one == two
    assert len(one) == 5
    assert len(find_volumes(rich, "train")) == 2, "an outline is no volume"
    with pytest.raises(MedtutError, match=r"outlines.train.*ChestSpec\(outlines=True"):
        outlines_of(find_volumes(plain, "train")[0].path)


@pytest.mark.parametrize(
    ("body", "scanner"), [("lung1", "source"), ("lung2", "target")]
)
def test_a_finding_is_outlined_where_the_prepared_volume_changed(
    monkeypatch, tmp_path, body, scanner
):
    """A real body with a consolidation and without; turned, it would lie elsewhere."""
    only = {f: float(f == "Consolidation") for f in FINDINGS}
    try:
        healthy, ill = (
            draw_patient(body, scanner, (0, 3), 1.0, odds)
            for odds in (dict.fromkeys(only, 0.0), only)
        )
    except AssetError as error:
        pytest.skip(f"the real CTs are not here: {error}")
    monkeypatch.setenv("MEDTUT_CACHE", str(tmp_path))
    monkeypatch.setattr(chest_cohort, "load_body", lambda name: None)

    def prepared(patient, split):
        monkeypatch.setattr(chest_cohort, "draw_patient", lambda *_: patient)
        folder = chest_folder(ChestSpec(body, scanner, split, 1, outlines=True))
        (record,) = find_volumes(folder, split)
        ct = read_hu(record.path, record.slope, record.intercept, record.spacing)
        return outlines_of(record.path), 1000 * prepare(ct)[0]

    (nothing, before), (found, after) = (
        prepared(healthy, "valid"),
        prepared(ill, "train"),
    )
    at = FINDINGS.index("Consolidation")
    assert not nothing.any()
    assert found.any((1, 2, 3)).nonzero()[0].tolist() == [at]
    assert found[at].sum() == ill.findings["Consolidation"].voxels > 20
    change = after - before
    inside = change[found[at]].mean()
    assert inside > 200  # from lung towards tissue
    assert abs(change[~found[at]]).mean() < 5
    for axes in ((0,), (1,), (2,), (0, 1), (1, 2), (0, 2), (0, 1, 2)):
        assert change[np.flip(found[at], axes)].mean() < inside * 2 / 3, axes
