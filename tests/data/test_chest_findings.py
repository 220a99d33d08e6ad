"""The drawn chests: every finding in its organ, in its range, and on its own."""

import numpy as np
import pytest
from scipy import ndimage

from medtut.data.assets import AssetError
from medtut.data.chest_anatomy import LABELS, load_body, recipe
from medtut.data.chest_findings import draw_patient, sample_findings
from medtut.data.ct_rate import FINDINGS
from medtut.errors import MedtutError

SEED = (11, 4)
LUNG = list(range(1, 6))
THIN = ("Pulmonary fibrotic sequela", "Pleural effusion")  # may be all at the pleura


def only(*names):
    """Prevalences that make a patient have these findings and no other."""
    return {f: float(f in names) for f in FINDINGS}


@pytest.fixture(scope="module")
def healthy():
    try:
        return draw_patient("lung1", "source", SEED, prevalence=only())
    except AssetError as error:
        pytest.skip(f"the real CTs are not here: {error}")


@pytest.fixture(scope="module")
def alone(healthy):
    """The same person with one finding each."""
    return {
        f: draw_patient("lung1", "source", SEED, prevalence=only(f)) for f in FINDINGS
    }


def test_the_recipe_has_the_findings_of_the_set_in_its_order():
    assert tuple(recipe()["findings"]) == FINDINGS


def test_the_same_patient_every_time_and_nobody_twice(healthy):
    again = draw_patient("lung1", "source", SEED, prevalence=only())
    assert np.array_equal(again.hu, healthy.hu)
    assert again.facts == healthy.facts
    others = (("lung1", "source", (11, 5)), ("lung1", "source", (12, 4)),
              ("lung1", "target", SEED), ("lung2", "source", SEED))  # fmt: skip
    for other in others:
        one = draw_patient(*other, prevalence=only())
        # Another person, not only another noise: the bodies do not coincide.
        assert (one.labels == healthy.labels).mean() < 0.97


def test_a_chest_in_hounsfield_units(healthy):
    assert healthy.hu.shape == tuple(recipe()["shape"]) == healthy.labels.shape
    assert healthy.hu.dtype == np.float32
    assert np.array_equal(healthy.hu, np.rint(healthy.hu))
    assert healthy.hu.min() >= -1024
    assert healthy.hu.max() <= 3071
    inside = {k: healthy.hu[healthy.labels == v] for k, v in LABELS.items()}
    lungs = healthy.hu[np.isin(healthy.labels, LUNG)]
    litres = lungs.size * np.prod(healthy.spacing) / 1e6
    assert 2 < litres < 8  # of an adult, breathed in
    assert -930 < np.median(lungs) < -740
    assert 0 < np.median(inside["heart"]) < 300
    assert np.median(inside["fat"]) < -40
    assert np.median(inside["bone"]) > 130
    assert not healthy.findings
    # x to the right: the liver is there, y to the front: the spine is not.
    x, y, _ = np.argwhere(healthy.labels == LABELS["heart"]).mean(0)
    assert x < 47.5
    assert y > np.argwhere(healthy.labels == LABELS["bone"])[:, 1].mean()


@pytest.mark.parametrize("finding", FINDINGS)
def test_a_finding_changes_the_volume_where_its_mask_is(alone, healthy, finding):
    patient = alone[finding]
    assert list(patient.findings) == [finding] == list(patient.masks)
    mask, drawn = patient.masks[finding], patient.findings[finding]
    assert drawn.voxels == mask.sum() > 0
    assert 0 <= drawn.severity <= 1
    change = np.abs(patient.hu - healthy.hu)
    if finding == "Cardiomegaly":  # moves the whole neighbourhood
        assert change[mask].mean() > 3 * change[~mask].mean()
        grown = mask.sum() / (healthy.labels == LABELS["heart"]).sum()
        assert grown > 1.1
        assert patient.facts["ratio"] > 0.5 >= healthy.facts["ratio"]
    else:
        assert change[mask].mean() > 15
        assert change[mask].mean() > 10 * change[~mask].mean()


# Quantile of HU inside the mask, and the range it must fall into. What is thinner than
# a voxel of 3.6 x 3.6 x 6 mm shows a part of its density.
DENSITY = {
    "Medical material": (1.0, 500, 3071),
    "Arterial wall calcification": (1.0, 130, 1300),
    "Cardiomegaly": (0.5, 20, 260),
    "Pericardial effusion": (0.5, -40, 45),
    "Coronary artery wall calcification": (1.0, 130, 1200),
    "Hiatal hernia": (0.8, -30, 80),
    "Lymphadenopathy": (0.8, -20, 90),
    "Emphysema": (0.3, -1010, -900),
    "Atelectasis": (0.9, -250, 90),
    "Lung nodule": (1.0, -500, 90),
    "Lung opacity": (0.5, -800, -350),
    "Pulmonary fibrotic sequela": (0.9, -500, 80),
    "Pleural effusion": (0.8, -20, 45),
    "Mosaic attenuation pattern": (0.5, -950, -700),
    "Peribronchial thickening": (0.9, -700, 100),
    "Consolidation": (0.8, -20, 90),
    "Bronchiectasis": (0.1, -1000, -750),
    "Interlobular septal thickening": (0.9, -750, 20),
}


