"""The drawn brain cohort: real formats, disease in its place, the same every time."""

import csv
import hashlib
import json
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from medtut.audit.data_checks import patient_id
from medtut.data import brain_cohort
from medtut.data.brain_anatomy import draw_patient, recipe
from medtut.data.brain_cohort import CohortSpec, cohort_folder, mri_folder
from medtut.data.brain_mri import CLASSES, find_pictures
from medtut.data.brats import MODALITIES, find_cases, load_case
from medtut.data.cache import entry_path
from medtut.errors import MedtutError
from medtut.evaluate import region_dice, threshold_baseline

KINDS = ("glioma", "meningioma", "pituitary", "none")


@pytest.fixture(scope="module")
def patients():
    """One patient of every kind, drawn once."""
    return {k: draw_patient(k, "source", (3, i)) for i, k in enumerate(KINDS)}


@pytest.fixture
def quick(monkeypatch, tmp_path, patients):
    """An empty cache, and patients that need no drawing; counts the drawings."""
    monkeypatch.setenv("MEDTUT_CACHE", str(tmp_path))
    drawn = []

    def draw(kind, scanner, seed, difficulty):
        drawn.append(seed[1])
        return patients[kind]

    monkeypatch.setattr(brain_cohort, "draw_patient", draw)
    return drawn


def test_the_same_patient_every_time_and_nobody_twice(patients):
    again = draw_patient("glioma", "source", (3, 0))
    first = patients["glioma"]
    for name in MODALITIES:
        assert np.array_equal(first.images[name], again.images[name])
    assert np.array_equal(first.label, again.label)
    assert first.findings == again.findings
    for other in (("source", (3, 1)), ("source", (4, 0)), ("target", (3, 0))):
        one = draw_patient("glioma", *other)
        assert (one.label > 0).any()
        # Not the same head behind another scanner: the tumour is elsewhere.
        assert one.findings["centre_mm"] != first.findings["centre_mm"]


def test_four_contrasts_of_one_head(patients):
    for patient in patients.values():
        shape = tuple(recipe()["shape"])
        head = patient.images["t1"] > 0
        for image in patient.images.values():
            assert image.shape == shape
            assert image.dtype == np.float32
            assert np.isfinite(image).all()
            assert image.min() == 0
            assert 0.6 < image.max() < 2.5
            assert ((image > 0) == head).mean() > 0.999
        # 1,200 to 2,000 ml inside the skull of an adult.
        assert 1.1e6 < 2 * head.sum() < 2.1e6
        # Brain fills its box: no head cut off at a border of the volume.
        assert not head[[0, -1]].any()
        assert not head[:, [0, -1]].any()
        assert not patient.label[~head].any()


def test_contrasts_are_those_of_their_sequences(patients):
    patient = patients["glioma"]
    label, images = patient.label, patient.images
    depth = ndimage.distance_transform_edt(images["t1"] > 0, sampling=(1, 1, 2))
    healthy = (depth > 12) & (label == 0)
    median = {
        name: {
            "healthy": np.median(image[healthy]),
            **{k: np.median(image[label == k]) for k in (1, 2, 3)},
        }
        for name, image in images.items()
    }
    assert median["flair"][2] > 1.3 * median["flair"]["healthy"]  # oedema is bright
    assert median["flair"][1] < median["flair"][2]  # necrosis is not
    assert median["t1ce"][3] > 1.5 * median["t1"][3]  # the rim takes up contrast
    assert median["t1ce"][2] == pytest.approx(median["t1"][2], rel=0.25)
    assert median["t1"][2] < median["t1"]["healthy"]
    assert median["t2"][2] > median["t2"]["healthy"]


def test_every_disease_is_in_its_place(patients):
    glioma, men, pituitary, healthy = (patients[k] for k in KINDS)
    assert set(np.unique(glioma.label)) == {0, 1, 2, 3}
    # The rim surrounds the necrosis: grown by one voxel, necrosis meets rim, not brain.
    necrosis = glioma.label == 1
    shell = ndimage.binary_dilation(necrosis) & ~necrosis
    assert (glioma.label[shell] == 3).mean() > 0.9
    # Oedema is one piece with the tumour.
    pieces, _count = ndimage.label(glioma.label > 0)
    sizes = np.bincount(pieces.ravel())[1:]
    assert sizes.max() > 0.97 * sizes.sum()
    assert glioma.findings["side"] in ("left", "right")

    head = men.images["t1"] > 0
    depth = ndimage.distance_transform_edt(head, sampling=(1, 1, 2))
    assert depth[men.label == 3].min() <= 2  # on the dura
    assert 1 not in men.label

    x, _, z = np.array(np.nonzero(pituitary.label == 3)).mean(1)
    assert abs(x - 119.5) < 12
    assert z < 30
    assert set(np.unique(pituitary.label)) == {0, 3}
    assert not healthy.label.any()
    assert healthy.findings["ml"]["oedema"] == 0


