"""Drawn abdomens: what a patient is, and how a cohort lies on disk.

Without the two real CTs (the chests) nobody can be drawn; what needs a drawn patient is
skipped then, the rest runs on patients made of boxes.
"""

import csv
import hashlib
import json
from dataclasses import replace

import nibabel
import numpy as np
import pytest

from medtut.data import abdomen_cohort
from medtut.data.abdomen_anatomy import (
    ANGLES,
    DRAWN,
    Frame,
    blend,
    look_polar,
    noise,
    outline,
    polar,
    recipe,
    superellipse,
)
from medtut.data.abdomen_cohort import (
    AbdomenSpec,
    abdomen_folder,
    annotated_by,
    source_hospitals,
)
from medtut.data.abdomen_patient import AbdomenPatient, draw_abdomen
from medtut.data.assets import AssetError
from medtut.data.organ_records import find_cases
from medtut.data.organs import BASE, NOVEL, STRUCTURES
from medtut.data.totalseg import read_labels
from medtut.errors import MedtutError


@pytest.fixture(scope="module")
def crowd():
    """12 patients with everything in the scan, hospitals in turn."""
    hospitals = list(recipe()["hospitals"])
    try:
        return [
            draw_abdomen(f"lung{1 + n % 2}", hospitals[n % 4], (5, n), 1.0, "trunk")
            for n in range(12)
        ]
    except AssetError as error:
        pytest.skip(f"the real CTs are not here: {error}")


def code(name):
    return DRAWN.index(name) + 1


# -- a patient -------------------------------------------------------------------------
def test_volumes_are_those_of_adults(crowd):
    for name, (low, high) in recipe()["volumes"].items():
        for p in crowd:
            ml = (p.labels == code(name)).sum() * p.spacing.prod() / 1000
            if name == "gallbladder" and p.facts["resected"]:
                assert ml == 0
            else:
                assert low <= ml <= high, (name, round(ml), p.facts)
    assert any(p.facts["resected"] for p in crowd)


def test_the_aorta_is_as_wide_as_published(crowd):
    low, high = recipe()["aorta_mm"]
    for p in crowd:
        aorta = p.labels == code("aorta")
        kidney = np.isin(p.labels, [code("kidney_left"), code("kidney_right")])
        levels = np.flatnonzero(kidney.any((0, 1)))
        area = aorta[..., levels].sum((0, 1)) * p.spacing[:2].prod()
        wide = 2 * np.sqrt(np.median(area) / np.pi)
        assert low <= wide <= high, (wide, p.facts)


def test_everything_is_in_a_scan_of_the_trunk(crowd):
    for p in crowd:
        there = set(np.unique(p.labels)) - {0}
        lost = {DRAWN[k - 1] for k in set(range(1, len(DRAWN) + 1)) - there}
        assert lost <= ({"gallbladder"} if p.facts["resected"] else set())
    for name in (*BASE, *NOVEL):
        sizes = [(p.labels == code(name)).sum() for p in crowd]
        assert np.median(sizes) > 60, name


def test_organs_have_their_places_and_neighbours(crowd):
    for p in crowd:
        middle = {}
        for name in DRAWN:
            at = np.argwhere(p.labels == code(name))
            if len(at):
                middle[name] = at.mean(0) * p.spacing
        x, y, z = ({k: v[a] for k, v in middle.items()} for a in range(3))
        right = [n for n in middle if n.endswith("_right") and "atrium" not in n
                 and "ventricle" not in n]  # fmt: skip
        for name in right:  # RAS: towards the patient's right x grows less
            left = name.replace("_right", "_left")
            if left in middle:
                assert abs(x[name] - x[left]) > 10, name
        side = np.sign(x["liver"] - x["spleen"])
        for name in right:
            left = name.replace("_right", "_left")
            if left in middle:
                assert np.sign(x[name] - x[left]) == side, name
        assert side * (x["inferior_vena_cava"] - x["aorta"]) > 0
        assert y["pancreas"] > y["aorta"] > y["kidney_left"]
        assert y["stomach"] > y["spleen"]
        assert z["heart_ventricle_left"] > z["spleen"] > z["urinary_bladder"]
        assert z["lung_upper_lobe_left"] > z["lung_lower_lobe_left"]
        assert z["liver"] > z["duodenum"] > z["gluteus_medius_left"]
        assert y["heart_ventricle_right"] > y["heart_atrium_left"]
        for side_ in ("left", "right"):  # from deep to the skin
            deep = y[f"gluteus_minimus_{side_}"]
            assert deep > y[f"gluteus_medius_{side_}"] > y[f"gluteus_maximus_{side_}"]