@pytest.mark.parametrize("finding", FINDINGS)
def test_density_is_in_its_range(alone, finding):
    share, low, high = DENSITY[finding]
    inside = alone[finding].hu[alone[finding].masks[finding]]
    assert low <= np.quantile(inside, share) <= high


WHERE = {
    "Arterial wall calcification": {8, 10, 12, 13, 9, 11, 7, *LUNG},
    "Cardiomegaly": {7},
    "Hiatal hernia": {10, 11, 12, 13, 14, *LUNG},
    "Lymphadenopathy": {10, 12, 13, 14, 6, *LUNG},
}


@pytest.mark.parametrize("finding", FINDINGS[7:])
def test_findings_of_the_lung_are_in_the_lung(alone, finding):
    patient = alone[finding]
    inside = np.isin(patient.labels[patient.masks[finding]], LUNG)
    # A voxel at the pleura is lung in part.
    touching = ndimage.binary_dilation(np.isin(patient.labels, LUNG))
    assert touching[patient.masks[finding]].mean() > 0.97
    assert inside.mean() > (0.5 if finding in THIN else 0.8)
    lobe = patient.findings[finding].lobe
    if lobe:
        here = patient.labels[patient.masks[finding]] == LABELS[lobe]
        assert here.sum() > 0.75 * inside.sum()
    sides = {"right": range(1, 4), "left": range(4, 6)}
    if side := sides.get(patient.findings[finding].side):
        here = np.isin(patient.labels[patient.masks[finding]], side)
        assert here.sum() > 0.9 * inside.sum()


@pytest.mark.parametrize("finding", WHERE)
def test_findings_of_the_middle_are_in_the_middle(alone, healthy, finding):
    patient = alone[finding]
    assert np.isin(patient.labels[patient.masks[finding]], list(WHERE[finding])).all()
    assert abs(np.argwhere(patient.masks[finding])[:, 0].mean() - 47.5) * 3.6 < 75


def test_coronary_calcium_lies_on_the_heart_and_arterial_on_the_aorta(alone):
    for finding, organ in (
        ("Coronary artery wall calcification", "heart"),
        ("Pericardial effusion", "heart"),
        ("Arterial wall calcification", "aorta"),
    ):
        patient = alone[finding]
        away = ndimage.distance_transform_edt(
            patient.labels != LABELS[organ], sampling=patient.spacing
        )
        assert np.quantile(away[patient.masks[finding]], 0.9) < 26, finding


def test_prevalence_is_that_of_the_recipe():
    rng, count = np.random.default_rng(0), 4000
    found = [sample_findings(rng) for _ in range(count)]
    for name, how in recipe()["findings"].items():
        p = how["prevalence"]
        share = np.mean([name in f for f in found])
        assert abs(share - p) < 4 * np.sqrt(p * (1 - p) / count), name
    hard = [s for _ in range(500) for s in sample_findings(rng, 3.0).values()]
    easy = [s for f in found for s in f.values()]
    assert np.mean(hard) < 0.6 * np.mean(easy)


def test_the_bodies_have_no_calcium_or_tumour_of_their_own(healthy):
    for name in recipe()["bodies"]:
        body = load_body(name)
        middle = np.isin(body.labels, [LABELS["heart"], LABELS["aorta"]])
        assert np.quantile(body.hu[middle], 0.999) < 150
        deep = body.fields["lung"] < -15
        assert (body.hu[deep] > -100).mean() < 0.02


def test_what_is_not_there_is_refused(healthy):
    for wrong in (("lung3", "source"), ("lung1", "elsewhere")):
        with pytest.raises(MedtutError, match=r"lung1.*source"):
            draw_patient(*wrong, SEED)
    with pytest.raises(MedtutError, match="Plague"):
        draw_patient("lung1", "source", SEED, prevalence={"Plague": 1.0})
    with pytest.raises(MedtutError, match="difficulty"):
        draw_patient("lung1", "source", SEED, difficulty=0)
    with pytest.raises(MedtutError, match="lung1, lung2"):
        load_body("lung3")