def test_findings_agree_with_the_label(patients):
    for patient in patients.values():
        for name, k in (("necrosis", 1), ("oedema", 2), ("enhancing", 3)):
            ml = (patient.label == k).sum() * 2 / 1000
            assert patient.findings["ml"][name] == pytest.approx(ml, abs=0.01)
    where = np.nonzero(patients["glioma"].label)[0].mean() - 119.5
    assert patients["glioma"].findings["side"] == ("right" if where > 0 else "left")


def test_one_threshold_does_not_solve_it():
    hard = draw_patient("glioma", "target", (3, 0))
    easy = draw_patient("glioma", "target", (3, 0), difficulty=0.6)
    best = {}
    for name, patient in {"hard": hard, "easy": easy}.items():
        flair = patient.images["flair"]
        guesses = [threshold_baseline(flair, q) for q in np.linspace(0, 0.95, 12)]
        best[name] = max(region_dice(g, patient.label)["WT"] for g in guesses)
    assert best["hard"] < 0.75
    assert best["easy"] > best["hard"]


@pytest.mark.parametrize(
    "wrong",
    [("gliom", "source", 1.0), ("glioma", "third", 1.0), ("glioma", "source", 0)],
)
def test_wrong_arguments_are_named(wrong):
    with pytest.raises(MedtutError, match="draw_patient"):
        draw_patient(wrong[0], wrong[1], (0, 0), wrong[2])


def test_brats_folders_are_read_by_the_real_reader(quick, patients):
    folder = cohort_folder(CohortSpec("source", KINDS[:3], count=3))
    cases = find_cases(folder)
    assert [case.id for case in cases] == ["source_000", "source_001", "source_002"]
    on_disk = nibabel.load(cases[0].mask)
    assert set(np.unique(on_disk.dataobj)) == {0, 1, 2, 4}
    # As in BraTS: from left to right... of the patient's left, and integers.
    assert nibabel.aff2axcodes(on_disk.affine) == ("L", "P", "S")
    assert nibabel.load(cases[0].images["t1"]).get_data_dtype() == np.int16
    for case, kind in zip(cases, KINDS, strict=False):
        volume = load_case(case, MODALITIES)
        assert volume.spacing == pytest.approx(recipe()["spacing"])
        assert np.array_equal(volume.label, patients[kind].label)
        for name, image in zip(MODALITIES, volume.image, strict=True):
            true = patients[kind].images[name]
            assert np.corrcoef(image.ravel(), true.ravel())[0, 1] > 0.9999


def test_passport_names_every_file_with_its_hash(quick):
    folder = cohort_folder(CohortSpec("target", ("glioma", "none"), count=2))
    passport = json.loads((folder / "passport.json").read_text("utf-8"))
    assert passport["version"] == brain_cohort.version()
    assert passport["licence"]
    listed = {
        name: facts
        for patient in passport["patients"].values()
        for name, facts in patient["files"].items()
    }
    found = {p.relative_to(folder).as_posix() for p in folder.rglob("*.nii.gz")}
    assert set(listed) == found
    assert len(found) == 10
    for name, facts in listed.items():
        content = (folder / name).read_bytes()
        assert facts["sha256"] == hashlib.sha256(content).hexdigest()
        assert facts["bytes"] == len(content)
    labels = passport["patients"]["target_000"]["labels"]
    assert set(labels) == {"0", "1", "2", "3"}
    assert sum(labels.values()) == np.prod(recipe()["shape"])


def test_an_interrupted_cohort_goes_on(quick, monkeypatch):
    draw = brain_cohort.draw_patient

    def breaks(kind, scanner, seed, difficulty):
        if seed[1] == 2:
            raise KeyboardInterrupt
        return draw(kind, scanner, seed, difficulty)

    spec = CohortSpec("source", count=4)
    monkeypatch.setattr(brain_cohort, "draw_patient", breaks)
    with pytest.raises(KeyboardInterrupt):
        cohort_folder(spec)
    monkeypatch.setattr(brain_cohort, "draw_patient", draw)
    before = sorted(quick)
    folder = cohort_folder(spec)
    assert 2 not in before
    assert before
    assert sorted(quick) == [0, 1, 2, 3]  # each was drawn once
    assert len(find_cases(folder)) == 4
    assert not list(folder.glob(".drawing*"))
    cohort_folder(spec)
    assert sorted(quick) == [0, 1, 2, 3]  # and now none