def test_an_organ_is_one_piece(crowd):
    from scipy import ndimage

    for p in crowd[:4]:
        for name in ("liver", "spleen", "kidney_left", "pancreas", "stomach"):
            found, _ = ndimage.label(p.labels == code(name), np.ones((3, 3, 3)))
            sizes = np.bincount(found.ravel())[1:]
            assert sizes.max() > 0.9 * sizes.sum(), name


def test_the_agent_comes_through_arteries_then_organs(crowd):
    seen = {}
    for p in crowd:
        for name in ("aorta", "liver", "spleen", "kidney_left", "gallbladder"):
            inside = p.hu[p.labels == code(name)]
            if inside.size:
                seen.setdefault((name, p.facts["phase"]), []).append(np.median(inside))
    found = {k: np.mean(v) for k, v in seen.items()}
    assert {k[1] for k in found} == {"native", "arterial", "venous"}
    assert found["aorta", "arterial"] > found["aorta", "venous"] > 100
    assert 25 < found["aorta", "native"] < 60
    assert found["liver", "venous"] > found["liver", "native"] + 25
    assert found["liver", "venous"] > found["liver", "arterial"] + 15
    assert found["spleen", "arterial"] > 80
    assert all(-10 < found["gallbladder", k] < 45 for k in ("native", "venous"))


