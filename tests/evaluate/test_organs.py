"""Organ metrics: empty rules, distances in mm, components, windows, intervals."""

import json
import math

import numpy as np
import pytest
import torch

from medtut.data.organs import OrganError
from medtut.errors import MedtutError
from medtut.evaluate.organs import (
    dice,
    largest_component,
    paired_difference,
    predict_volume,
    score_case,
    summarise,
)

SHAPE = (20, 16, 12)


def box(*edges, shape=SHAPE):
    out = np.zeros(shape, np.uint8)
    out[tuple(slice(*e) for e in edges)] = 1
    return out


ONE, NONE = box((2, 8), (3, 9), (2, 8)), box((0, 0))


# --- Dice --------------------------------------------------------------------------


def test_dice():
    half = box((2, 5), (3, 9), (2, 8))
    assert dice(ONE, ONE) == 1
    assert dice(half, ONE).item() == pytest.approx(2 * 108 / (108 + 216))
    both = dice(np.stack([ONE, half, NONE, NONE]), np.stack([ONE, ONE, ONE, NONE]))
    np.testing.assert_allclose(both, [1, 2 / 3, 0, math.nan])
    assert dice(NONE, NONE, nothing=1.0) == 1
    assert dice(ONE, NONE) == dice(NONE, ONE) == 0
    assert dice(torch.from_numpy(ONE), torch.from_numpy(ONE).bool()) == 1
    assert dice(ONE.astype(np.float32), ONE) == 1


def test_a_perfect_small_organ_is_perfect():
    hundred = box((0, 10), (0, 10), (0, 1))
    assert hundred.sum() == 100
    assert dice(hundred, hundred) == 1


@pytest.mark.parametrize(
    "bad",
    [ONE[:-1], ONE * 2, ONE * 0.4, np.where(ONE, np.nan, 0.0), ONE[0], ONE[None, None]],
)
def test_no_masks(bad):
    with pytest.raises(OrganError, match=r"dice: prediction .* truth .*Threshold"):
        dice(bad, ONE)
    with pytest.raises(OrganError, match="score_case"):
        score_case(bad, ONE, (1, 1, 1), ["liver"])


# --- one case ----------------------------------------------------------------------


def score(prediction, truth, spacing=(1, 1, 1), **how):
    return score_case(prediction, truth, spacing, ["liver"], **how)[0]


def test_distances_are_in_mm():
    """A box moved by two voxels along each axis, and the axes are not alike."""
    spacing = (0.7, 1.5, 5.0)
    for axis, mm in enumerate(spacing):
        moved = np.roll(ONE, 2, axis)
        row = score(moved, ONE, spacing)
        assert row["hd95"] == pytest.approx(2 * mm, rel=1e-5), axis
        assert score(moved, ONE, spacing, tolerance=2 * mm + 0.01)["nsd"] == 1
        assert score(moved, ONE, spacing, tolerance=0.5)["nsd"] < 1
        assert row["ml_true"] == pytest.approx(216 * 5.25 / 1000)
    assert score(ONE, ONE, spacing) == pytest.approx(
        {"case": "", "structure": "liver", "dice": 1, "nsd": 1, "hd95": 0}
        | dict.fromkeys(("ml_predicted", "ml_true"), 216 * 5.25 / 1000)
    )


def test_surface_dice_by_hand():
    """Two plates of one voxel, two apart: none within 1.9, all within 2 mm."""
    one, other = box((4, 5), (2, 9), (2, 9)), box((6, 7), (2, 9), (2, 9))
    assert score(one, other, tolerance=1.9)["nsd"] == 0
    assert score(one, other, tolerance=2.0)["nsd"] == 1
    assert score(one, other)["dice"] == 0
    assert score(one, other)["hd95"] == pytest.approx(2)


def test_hd95_leaves_out_the_worst_twentieth():
    far = ONE.copy()
    far[18, 14, 10] = 1
    assert score(far, ONE)["hd95"] == 0
    assert score(far, ONE)["dice"] < 1


