"""Reports that are written from label slices."""

import numpy as np
import pytest
from brain_reports import (
    SliceFacts,
    entities,
    entity_names,
    phrases,
    slice_facts,
    slice_report,
    write_report,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from medtut.errors import MedtutError


def disc(row, column, radius, value=3, shape=(224, 224), label=None):
    label = np.zeros(shape, np.int64) if label is None else label.copy()
    y, x = np.ogrid[: shape[0], : shape[1]]
    label[(y - row) ** 2 + (x - column) ** 2 <= radius**2] = value
    return label


def test_what_a_slice_says():
    label = disc(70, 150, 26, 2)
    label = disc(70, 150, 14, 3, label=label)
    label = disc(70, 150, 6, 1, label=label)
    assert slice_facts(label, "t1ce", "glioma", 0.5) == SliceFacts(
        "t1ce",
        "middle",
        "glioma",
        side="right",
        region="anterior",
        size="medium",
        necrosis="yes",
        solid="enhancing",
        oedema="marked",
    )


@pytest.mark.parametrize(
    ("row", "column", "side", "region"),
    [
        (60, 60, "left", "anterior"),
        (112, 160, "right", "central"),
        (170, 112, "midline", "posterior"),
    ],
)
def test_place(row, column, side, region):
    facts = slice_facts(disc(row, column, 12), "flair", "meningioma")
    assert (facts.side, facts.region) == (side, region)
    assert facts.level == ""


@pytest.mark.parametrize(
    ("radius", "size"), [(6, "small"), (13, "medium"), (25, "large")]
)
def test_size_is_in_mm(radius, size):
    assert slice_facts(disc(100, 60, radius), "t2", "glioma").size == size
    finer = disc(100, 100, 2 * radius, shape=(448, 448))
    assert slice_facts(finer, "t2", "glioma", mm=120 / 224).size == size


def test_oedema_alone_places_the_finding_and_has_no_solid_part():
    facts = slice_facts(disc(60, 60, 15, 2), "flair", "glioma")
    assert (facts.side, facts.region) == ("left", "anterior")
    assert (facts.solid, facts.necrosis, facts.oedema) == ("no", "no", "marked")
    # The tumour proper decides where it is, not the oedema around it.
    both = disc(60, 60, 30, 2, label=disc(150, 160, 5))
    assert slice_facts(both, "flair", "glioma").side == "right"


def test_enhancement_is_reported_after_contrast_agent_only():
    label = disc(100, 60, 12)
    said = {c: slice_facts(label, c, "glioma").solid for c in phrases()["contrast"]}
    assert said == {"flair": "yes", "t1": "yes", "t2": "yes", "t1ce": "enhancing"}


@pytest.mark.parametrize(
    ("label", "kind"),
    [(np.zeros((224, 224), int), "glioma"), (disc(100, 60, 12), "none")],
)
def test_a_slice_without_tumour_says_so_and_nothing_more(label, kind):
    facts = slice_facts(label, "t1", kind, 0.9)
    assert facts == SliceFacts("t1", "high", "none")
    assert entities(facts).sum() == 3


@settings(max_examples=30, deadline=None)
@given(st.integers(30, 190), st.integers(30, 190), st.integers(4, 30))
def test_mirroring_the_picture_swaps_left_and_right(row, column, radius):
    label = disc(row, column, radius)
    here = slice_facts(label, "flair", "glioma", 0.2)
    there = slice_facts(label[:, ::-1], "flair", "glioma", 0.2)
    swap = {"left": "right", "right": "left"}
    # On a boundary a side can round to either of its neighbours.
    if abs(column / 224 - 0.47) > 0.01 and abs(column / 224 - 0.53) > 0.01:
        assert there.side == swap.get(here.side, here.side)
    assert (there.region, there.size, there.level) == (here.region, here.size, "low")


def test_a_report_is_deterministic_and_says_every_fact_once():
    label = disc(100, 60, 12)
    first = slice_report(label, "t2", "glioma", np.random.default_rng(3), 0.1)
    assert first == slice_report(label, "t2", "glioma", np.random.default_rng(3), 0.1)
    facts = slice_facts(label, "t2", "glioma", 0.1)
    reports = {write_report(facts, np.random.default_rng(i)) for i in range(60)}
    assert len(reports) > 50
    meaning = {p: pair for pair in entity_names() for p in phrases()[pair[0]][pair[1]]}
    named = {p for p, e in zip(entity_names(), entities(facts), strict=True) if e}
    for report in reports:
        said = [meaning[phrase] for phrase in report.split(", ")]
        assert set(said) == named
        assert len(said) == len(named) == 9
        assert [field for field, _ in said[:2]] == ["contrast", "level"]


def test_every_phrase_means_one_thing_and_has_no_comma():
    every = [p for field, value in entity_names() for p in phrases()[field][value]]
    assert len(every) == len(set(every))
    assert not [p for p in every if "," in p or p != p.lower()]
    # Fields and values in YAML: a bare yes or no would be a bool.
    assert all(isinstance(v, str) for pair in entity_names() for v in pair)


def test_entities_are_alike_as_far_as_the_findings_are():
    here = slice_facts(disc(60, 60, 12), "t2", "glioma", 0.5)
    other_side = slice_facts(disc(60, 160, 12), "t2", "glioma", 0.5)
    other = slice_facts(disc(170, 160, 30), "t1ce", "meningioma", 0.1)
    same = entities(here) @ entities(here)
    assert same == 9
    assert entities(here) @ entities(other_side) == same - 1
    assert entities(here) @ entities(other) < same - 4
    assert len(entities(here)) == len(entity_names()) == 28


@pytest.mark.parametrize(
    ("label", "contrast", "kind", "said"),
    [
        (np.zeros((4, 4), int), "dwi", "glioma", "dwi"),
        (np.zeros((4, 4), int), "t1", "abscess", "abscess"),
        (np.full((4, 4), 4), "t1", "glioma", "0 to 3"),
        (np.zeros((4, 4, 4), int), "t1", "glioma", r"\(H, W\)"),
    ],
)
def test_bad_input_is_named(label, contrast, kind, said):
    with pytest.raises(MedtutError, match=said):
        slice_facts(label, contrast, kind)
