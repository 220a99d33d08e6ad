"""BraTS scores against sums done by hand, the published metric, oracle, baselines."""

import math
import warnings

import numpy as np
import pytest
import torch

from medtut.errors import MedtutError
from medtut.evaluate import (
    brightest_blob,
    case_table,
    hd95,
    inflation,
    interval,
    oracle_grid,
    paired_comparison,
    published_dice,
    region_dice,
    score_case,
    score_cases,
    summary,
    threshold_baseline,
)
from medtut.evaluate.brats import PENALTY


def overlap(a, b):
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def tumour(shape=(20, 18, 12), centre=(9, 8, 6)):
    """Ball of oedema around a ball of rim around a necrosis."""
    axes = np.indices(shape)
    far = np.sqrt(sum((a - c) ** 2 for a, c in zip(axes, centre, strict=True)))
    return np.select([far < 2, far < 3.5, far < 5], [1, 3, 2], 0)


@pytest.fixture(scope="module")
def pair():
    rng = np.random.default_rng(0)
    label = tumour()
    guess = np.roll(label, (1, 0, 1), (0, 1, 2))
    noise = rng.random(label.shape) < 0.02
    return np.where(noise, rng.integers(0, 4, label.shape), guess), label


def test_regions_and_classes_by_hand(pair):
    p, t = pair
    dice = region_dice(p, t)
    expected = {
        "WT": overlap(p > 0, t > 0),
        "TC": overlap((p == 1) | (p == 3), (t == 1) | (t == 3)),
        "ET": overlap(p == 3, t == 3),
        "NCR": overlap(p == 1, t == 1),
        "ED": overlap(p == 2, t == 2),
    }
    expected["foreground"] = np.mean([expected[k] for k in ("NCR", "ED", "ET")])
    assert dice == pytest.approx(expected, abs=1e-6)
    assert len({round(dice[k], 4) for k in ("WT", "TC", "ET")}) == 3


def test_tensors_rotated_views_floats_and_slices_score_alike(pair):
    p, t = pair
    dice = region_dice(p, t)
    assert region_dice(torch.tensor(p), torch.tensor(t)) == dice
    assert region_dice(np.rot90(p), np.rot90(t)) == dice
    assert region_dice(p.astype(float), t.astype(np.uint8)) == dice
    assert region_dice(t[:, :, 6], t[:, :, 6])["WT"] == 1


def test_empty_rule():
    nothing, some = np.zeros((6, 6, 6), int), np.zeros((6, 6, 6), int)
    some[2:4, 2:4, 2:4] = 2
    assert all(math.isnan(v) for v in region_dice(nothing, nothing).values())
    found = region_dice(some, nothing)
    assert (found["WT"], found["ED"], found["foreground"]) == (0, 0, 0)
    assert math.isnan(found["NCR"])
    assert math.isnan(found["TC"])
    assert region_dice(nothing, some) == pytest.approx(found, nan_ok=True)
    # Oedema perfect, a necrosis invented: the mean is over these two, not three.
    guess = some.copy()
    guess[0, 0, 0] = 1
    assert region_dice(guess, some)["foreground"] == pytest.approx(0.5)
    far = hd95(some, nothing, (1, 1, 1))
    assert far["WT"] == PENALTY
    assert math.isnan(far["ET"])
    assert hd95(nothing, some, (1, 1, 1), penalty=374)["WT"] == 374
    assert all(math.isnan(v) for v in hd95(nothing, nothing, (1, 1, 1)).values())


def test_penalty_is_the_diagonal_of_a_brats_volume():
    assert math.dist((0, 0, 0), (240, 240, 155)) == pytest.approx(PENALTY, abs=0.005)


def test_hd95_in_millimetres_along_each_axis():
    label, guess = np.zeros((2, 12, 12, 12), int)
    label[2, 2, 2] = 3
    for axis, far in enumerate((1.5, 2.0, 5.0)):
        guess[:] = 0
        guess[tuple(5 if k == axis else 2 for k in range(3))] = 3
        assert hd95(guess, label, (1.5, 2.0, 5.0))["ET"] == pytest.approx(3 * far)