def test_the_box_changes_nothing():
    """Scores are computed within the box of both; a margin has no part in them."""
    moved = np.roll(ONE, 1, 0)
    wide = [np.pad(m, 7) for m in (moved, ONE)]
    small, large = score(moved, ONE), score(*wide)
    assert small["hd95"] == large["hd95"]
    assert small["nsd"] == large["nsd"]


def test_empty():
    both = score(NONE, NONE)
    assert all(math.isnan(both[key]) for key in ("dice", "nsd", "hd95"))
    agreed = score(NONE, NONE, nothing=1.0)
    assert (agreed["dice"], agreed["nsd"], agreed["hd95"]) == (1, 1, 0)
    diagonal = np.linalg.norm(np.array(SHAPE) * (1, 2, 3))
    for pair in ((ONE, NONE), (NONE, ONE)):
        row = score(*pair, (1, 2, 3))
        assert (row["dice"], row["nsd"]) == (0, 0)
        assert row["hd95"] == pytest.approx(diagonal)


def test_the_table():
    rows = score_case(
        np.stack([ONE, NONE]), np.stack([ONE, ONE]), (1, 1, 1), ["liver", "spleen"],
        "s0001", seed=3, surfaces=False,
    )  # fmt: skip
    assert [r["structure"] for r in rows] == ["liver", "spleen"]
    assert all(r["case"] == "s0001" and r["seed"] == 3 for r in rows)
    assert "hd95" not in rows[0]
    json.dumps(rows, allow_nan=False)
    for wrong in (
        {"structures": ["a", "b"]},
        {"spacing": (1, 1)},
        {"spacing": (1, 0, 1)},
    ):
        with pytest.raises(OrganError, match=r"score_case: 1 channels"):
            score_case(ONE, ONE, **{"spacing": (1, 1, 1), "structures": ["a"]} | wrong)


# --- components --------------------------------------------------------------------


def test_largest_component():
    two = ONE | box((14, 17), (3, 6), (2, 5))
    np.testing.assert_array_equal(largest_component(two), ONE)
    corner = ONE | box((8, 10), (9, 11), (8, 10))  # touches by a corner: 26 neighbours
    np.testing.assert_array_equal(largest_component(corner), corner)
    four = largest_component(np.stack([two, NONE, corner]))
    assert four.dtype == np.uint8
    np.testing.assert_array_equal(four, np.stack([ONE, NONE, corner]))
    assert largest_component(torch.from_numpy(two.astype(bool))).dtype == bool


def test_component_of_the_prediction_only():
    """Both lobes of a truth in two parts count, also if the option is on."""
    truth = ONE | box((14, 17), (3, 6), (2, 5))
    assert score(truth, truth)["dice"] == 1
    row = score(truth, truth, component=True)
    assert row["dice"] == pytest.approx(2 * 216 / (216 + 243))
    assert row["ml_true"] == 0.243
    assert score(truth, ONE, component=True)["dice"] == 1


# --- summaries ---------------------------------------------------------------------


def table(values, name="liver"):
    """Rows of a (seeds, cases) table."""
    return [
        {"structure": name, "case": f"c{c}", "seed": s, "dice": float(v)}
        for s, row in enumerate(values)
        for c, v in enumerate(row)
    ]


def test_summary():
    rng = np.random.default_rng(0)
    values = rng.normal(0.7, 0.1, (5, 30))
    found = summarise(table(values) + table(values[:, :3] + 0.1, "aorta"))
    liver = found["liver"]["dice"]
    assert liver["mean"] == pytest.approx(values.mean())
    assert liver["n"] == 30
    assert liver["low"] < liver["mean"] < liver["high"]
    assert 0.01 < liver["high"] - liver["low"] < 0.1
    assert list(found) == ["liver", "aorta"]
    assert list(found["liver"]) == ["dice"]


def test_what_was_not_there_is_left_out():
    values = np.full((2, 4), 0.5)
    values[1, 2] = np.nan
    assert summarise(table(values))["liver"]["dice"]["n"] == 3
    one = summarise(table([[0.5]]))["liver"]["dice"]
    assert (one["mean"], one["n"]) == (0.5, 1)
    assert math.isnan(one["low"])
    none = summarise(table([[np.nan]]))["liver"]["dice"]
    assert none["n"] == 0
    assert math.isnan(none["mean"])