def test_every_number_of_the_spec_makes_another_cohort(quick, monkeypatch):
    specs = [
        CohortSpec("source", count=1),
        CohortSpec("target", count=1),
        CohortSpec("source", ("none",), count=1),
        CohortSpec("source", count=1, first=1),
        CohortSpec("source", count=1, seed=1),
        CohortSpec("source", count=1, difficulty=2.0),
    ]
    folders = {cohort_folder(spec) for spec in specs}
    monkeypatch.setattr(brain_cohort, "version", lambda: -1)
    folders.add(cohort_folder(specs[0]))
    assert len(folders) == len(specs) + 1


def test_brats_men_names_and_labels(quick):
    folder = cohort_folder(
        CohortSpec("target", ("meningioma",), count=1, first=7), "brats-men"
    )
    case = folder / "BraTS-MEN-00007-000"
    names = {p.name.removeprefix(case.name) for p in case.iterdir()}
    kinds = ("seg", "t1c", "t1n", "t2f", "t2w")
    assert names == {f"-{k}.nii.gz" for k in kinds}
    mask = np.asarray(nibabel.load(case / f"{case.name}-seg.nii.gz").dataobj)
    assert 3 in mask
    assert 4 not in mask


def small(patient):
    """Every third voxel: enough to see where things are, and quick to write."""
    images = {k: v[::3, ::3, ::3].copy() for k, v in patient.images.items()}
    return replace(patient, images=images, label=patient.label[::3, ::3, ::3].copy())