def test_hd95_differs_by_region_and_does_not_depend_on_the_crop(pair):
    from monai.metrics import compute_hausdorff_distance

    p, t = pair
    spacing = (1.0, 1.0, 2.0)
    warnings.simplefilter("ignore", FutureWarning)  # within MONAI
    far = hd95(p, t, spacing)
    assert len(set(far.values())) == 3
    for key, of in (("WT", (1, 2, 3)), ("TC", (1, 3)), ("ET", (3,))):
        masks = (torch.tensor(np.isin(m, of))[None, None].float() for m in (p, t))
        whole = compute_hausdorff_distance(
            *masks, include_background=True, percentile=95, spacing=spacing
        )
        assert far[key] == pytest.approx(float(whole))
    assert max(hd95(t, t, spacing).values()) == 0
    assert hd95(p, t, spacing) == pytest.approx(hd95(t, p, spacing))


def test_hd95_takes_the_95th_percentile_not_the_maximum():
    label = np.zeros((30, 30, 1), int)
    label[5:25, 5:25] = 3
    guess = label.copy()
    guess[0, 0] = 3  # one voxel of some eighty on the surface
    assert hd95(guess, label, (1, 1, 1))["ET"] == 0


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (lambda p, t: (p, np.where(t == 3, 4, t)), "on disk ET is 4"),
        (lambda p, t: (p[1:], t), "same shape"),
        (lambda p, t: (p * 0.5, t), "argmax"),
        (lambda p, t: (np.where(p == 0, np.nan, p), t), "nan"),
        (lambda p, t: (p[:0], t[:0]), "labels 0 to 3"),
    ],
)
def test_maps_that_are_none_are_refused(pair, broken, said):
    with pytest.raises(MedtutError, match=said):
        region_dice(*broken(*pair))
    with pytest.raises(MedtutError, match="hd95"):
        hd95(*broken(*pair), (1, 1, 1))


@pytest.mark.parametrize("spacing", [(1, 1), (1, 1, 0), (1, 1, math.nan)])
def test_spacing_is_checked(pair, spacing):
    with pytest.raises(MedtutError, match="voxel edges"):
        hd95(*pair, spacing)


def test_case_scores_table_and_summary(pair):
    p, t = pair
    nothing = np.zeros_like(t)
    cases = [(p, t, (1, 1, 2)), (t, t, (1, 1, 2)), (nothing, nothing, (1, 1, 2))]
    scores = score_cases(cases)
    assert scores[0] == score_case(p, t, (1, 1, 2))
    assert scores[0]["HD95 WT"] == hd95(p, t, (1, 1, 2))["WT"]
    assert not any("HD95" in key for key in score_case(p, t, distances=False))
    table = case_table(scores)
    assert table["WT"].shape == (3,)
    rows = summary([{"case": f"p{k}", **one} for k, one in enumerate(scores)]).rows
    first = scores[0]["WT"]
    assert "case" not in rows
    assert rows["WT"] == pytest.approx(
        {
            "mean": (first + 1) / 2,
            "median": (first + 1) / 2,
            "min": first,
            "max": 1.0,
            "std": (1 - first) / math.sqrt(2),
            "n": 2.0,  # the empty case is left out, and the table says so
        }
    )
    text, page = str(summary(scores)), summary(scores)._repr_html_()
    assert f"{(first + 1) / 2:.3f}" in text
    assert page.count("<tr>") == 1 + len(scores[0])
    assert "<th scope='row'>HD95 TC</th>" in page


def test_summary_of_nothing_found_and_mixed_metrics():
    empty = {"ET": math.nan}
    row = summary([empty, empty]).rows["ET"]
    assert row["n"] == 0
    assert math.isnan(row["mean"])
    for bad in ([], [empty, {"WT": 1.0}]):
        with pytest.raises(MedtutError, match="all with the same"):
            case_table(bad)