def best_thresholds(hu, labels):
    """By label, the largest Dice of "denser" or "less dense than", and of any range."""
    bins = ((np.clip(hu, -1024, 1900) + 1024) // 16).astype(int).ravel()
    count = bins.max() + 1
    every = np.bincount(labels.ravel() * count + bins).astype(float)
    every = np.pad(every, (0, -len(every) % count)).reshape(-1, count)
    sums = np.pad(np.cumsum(every, 1), ((0, 0), (1, 0)))
    whole, found = sums.sum(0), {}
    for k in np.flatnonzero(sums[:, -1])[1:]:
        hit, all_ = (s[None] - s[:, None] for s in (sums[k], whole))
        dice = np.triu(2 * hit / np.maximum(all_ + sums[k, -1], 1))
        found[int(k)] = max(dice[0].max(), dice[:, -1].max()), dice.max()
    return found


def test_no_density_separates_a_structure(crowd):
    widest = 0
    for p in crowd:
        body = p.hu > -1010  # whoever knows the body knows more
        for k, (one, two) in best_thresholds(p.hu[body], p.labels[body]).items():
            assert one < 0.6, (DRAWN[k - 1], one, p.facts)
            widest = max(widest, two)
    # Not even a range of HU chosen for the patient, of which the liver is the easiest.
    assert widest < 0.8
    # The measure can see one: a structure of its own density, above all or between.
    mask = (p.labels == code("liver")).astype(np.uint8)
    assert best_thresholds(np.where(mask, 300.0, 40.0), mask)[1][0] > 0.99
    between = np.where(mask, 90, np.where(p.labels > 8, 300, 0))
    one, two = best_thresholds(between, mask)[1]
    assert one < 0.6 < 0.99 < two


def test_a_patient_is_determined_by_the_numbers(crowd):
    one = draw_abdomen("lung1", "riverside", (5, 0), 1.0, "abdomen")
    again = draw_abdomen("lung1", "riverside", (5, 0), 1.0, "abdomen")
    assert np.array_equal(one.hu, again.hu)
    assert np.array_equal(one.labels, again.labels)
    assert one.facts == again.facts
    other = draw_abdomen("lung1", "riverside", (5, 1), 1.0, "abdomen")
    assert one.hu.shape != other.hu.shape or (one.hu != other.hu).mean() > 0.3
    assert one.labels[..., -1].max() > 0
    assert not (one.labels == code("gluteus_maximus_left")).any()  # not in the scan


def test_difficulty_makes_organs_alike_and_noise_stronger(crowd):
    def seen(hard):
        p = draw_abdomen("lung2", "hillcrest", (5, 1), hard, "abdomen")
        liver, spleen = (p.labels == code(k) for k in ("liver", "spleen"))
        steps = np.diff(p.hu, axis=0)[liver[1:] & liver[:-1]]
        return abs(np.median(p.hu[liver]) - np.median(p.hu[spleen])), steps.std()

    (far, faint), (near, loud) = seen(1.0), seen(3.0)
    assert near < 0.8 * far
    assert loud > 2 * faint


# -- shapes ----------------------------------------------------------------------------
def plain_frame(n=40, step=2.0):
    side = (np.arange(n) - (n - 1) / 2) * step
    return Frame(np.stack(np.meshgrid(side, side, side, indexing="ij")).astype("f4"),
                 [side] * 3)  # fmt: skip


def test_a_tube_and_a_ball_have_their_volumes():
    frame = plain_frame()
    everywhere = (slice(None),) * 3
    _, far = frame.tube([[-20, 0, 0, 8], [20, 0, 0, 8]], everywhere)
    wanted = np.pi * 8**2 * 40 + 4 / 3 * np.pi * 8**3
    assert (far < 0).sum() * 8 == pytest.approx(wanted, rel=0.05)
    assert far[20, 20, 20] == pytest.approx(np.hypot(1, 1) - 8, abs=0.1)
    box, far = frame.balls([[3, -2, 1, 20, 12, 9]])
    assert (far < 0).sum() * 8 == pytest.approx(4 / 3 * np.pi * 20 * 12 * 9, rel=0.05)
    # A box holds the whole: the same as everywhere.
    _, all_of_it = frame.balls([[3, -2, 1, 20, 12, 9]], everywhere)
    assert (all_of_it < 0).sum() == (far < 0).sum()
    assert np.array_equal(all_of_it[box], far)


def test_blend_is_the_smaller_far_from_where_they_meet():
    a, b = np.array([-9.0, 0.0, 9.0]), np.array([9.0, 0.0, -9.0])
    mixed = blend(a, b, 4.0)
    assert mixed[0] == -9
    assert mixed[2] == -9
    assert mixed[1] == -1  # a quarter of the width deeper


def test_outline_goes_over_into_the_hips():
    class Chest:
        outline = np.full(ANGLES, 140.0)

    rows = recipe()["trunk"]
    skin = outline(Chest, np.array([-70.0, -440.0]), 1.0, 0.0)
    assert np.allclose(skin[0], 140)
    assert skin[1, 0] == pytest.approx(rows[-1][2])  # to the right
    assert skin[1, ANGLES // 4] == pytest.approx(rows[-1][3])  # to the front
    assert skin[1, 3 * ANGLES // 4] == pytest.approx(rows[-1][4])
    fat = outline(Chest, np.array([-70.0, -440.0]), 1.0, 9.0)
    assert np.allclose(fat - skin, [[0], [9]])
    far, angle = polar(np.array([[0.0], [50.0], [0.0]]), 20.0)
    assert far[0] == 30
    assert angle[0] == ANGLES / 4
    table = np.arange(2.0 * ANGLES).reshape(2, ANGLES)
    between = look_polar(table, np.array([0.5]), np.array([ANGLES - 0.5]))
    assert between[0] == pytest.approx((ANGLES - 1) / 2 + ANGLES / 2)  # goes round
    assert superellipse(np.zeros(1), [3, 1, 1, 2.0])[0] == 3


def test_noise_has_unit_variance_and_its_period():
    rng = np.random.default_rng(0)
    for period in (9, 40):
        field = noise(rng, (64, 64, 64), np.array([4.0, 4, 4]), period)
        assert 0.4 < field.std() < 1.2
        assert abs(field.mean()) < 0.3
        step = int(period / 4)
        near = np.corrcoef(field[:-1].ravel(), field[1:].ravel())[0, 1]
        away = np.corrcoef(field[: -4 * step].ravel(), field[4 * step :].ravel())[0, 1]
        assert near > abs(away) + 0.15


# -- hospitals -------------------------------------------------------------------------
def test_hospitals_are_partial_and_the_target_is_whole():
    sources = source_hospitals()
    assert len(sources) >= 3
    every = set()
    for name in sources:
        mine = set(annotated_by(name))
        assert mine < set(STRUCTURES)
        assert not mine & set(NOVEL)
        assert not set(BASE) <= mine
        every |= mine
    assert set(BASE) <= every
    assert annotated_by("target") == DRAWN
    assert set(BASE) | set(NOVEL) <= set(DRAWN)
    target = recipe()["hospitals"]["target"]
    for name in sources:
        source = recipe()["hospitals"][name]
        assert target["spacing"][2] > source["spacing"][2]
        assert target["noise"][0] >= source["noise"][1] * 0.9
        assert target["size"] > source["size"]
        assert target["blur"] > source["blur"]


# -- on disk ---------------------------------------------------------------------------
def boxes(number, spacing=(4.5, 4.5, 6.0)):
    """A patient of which every structure is a different row of voxels."""
    rng = np.random.default_rng(number)
    labels = np.zeros((40, 12, 10), np.uint8)
    for k in range(1, len(DRAWN) + 1):
        labels[k, 2:9, 3:6] = k
    hu = rng.integers(-1000, 1000, labels.shape).astype(np.float32)
    facts = {
        "hospital": "target", "phase": "venous", "field": "trunk", "sex": "female",
        "cyst": "", "resected": False,
    }  # fmt: skip
    return AbdomenPatient(hu, labels, facts, np.array(spacing))


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """An empty cache, and patients that need no drawing; lists whom it drew."""
    monkeypatch.setenv("MEDTUT_CACHE", str(tmp_path))
    drawn = []

    def draw(body, hospital, seed, difficulty, field):
        drawn.append((body, hospital, seed, difficulty, field))
        return boxes(seed[1])

    monkeypatch.setattr(abdomen_cohort, "draw_abdomen", draw)
    monkeypatch.setattr(abdomen_cohort, "load_trunk", lambda name: None)
    return drawn


def test_the_layout_is_totalsegmentators(quick):
    root = abdomen_folder(AbdomenSpec("target", 3, first=2))
    names = ["s0003", "s0004", "s0005"]
    assert sorted(p.name for p in root.glob("s*")) == names
    with open(root / "meta.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter=";"))
    assert [r["image_id"] for r in rows] == names
    passport = json.loads((root / "passport.json").read_text("utf-8"))
    assert list(passport["patients"]) == names
    for n, name in enumerate(names, start=2):
        patient, folder = boxes(n), root / name
        image = nibabel.load(folder / "ct.nii.gz")
        assert image.get_data_dtype() == np.int16
        assert np.allclose(image.header.get_zooms(), patient.spacing)
        turned = nibabel.as_closest_canonical(image)
        assert np.array_equal(turned.get_fdata(), patient.hu)
        there = {p.name.removesuffix(".nii.gz") for p in
                 (folder / "segmentations").iterdir()}  # fmt: skip
        assert there == set(DRAWN)
        for structure in ("liver", "gluteus_minimus_left"):
            file = nibabel.load(folder / "segmentations" / f"{structure}.nii.gz")
            assert file.get_data_dtype() == np.uint8
            assert np.allclose(file.affine, image.affine)
            mask = np.asarray(nibabel.as_closest_canonical(file).dataobj)
            assert np.array_equal(mask, patient.labels == code(structure))
        content = (folder / "ct.nii.gz").read_bytes()
        facts = passport["patients"][name]
        assert hashlib.sha256(content).hexdigest() == facts["sha256"]
        assert facts["ml"]["liver"] == pytest.approx(21 * 4.5 * 4.5 * 6 / 1000, abs=0.1)


@pytest.mark.parametrize("hospital", source_hospitals())
def test_the_reader_of_the_set_sees_what_is_annotated(quick, hospital):
    spec = AbdomenSpec(hospital, 2)
    records = find_cases(abdomen_folder(spec))
    assert len(records) == 2
    for n, record in enumerate(records):
        assert set(record.annotated) == set(annotated_by(hospital))
        masks = read_labels(record, STRUCTURES, partial=True)
        turn = nibabel.io_orientation(nibabel.load(record.image).affine)
        for name, mask in zip(STRUCTURES, masks, strict=True):
            whole = (
                boxes(n).labels == code(name) if name in annotated_by(hospital) else 0
            )
            assert np.array_equal(
                nibabel.apply_orientation(mask, turn), whole + 0 * mask
            )
    more = find_cases(abdomen_folder(replace(spec, annotated=("liver", "aorta"))))
    assert set(more[0].annotated) == {"liver", "aorta"}


def test_an_interrupted_cohort_goes_on(quick, monkeypatch):
    spec, draw = AbdomenSpec("target", 6), abdomen_cohort.draw_abdomen

    def stop(body, hospital, seed, *rest):
        if seed[1] == 3:
            raise KeyboardInterrupt
        return draw(body, hospital, seed, *rest)

    monkeypatch.setattr(abdomen_cohort, "draw_abdomen", stop)
    with pytest.raises(KeyboardInterrupt):
        abdomen_folder(spec)
    monkeypatch.setattr(abdomen_cohort, "draw_abdomen", draw)
    root = abdomen_folder(spec)
    assert len(quick) == len({one[2] for one in quick}) == 6  # nobody twice
    assert {one[2][1] % 2: one[0] for one in quick} == {0: "lung1", 1: "lung2"}
    assert len(find_cases(root)) == 6
    assert not list(root.rglob(".making-*"))
    quick.clear()
    assert abdomen_folder(spec) == root
    assert not quick
    for other in ({"seed": 1}, {"difficulty": 2.0}, {"field": "trunk"}):
        assert abdomen_folder(replace(spec, count=1, **other)) != root
    assert {one[3:] for one in quick} == {(1.0, ""), (2.0, ""), (1.0, "trunk")}


def test_a_patient_cut_off_while_written_leaves_nothing(quick, monkeypatch):
    image, calls = abdomen_cohort._image, []

    def full_disk(*args):
        calls.append(1)
        if len(calls) == 5:
            raise OSError("no space")
        return image(*args)

    monkeypatch.setattr(abdomen_cohort, "_image", full_disk)
    with pytest.raises(OSError, match="no space"):
        abdomen_folder(AbdomenSpec("target", 1))
    monkeypatch.setattr(abdomen_cohort, "_image", image)
    root = abdomen_folder(AbdomenSpec("target", 1))
    assert len(list((root / "s0001" / "segmentations").iterdir())) == len(DRAWN)
    assert not list(root.rglob(".making-*"))


@pytest.mark.parametrize(
    "wrong",
    [{"hospital": "x"}, {"count": 0}, {"first": -1}, {"difficulty": 0.0},
     {"field": "leg"}, {"annotated": ("tail",)}],
)  # fmt: skip
def test_what_cannot_be_drawn_is_refused(quick, wrong):
    with pytest.raises(MedtutError, match="abdomen_folder"):
        abdomen_folder(AbdomenSpec(**wrong))
    assert not quick