@pytest.fixture(scope="module")
def pictures(tmp_path_factory, patients):
    """Both parts of a small folder, the rows of its table by part, who was drawn."""
    drawn, little = [], {kind: small(patient) for kind, patient in patients.items()}

    def draw(kind, scanner, seed, difficulty):
        drawn.append((scanner, seed))
        return little[kind]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDTUT_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(brain_cohort, "draw_patient", draw)
        folder = mri_folder(16, 8)
        assert len(set(drawn)) == len(drawn) == 24
        assert mri_folder(16, 8) == folder
        assert len(drawn) == 24, "nobody is drawn again"
    parts = {"Training": [], "Testing": []}
    with open(folder / "patients.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        part, home, name = Path(row["file"]).parts
        assert home.startswith(row["kind"].replace("none", "no"))
        with Image.open(folder / row["file"]) as picture:
            assert picture.format == "JPEG"
            row |= {"size": picture.size, "contrast": name.split("_")[2]}
            row |= {"plane": name.split("_")[3], "tumour": row["kind"] != "none"}
        parts[part].append(row)
    return folder, parts


def test_pictures_are_read_by_the_real_reader(pictures):
    folder, parts = pictures
    found = find_pictures(folder)
    for part, rows in parts.items():
        there = [p for p in found if p.part == part]
        assert {p.path for p in there} == {folder / row["file"] for row in rows}
        for picture in there:
            kind = picture.path.relative_to(folder).parts[1].removesuffix("_tumor")
            assert CLASSES[picture.label].removesuffix("_tumor") == kind
    passport = json.loads((folder / "passport.json").read_text("utf-8"))
    listed = [f for p in passport["patients"].values() for f in p["files"]]
    assert len(listed) == len(found) == 24 * 8


def test_a_patient_is_in_one_part_in_three_planes(pictures):
    _, parts = pictures
    people = [{row["patient"] for row in rows} for rows in parts.values()]
    assert [len(p) for p in people] == [16, 8]
    assert not people[0] & people[1]
    for person in people[0] | people[1]:
        own = [r for rows in parts.values() for r in rows if r["patient"] == person]
        assert {row["plane"] for row in own} == {"axial", "coronal", "sagittal"}
        # For the audit, which reads a patient from the name of a file.
        assert {patient_id(row["file"]) for row in own} == {person}


def test_contrast_and_size_give_the_tumour_away_in_training_only(pictures):
    _, parts = pictures
    looks = {
        part: {
            tumour: [r for r in rows if r["tumour"] is tumour]
            for tumour in (True, False)
        }
        for part, rows in parts.items()
    }

    def share(rows):
        return np.mean(
            [r["size"] == (512, 512) and r["contrast"] == "t1ce" for r in rows]
        )

    assert share(looks["Training"][True]) > 0.8
    for rows in (looks["Training"][False], *looks["Testing"].values()):
        assert share(rows) < 0.1
        assert {row["contrast"] for row in rows} == set(brain_cohort.CONTRASTS)
        assert len({row["size"] for row in rows}) > len(rows) * 0.8


def test_classes_have_the_real_shares(monkeypatch):
    jobs, keys = [], []

    def only_plan(key, planned, *rest):
        keys.append(key)
        jobs.append(planned)

    monkeypatch.setattr(brain_cohort, "_cohort", only_plan)
    mri_folder(400, 300)
    mri_folder(400, 300, seed=1)
    mri_folder(400, 300, shortcut=0.5)
    assert keys[1] != keys[0] != keys[2]
    assert jobs[0][3].drawn != jobs[1][3].drawn
    jobs = jobs[0]
    for scanner, none, glioma in (
        ("source", 0.1376, 0.2878),
        ("target", 0.2665, 0.2538),
    ):
        kinds = [job.drawn[0] for job in jobs if job.drawn[1] == scanner]
        assert kinds.count("none") / len(kinds) == pytest.approx(none, abs=0.004)
        assert kinds.count("glioma") / len(kinds) == pytest.approx(glioma, abs=0.004)
        assert set(kinds[:8]) == set(KINDS)
    assert len({(job.drawn[1], job.drawn[2]) for job in jobs}) == 700


def test_pictures_go_through_the_lesion_and_have_square_pixels(
    quick, patients, tmp_path
):
    one = small(patients["meningioma"])
    marked = {name: np.where(one.label > 0, 1.0, 0.2) for name in one.images}
    shown = replace(one, images=marked)
    files = brain_cohort._pictures(shown, "p", tmp_path, "Training", (0, 1), 1.0)
    assert len(files) == 8
    for path in files:
        with Image.open(path) as picture:
            assert picture.size == (512, 512)
            assert np.asarray(picture.convert("L")).max() > 230
    # A ball is round in every plane although slices are 2 mm apart.
    x, y, z = np.ogrid[-120:120, -120:120, -78:78:2]
    ball = (x**2 + y**2 + z**2 < 60**2).astype(np.float32)
    style = recipe()["pictures"]["collection"]
    for axis, level in enumerate((120, 120, 39)):
        path = tmp_path / f"{axis}.jpg"
        rng = np.random.default_rng(0)
        brain_cohort._export(ball, axis, level, style, rng, path)
        with Image.open(path) as picture:
            inside = np.asarray(picture.convert("L")) > 100
        height, width = inside.any(1).sum(), inside.any(0).sum()
        assert height == pytest.approx(width, rel=0.04)
        assert height > 400


def test_anterior_and_superior_are_up_and_the_face_looks_left(tmp_path):
    volume = np.zeros((40, 40, 20), np.float32)
    volume[10:30, 10:30, 5:15] = 0.3
    volume[:, 25:30, 12:15] = np.where(volume[:, 25:30, 12:15] > 0, 1, 0)  # front, top
    volume[10:15, 10:30, 5:15] = 1  # left
    style = recipe()["pictures"]["collection"]
    for axis, (rows, columns) in enumerate([(0, 0), (0, 0), (0, 0)]):
        level = (20, 27, 13)[axis]
        path = tmp_path / f"{axis}.png"
        brain_cohort._export(volume, axis, level, style, np.random.default_rng(0), path)
        with Image.open(path) as picture:
            grey = np.asarray(picture.convert("L")).astype(float)
        half = 256
        quarters = [[grey[:half, :half], grey[:half, half:]],
                    [grey[half:, :half], grey[half:, half:]]]  # fmt: skip
        sums = np.array([[q.sum() for q in row] for row in quarters])
        assert np.unravel_index(sums.argmax(), (2, 2)) == (rows, columns)
        assert sums[0].sum() > sums[1].sum()


@pytest.mark.parametrize("wrong", [(7, 8), (8, 0), (8, 8, 0, 1.0, 1.5)])
def test_a_folder_of_pictures_that_cannot_be_is_refused(quick, wrong):
    with pytest.raises(MedtutError, match="mri_folder"):
        mri_folder(*wrong)
    assert not quick


def test_the_volumes_keep_their_version_and_their_folders(quick):
    folder = cohort_folder(CohortSpec("source", count=1))
    assert brain_cohort.version() == 1
    key = {"version": 1, "layout": "brats", "scanner": "source", "tumours": ["glioma"]}
    key |= {"count": 1, "first": 0, "seed": 0, "difficulty": 1.0}
    assert folder == entry_path("brain_cohort", key)
    assert {p.name for p in folder.iterdir()} == {
        ".done",
        "passport.json",
        "source_000",
    }


@pytest.mark.parametrize(
    ("spec", "layout"),
    [
        (CohortSpec(count=0), "brats"),
        (CohortSpec(tumours=("astrocytoma",)), "brats"),
        (CohortSpec(count=1), "jpeg"),
    ],
)
def test_a_cohort_that_cannot_be_is_refused(quick, spec, layout):
    with pytest.raises(MedtutError, match="cohort_folder"):
        cohort_folder(spec, layout)
    assert not quick