def test_tables_go_into_interval_and_comparison():
    rng = np.random.default_rng(0)
    base = rng.uniform(0.4, 0.9, 24)
    seeds = base + rng.normal(0, 0.02, (5, 24))
    low, high = interval(seeds)
    assert low < seeds.mean() < high
    better = paired_comparison(seeds + 0.1, seeds)
    assert better.low == pytest.approx(0.1)
    assert better.p_value < 0.01
    with pytest.raises(MedtutError, match="not finite"):
        interval(np.where(seeds > 0.6, np.nan, seeds))


# ------------------------------------------------------------ the published metric
def test_published_dice_by_hand():
    label = torch.zeros(2, 10, 10, dtype=torch.long)
    label[0, :2, :5] = 1  # 10 of 200 pixels
    guess = torch.zeros_like(label)
    assert published_dice(guess, label) == pytest.approx((2 * 190 / 390 + 0) / 2)
    assert published_dice(label, label) == 1
    guess[1, 0, :10] = 2  # a third class, wrong
    background = 2 * 180 / (190 + 190)
    assert published_dice(guess, label) == pytest.approx(background / 3)
    with pytest.raises(MedtutError, match="same shape"):
        published_dice(guess[0], label)


def test_background_and_pooling_inflate():
    label = torch.zeros(4, 32, 32, dtype=torch.long)
    label[0, 4:24, 4:24] = 2
    label[1, 5:25, 5:25] = 2
    label[2, 4:7, 4:7] = 2
    label[3, 4:7, 4:7] = 2
    guess = label.clone()
    guess[2:] = 0  # the second patient's small lesion is missed
    said = inflation(guess, label, ["a", "a", "b", "b"])
    assert said["per_patient"] == pytest.approx(0.5)
    assert said["without_background"] == pytest.approx(0.5)
    missed = 2 * (1024 - 9) / (1024 + 1024 - 9) / 2
    assert said["published"] == pytest.approx((1 + missed) / 2)
    assert said["inflation"] == pytest.approx(said["published"] - 0.5)
    # In one heap of four slices the large lesion hides the small one.
    pooled = inflation(guess, label, ["a", "a", "b", "b"], batch=4)
    assert pooled["without_background"] == pytest.approx(overlap(guess > 0, label > 0))
    assert inflation(guess, label)["per_patient"] == pytest.approx(0.5)
    with pytest.raises(MedtutError, match="belong together"):
        inflation(guess, label, ["a"])


# ------------------------------------------------------------------------- oracle
def small_tumours(count=6, size=112):
    rng = np.random.default_rng(1)
    rows, columns = np.indices((size, size))
    label = np.zeros((count, size, size), int)
    for one in label:
        y, x = rng.uniform(0.35, 0.65, 2) * size
        turn = np.arctan2(rows - y, columns - x)
        far = np.hypot(rows - y, columns - x) * (1 + 0.25 * np.sin(5 * turn))
        radius = rng.uniform(5, 9)
        one[far < 1.6 * radius] = 2
        one[far < radius] = 3
        one[far < 0.5 * radius] = 1
    return torch.from_numpy(label)


def test_a_coarse_grid_caps_dice_and_a_finer_one_less():
    label = small_tumours()

    def reached(grid):
        best = oracle_grid(label, grid)
        assert best.shape == label.shape
        assert best.dtype == torch.int64
        return inflation(best, label)["per_patient"]

    coarse, fine = reached(16), reached(56)
    assert 0.4 < coarse < 0.85
    assert fine > 0.95
    assert fine > coarse + 0.15
    assert torch.equal(oracle_grid(label, 16), oracle_grid(label, 16))


def test_the_fit_beats_the_start_and_is_near_its_end():
    label = small_tumours(3)
    start, short, long = (
        inflation(oracle_grid(label, 16, steps=n), label)["per_patient"]
        for n in (0, 60, 300)
    )
    assert short > start + 0.03
    assert abs(long - short) < 0.03