def test_every_seed_has_every_case():
    with pytest.raises(OrganError, match="missing for some seeds of liver"):
        summarise(table(np.ones((2, 3)))[:-1])
    with pytest.raises(OrganError, match="no scores"):
        summarise([])


def test_paired_difference():
    rng = np.random.default_rng(1)
    case = rng.normal(0, 0.2, (1, 20))
    first = 0.6 + case + rng.normal(0, 0.01, (5, 20))
    second = 0.5 + case + rng.normal(0, 0.01, (5, 20))
    first[0, 4] = np.nan
    rows = table(first)
    np.random.default_rng(2).shuffle(rows)
    found = paired_difference(rows, table(second), "liver")
    assert found.difference == pytest.approx(0.1, abs=0.01)
    assert 0.08 < found.low < found.high < 0.12, "cases are paired"
    assert (found.cases, found.seeds) == (19, 5)
    with pytest.raises(MedtutError, match="at least 5"):
        paired_difference(table(first[:2]), table(second[:2]), "liver")
    assert paired_difference(rows, table(second), "liver", min_seeds=1).seeds == 5
    with pytest.raises(OrganError, match="missing"):
        paired_difference(table(first), table(second[:, :-1]), "liver")
    with pytest.raises(OrganError, match="missing"):
        paired_difference(table(first), table(second), "spleen")


# --- windows -----------------------------------------------------------------------


class Shift(torch.nn.Module):
    """Two logits per voxel, and a count of windows."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.sizes = []

    def forward(self, x):
        self.sizes.append(tuple(x.shape[2:]))
        assert not self.training
        return torch.cat([x * self.weight, 1 - x], 1)


@pytest.mark.parametrize("overlap", [0.25, 0.5])
@pytest.mark.parametrize("shape", [(20, 16, 12), (7, 19, 31), (8, 8, 8)])
def test_a_constant_stays_a_constant(shape, overlap):
    model = Shift().train()
    image = np.full((1, *shape), 0.3, np.float32)
    got = predict_volume(model, image, (8, 8, 8), overlap, activation=None)
    assert got.shape == (2, *shape)
    np.testing.assert_allclose(got[0], 0.3, atol=1e-6)
    np.testing.assert_allclose(got[1], 0.7, atol=1e-6)
    assert model.training
    assert set(model.sizes) == {(8, 8, 8)}


def test_windows_are_blended_by_a_gaussian():
    """A network that marks the rim of its window: the middle of windows counts more."""

    class Rim(torch.nn.Module):
        def forward(self, x):
            out = torch.ones_like(x)
            out[..., 2:-2] = 0
            return out

    got = predict_volume(Rim(), np.zeros((1, 8, 8, 32)), (8, 8, 8), 0.5, None)[0]
    assert 0 < got[4, 4, 8:24].max() < 0.2, "plain averaging gives 0.5"


def test_activation():
    image = np.random.default_rng(0).random((1, 9, 9, 9), dtype=np.float32)
    raw = predict_volume(Shift(), image, (8, 8, 8), activation=None)
    soft = predict_volume(Shift(), image, (8, 8, 8), activation="softmax")
    sigmoid = predict_volume(Shift(), image, (8, 8, 8))
    np.testing.assert_allclose(soft.sum(0), 1, atol=1e-6)
    np.testing.assert_allclose(sigmoid, 1 / (1 + np.exp(-raw)), atol=1e-6)
    assert raw.dtype == np.float32
    np.testing.assert_allclose(raw[0], image[0], atol=1e-6)


def test_mirrored_passes_are_turned_back():
    image = np.random.default_rng(0).random((1, 8, 9, 10), dtype=np.float32)
    plain = predict_volume(Shift(), image, (8, 8, 8), activation=None)
    mirrored = predict_volume(
        Shift(), image, (8, 8, 8), activation=None, flips=((), (1,), (1, 2))
    )
    np.testing.assert_allclose(mirrored, plain, atol=1e-6)