def test_oracle_is_exact_where_the_grid_can_be():
    constant = torch.full((2, 40, 48), 3)
    assert torch.equal(oracle_grid(constant, 16), constant)
    label = small_tumours(2, 56)
    assert torch.equal(oracle_grid(label, 56), label)
    with pytest.raises(MedtutError, match="labels 0 to 3"):
        oracle_grid(label + 1)


def test_oracle_grid_is_what_interpolate_draws():
    label = small_tumours(2, 64)
    functional = torch.nn.functional
    share = functional.adaptive_avg_pool2d(
        functional.one_hot(label, 4).permute(0, 3, 1, 2).float(), 8
    )
    start = functional.interpolate((share + 1e-3).log(), size=64, mode="bilinear")
    assert torch.equal(oracle_grid(label, 8, steps=0), start.argmax(1))
    # No decoder of this grid does better, fitted through torch's own functions.
    logits = torch.zeros(2, 4, 8, 8, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.5)
    for _ in range(100):
        up = functional.interpolate(logits, size=64, mode="bilinear")
        optimizer.zero_grad()
        functional.cross_entropy(up, label).backward()
        optimizer.step()
    same = oracle_grid(label, 8, steps=100, lr=0.5) == up.argmax(1)
    assert same.float().mean() > 0.98
    fitted, drawn = (
        inflation(one, label)["per_patient"]
        for one in (oracle_grid(label, 8, steps=200), up.argmax(1))
    )
    assert fitted > drawn - 0.01


# ---------------------------------------------------------------------- baselines
def test_baselines_find_the_bright_and_the_largest():
    rng = np.random.default_rng(0)
    volume = np.zeros((20, 20, 10), np.float32)
    volume[2:18, 2:18, 1:9] = rng.normal(100, 5, (16, 16, 8))
    volume[4:9, 4:9, 3:7] = rng.normal(200, 5, (5, 5, 4))  # the lesion
    volume[14:16, 14:16, 4] = 220  # a bright vessel
    bright, blob = threshold_baseline(volume), brightest_blob(volume)
    assert set(np.unique(bright)) == {0, 2}
    assert (bright > 0).sum() == 100 + 4
    assert (blob > 0).sum() == 100
    assert blob[5, 5, 5] == 2
    fewer = threshold_baseline(volume, q=0.5)
    assert (fewer > 0).sum() == 52
    assert volume[fewer > 0].min() >= np.median(volume[bright > 0])
    truth = np.zeros(volume.shape, int)
    truth[4:9, 4:9, 3:7] = 3
    assert region_dice(blob, truth)["WT"] == 1
    # Outside stays outside, whatever is subtracted from the brain.
    shifted = np.where(volume != 0, volume - 500, 0)
    assert np.array_equal(threshold_baseline(shifted), bright)


def test_otsu_cut_splits_two_peaks_where_sklearn_would():
    from sklearn.cluster import KMeans

    rng = np.random.default_rng(0)
    volume = np.r_[rng.normal(10, 1, 3000), rng.normal(16, 1, 1000)].reshape(40, 10, 10)
    kinds = KMeans(2, n_init=3, random_state=0).fit(volume.reshape(-1, 1)).labels_
    kinds = kinds.reshape(volume.shape) == kinds[volume.ravel().argmax()]
    assert ((threshold_baseline(volume) > 0) == kinds).mean() > 0.998


def test_baselines_on_bad_or_flat_volumes():
    flat = np.ones((4, 4, 4))
    assert set(np.unique(brightest_blob(flat))) <= {0, 2}
    for bad in (np.zeros((4, 4, 4)), np.full((4, 4, 4), np.nan)):
        with pytest.raises(MedtutError, match="not all 0"):
            threshold_baseline(bad)
    with pytest.raises(MedtutError, match="q = 1"):
        threshold_baseline(flat, q=1)
