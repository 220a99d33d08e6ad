"""Zero-shot scores against own formulas and scikit-learn; bootstraps that resample."""

import json

import numpy as np
import pytest
from sklearn import metrics

from medtut.errors import MedtutError
from medtut.evaluate import zero_shot as zs

NAMES = ["nodule", "effusion", "emphysema"]


def rng(seed=0):
    return np.random.default_rng(seed)


def made(n=80, k=3, seed=0, ties=True):
    """Scores that know something, with ties, and truth of unequal frequencies."""
    r = rng(seed)
    truth = r.random((n, k)) < np.array([0.5, 0.3, 0.15])[:k]
    scores = 1 / (1 + np.exp(-r.normal(size=(n, k)) - 1.2 * truth))
    return (scores.round(1) if ties else scores), truth.astype(int)


def ranked(score, positive):
    """Mann and Whitney: every pair by itself, a tie is half."""
    gap = np.subtract.outer(score[positive == 1], score[positive == 0])
    return float(np.mean((gap > 0) + 0.5 * (gap == 0)))


# ------------------------------------------------------------------------ pair scores
def softmax_pair(image, yes, no, scale):
    two = np.exp(scale * np.array([image @ yes, image @ no]))
    return two[0] / two.sum()


def test_a_pair_is_a_softmax_over_two_sentences():
    image, yes, no = (
        rng(k).normal(size=s) for k, s in enumerate([(4, 8), *[(2, 8)] * 2])
    )
    got = zs.pair_scores(image, yes[:, None], no[:, None], 2.718)
    for i, c in np.ndindex(4, 2):
        one = [v / np.linalg.norm(v) for v in (image[i], yes[c], no[c])]
        assert got[i, c] == pytest.approx(softmax_pair(*one, 2.718))
    assert got == pytest.approx(zs.pair_scores(3 * image, yes, 0.1 * no, 2.718))
    assert zs.pair_scores(image, yes, yes, 9) == pytest.approx(np.full((4, 2), 0.5))


def test_wordings_are_averaged_as_unit_vectors():
    image, yes, no = rng(0).normal(size=(5, 6)), *rng(1).normal(size=(2, 3, 4, 6))
    got = zs.pair_scores(image, yes, no, 3)
    means = (zs.unit(zs.unit(v).mean(1))[:, None] for v in (yes, no))
    assert got == pytest.approx(zs.pair_scores(image, *means, 3))
    loud = yes * np.array([100, 1, 1, 1])[:, None]  # length is no vote
    assert got == pytest.approx(zs.pair_scores(image, loud, no, 3))
    twice = np.repeat(yes[:, :1], 3, 1)
    alone = zs.pair_scores(image, yes[:, :1], no[:, :1], 3)
    assert alone == pytest.approx(zs.pair_scores(image, twice, no[:, :1], 3))


def test_the_scale_changes_no_order():
    image, yes, no = (rng(k).normal(size=(20, 6)) for k in range(3))
    warm, cold = (zs.pair_scores(image, yes[:3], no[:3], s) for s in (1, 10))
    assert np.array_equal(warm.argsort(0), cold.argsort(0))
    assert np.abs(cold - 0.5).mean() > 3 * np.abs(warm - 0.5).mean()


@pytest.mark.parametrize(
    ("image", "side", "said"),
    [
        ((4, 8), (2, 1, 7), "twice"),
        ((4, 8, 1), (2, 1, 8), "twice"),
        ((8,), (2, 8), "N"),
    ],
)
def test_shapes_that_do_not_fit(image, side, said):
    with pytest.raises(MedtutError, match=said):
        zs.pair_scores(np.ones(image), np.ones(side), np.ones(side))


@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf])
def test_vectors_without_a_direction(bad):
    image = np.ones((3, 4))
    image[1] = bad
    with pytest.raises(MedtutError, match="zero or not finite"):
        zs.pair_scores(image, np.ones((1, 4)), -np.ones((1, 4)))


# ------------------------------------------------------------------------------ areas
@pytest.mark.parametrize("ties", [False, True])
def test_every_score_is_that_of_scikit_learn(ties):
    scores, truth = made(ties=ties)
    cuts = np.array([0.5, 0.6, 0.7])
    judged = zs.findings_report(scores, truth, cuts, NAMES, draws=5)
    said = scores >= cuts
    each = metrics.precision_recall_fscore_support(truth, said, zero_division=0)
    for c, name in enumerate(NAMES):
        got, pair = judged["findings"][name], (truth[:, c], scores[:, c])
        assert got["auroc"][0] == pytest.approx(metrics.roc_auc_score(*pair), abs=1e-12)
        assert got["auroc"][0] == pytest.approx(ranked(scores[:, c], truth[:, c]))
        assert got["auprc"][0] == pytest.approx(metrics.average_precision_score(*pair))
        three = [got[key][0] for key in ("precision", "recall", "f1")]
        assert three == pytest.approx([one[c] for one in each[:3]])
        assert (got["positives"], got["threshold"]) == (truth[:, c].sum(), cuts[c])
        assert got["prevalence"] == truth[:, c].mean()
    for average in ("macro", "weighted"):
        got = judged[average]
        area = metrics.roc_auc_score(truth, scores, average=average)
        assert got["auroc"][0] == pytest.approx(area)
        area = metrics.average_precision_score(truth, scores, average=average)
        assert got["auprc"][0] == pytest.approx(area)
        three = metrics.precision_recall_fscore_support(truth, said, average=average)
        assert [got[key][0] for key in zs.METRICS[2:]] == pytest.approx(three[:3])
    assert judged["macro"] != judged["weighted"]
    assert zs.auroc(scores, truth) == pytest.approx(judged.table[0, :, 0])


def test_equal_scores_are_worth_half():
    truth = made()[1]
    assert zs.auroc(np.full(truth.shape, 0.3), truth).tolist() == [0.5] * 3
    judged = zs.findings_report(np.full(truth.shape, 0.3), truth, draws=50)
    assert judged["macro"]["auroc"] == [0.5, 0.5, 0.5]
    assert judged["macro"]["auprc"][0] == pytest.approx(truth.mean())
    assert judged["macro"]["f1"][0] == 0  # none was called, which is no error


def test_draws_are_weighted_as_if_written_out():
    scores, truth = made()
    count = rng(5).integers(0, 4, (1, len(scores)))
    got = zs._judge(scores[:, 0], truth[:, 0] == 1, count, 0.6)[0]
    s, y = (np.repeat(one[:, 0], count[0]) for one in (scores, truth))
    assert got[0] == pytest.approx(ranked(s, y))
    assert got[1] == pytest.approx(metrics.average_precision_score(y, s))
    three = metrics.precision_recall_fscore_support(y, s >= 0.6, average="binary")
    assert got[2:] == pytest.approx(three[:3])


# -------------------------------------------------------------------------- bootstrap
def test_intervals_are_those_of_a_stratified_bootstrap():
    scores, truth = made(120, 1, ties=False)
    low, high = zs.findings_report(scores, truth, draws=2000)["findings"]["0"]["auroc"][
        1:
    ]
    s, y, r = scores[:, 0], truth[:, 0], rng(9)
    ill, well = s[y == 1], s[y == 0]
    areas = []
    for _ in range(2000):
        up, down = (r.choice(one, len(one)) for one in (ill, well))
        areas.append(np.mean(np.subtract.outer(up, down) > 0))
    assert (low, high) == pytest.approx(np.quantile(areas, [0.025, 0.975]), abs=0.012)
    assert high - low > 0.1


def test_one_positive_is_in_every_draw():
    scores, truth = made(30, 1, ties=False)
    truth[:] = 0
    truth[3] = 1
    judged = zs.findings_report(scores, truth, draws=300)
    assert np.isfinite(judged.table).all()
    value, low, high = judged["findings"]["0"]["auroc"]
    assert low < value < high or value in (0, 1)


def strata(positive, group):
    n = group.max() + 1
    ill, well = (np.bincount(group, one, n) > 0 for one in (positive, ~positive))
    return ill + 2 * well


@pytest.mark.parametrize("per_patient", [1, 3])
def test_strata_keep_their_size_and_patients_stay_together(per_patient):
    group = np.repeat(np.arange(20), per_patient)
    positive = np.arange(len(group)) % 7 < 4
    count = zs._drawn(positive, group, zs._orders(20, 400, 0))
    kind = strata(positive, group)
    assert len(np.unique(kind)) == (2 if per_patient == 1 else 3)
    for one in np.unique(kind):
        assert (count[:, kind == one].sum(1) == (kind == one).sum()).all()
    assert (count.std(0) > 0.5).any()
    assert count.mean(0) == pytest.approx(np.ones(20), abs=0.25)
    drawn = count[:, group]
    assert ((drawn @ positive > 0) & (drawn @ ~positive > 0)).all()


def test_copies_of_a_patient_narrow_nothing():
    scores, truth = made(40, 1, ties=False)
    four = [np.repeat(one, 4, 0) for one in (scores, truth)]

    def width(*data, **more):
        judged = zs.findings_report(*data, draws=400, **more)
        return np.ptp(judged["macro"]["auroc"][1:])

    alone = width(scores, truth)
    assert width(*four, groups=np.repeat(np.arange(40), 4)) == pytest.approx(alone)
    assert width(*four) < 0.7 * alone


def test_findings_of_the_same_patients_share_their_draws():
    """18 copies of a finding are no more evidence than one."""
    scores, truth = made(60, 1, ties=False)
    one = zs.findings_report(scores, truth, draws=200)
    many = zs.findings_report(*(np.tile(a, (1, 6)) for a in (scores, truth)), draws=200)
    assert many["macro"]["auroc"] == pytest.approx(one["macro"]["auroc"])
    assert one["macro"]["auroc"] == one["findings"]["0"]["auroc"]


def test_a_seed_gives_the_same_again_and_another_does_not():
    scores, truth = made()
    a, b, c = (zs.findings_report(scores, truth, draws=50, seed=s) for s in (0, 0, 1))
    assert a == b != c
    assert np.array_equal(a.table[0], c.table[0])
    assert all(np.ptp(a.table[1:, k, m]) > 0 for k, m in np.ndindex(3, 5))


# --------------------------------------------------------------------- missing classes
@pytest.mark.parametrize("everywhere", [0, 1])
def test_findings_of_one_class_are_named_and_left_out(everywhere):
    scores, truth = made()
    truth[:, 1] = everywhere
    judged = zs.findings_report(scores, truth, names=NAMES, draws=20)
    assert (judged["findings"]["effusion"], judged["without"]) == (None, ["effusion"])
    rest = zs.findings_report(scores[:, [0, 2]], truth[:, [0, 2]], draws=20)
    for average in ("macro", "weighted"):
        for key, score in judged[average].items():
            assert score == pytest.approx(rest[average][key])
    assert np.isnan(zs.auroc(scores, truth)).tolist() == [False, True, False]
    nothing = zs.findings_report(scores, np.zeros_like(truth), draws=20)
    assert set(nothing["macro"].values()) == {None}


def test_a_report_is_json_and_leaves_its_input():
    scores, truth = made()
    kept = scores.copy(), truth.copy()
    judged = zs.findings_report(scores, truth, names=NAMES, draws=10)
    assert json.loads(json.dumps(judged)) == judged
    assert (judged["volumes"], judged["patients"], judged["draws"]) == (80, 80, 10)
    assert all(map(np.array_equal, kept, (scores, truth)))


@pytest.mark.parametrize(
    "change",
    [{"scores": np.full((80, 3), np.nan)}, {"truth": np.full((80, 3), 2)},
     {"truth": np.zeros((80, 2))}, {"thresholds": [0.5, 0.5]},
     {"names": ["a", "a", "b"]}, {"groups": range(79)},
     {"scores": np.zeros((0, 3)), "truth": np.zeros((0, 3))}],
)  # fmt: skip
def test_what_does_not_fit_is_refused(change):
    scores, truth = made()
    with pytest.raises(MedtutError):
        zs.findings_report(**({"scores": scores, "truth": truth} | change), draws=5)


# ------------------------------------------------------------------ averages over some
def test_macro_over_names_or_a_mask():
    scores, truth = made()
    judged = zs.findings_report(scores, truth, names=NAMES, draws=30)
    some = zs.macro_over(judged, ["emphysema", "nodule"])
    assert some == zs.macro_over(judged, np.array([True, False, True]))
    wanted = [judged["findings"][name]["auroc"][0] for name in ("nodule", "emphysema")]
    assert some["auroc"][0] == pytest.approx(np.mean(wanted))
    assert some["auroc"][1] < some["auroc"][0] < some["auroc"][2]
    assert zs.macro_over(judged, NAMES) == judged["macro"]
    for bad in (["nodule", "mass"], [True, False]):
        with pytest.raises(MedtutError, match="mask or names"):
            zs.macro_over(judged, bad)


# -------------------------------------------------------------------------- thresholds
def test_thresholds_are_the_best_there_are_and_frozen():
    scores, truth = made(60, ties=False)
    cuts = zs.choose_thresholds(scores, truth)
    for c in range(3):
        s, y = scores[:, c], truth[:, c]
        best = max(metrics.f1_score(y, s >= t) for t in s)
        assert metrics.f1_score(y, s >= cuts[c]) == pytest.approx(best)
        assert cuts[c] not in s
        above, below = s[s >= cuts[c]].min(), s[s < cuts[c]].max()
        assert cuts[c] == pytest.approx((above + below) / 2)
    with pytest.raises(ValueError, match="read-only"):
        cuts[0] = 0.5
    shuffled = rng(1).permutation(60)
    assert np.array_equal(cuts, zs.choose_thresholds(scores[shuffled], truth[shuffled]))


def test_thresholds_at_the_ends():
    def choose(scores, truth):
        return zs.choose_thresholds(np.c_[scores], np.c_[truth]).tolist()

    assert choose([0.1, 0.4, 0.6, 0.9], [0, 0, 1, 1]) == [0.5]
    assert choose([0.2, 0.3], [1, 1]) == [0.2]  # all are called
    assert choose([0.5, 0.5], [0, 1]) == [0.5]
    # F1 2/3 at 0.8 (1 of 2, no false alarm) and at 0.1 (both, 2 false): the higher
    assert choose([0.8, 0.3, 0.2, 0.1], [1, 0, 0, 1]) == pytest.approx([0.55])
    lower = np.nextafter(0.5, 0)
    assert choose([lower, 0.5], [0, 1]) == [0.5]  # halfway would be the lower one


def test_a_finding_without_positives_gets_no_threshold():
    scores, truth = made()
    truth[:, 2] = 0
    cuts = zs.choose_thresholds(scores, truth)
    assert np.isnan(cuts).tolist() == [False, False, True]
    test_scores, test_truth = made(seed=1)
    judged = zs.findings_report(test_scores, test_truth, cuts, NAMES, draws=20)
    rare = judged["findings"]["emphysema"]
    assert (rare["f1"], rare["threshold"]) == (None, None)
    assert rare["auroc"][0] > 0.5
    f1 = [judged["findings"][name]["f1"][0] for name in NAMES[:2]]
    assert judged["macro"]["f1"][0] == pytest.approx(np.mean(f1))
    json.dumps(judged, allow_nan=False)


# ---------------------------------------------------------------- probe and baseline
def features(n, seed):
    r = rng(seed)
    x = r.normal(size=(n, 5)) * [1, 50, 1, 1, 0.01] + [0, 300, 0, 0, 0]
    truth = np.stack([x[:, 0] > 0, x[:, 4] > 0.005, r.random(n) < 0.5], 1).astype(int)
    return x, truth


def test_a_probe_is_logistic_regression_on_standardised_features():
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    (x, y), (dev, dev_y), (test, test_y) = (features(n, n) for n in (150, 60, 61))
    probe = zs.linear_probe(x, y, dev, dev_y, test)
    assert probe.scores.shape == (61, 3)
    assert (zs.auroc(probe.scores, test_y)[:2] > 0.95).all()
    scale = StandardScaler().fit(x)
    own = LogisticRegression(C=probe.c, max_iter=1000).fit(scale.transform(x), y[:, 1])
    wanted = own.predict_proba(scale.transform(test))[:, 1]
    assert probe.scores[:, 1] == pytest.approx(wanted)
    areas = {}
    for c in zs.GRID:
        areas[c] = zs.linear_probe(x, y, dev, dev_y, test, [c])
        assert areas[c].c == c
    best = max(areas, key=lambda c: zs.auroc(areas[c].dev_scores, dev_y).mean())
    assert probe.c == best
    assert np.array_equal(probe.dev_scores, areas[best].dev_scores)


def test_among_equal_c_the_smallest_and_the_order_of_the_grid_does_not_count():
    (x, y), (dev, dev_y) = features(80, 1), features(40, 2)
    y[:, 1:] = y[:, :1]
    x[:, 1:] = 0
    one = zs.linear_probe(x, y, dev, dev_y, dev, [1.0, 0.01, 0.1])
    assert one.c == 0.01


def test_a_probe_of_a_finding_of_one_class(recwarn):
    (x, y), (dev, dev_y) = features(60, 1), features(40, 2)
    y[:, 1] = 0
    y[:, 2] = 1
    probe = zs.linear_probe(x, y, dev, dev_y, dev, [0.1])
    assert probe.scores[:, 1:].tolist() == [[0, 1]] * 40
    alone = zs.linear_probe(x, y[:, :1], dev, dev_y[:, :1], dev, [0.1])
    assert alone.scores == pytest.approx(probe.scores[:, :1])
    assert len(recwarn) == 0
    with pytest.raises(MedtutError, match="both classes on dev"):
        zs.linear_probe(x, y, dev, np.zeros_like(dev_y), dev, [0.1])


def test_histogram_and_pooled_by_hand():
    volumes = rng(0).uniform(-1, 1, (2, 8, 12, 12)).astype(np.float32)
    volumes[0, 0, 0, :3] = [-1, 1, 1.0]
    got = zs.histogram_and_pooled(volumes)
    assert got.shape == (2, 32 + 64)
    for row, volume in zip(got, volumes, strict=True):
        share = np.histogram(volume, 32, (-1, 1))[0] / volume.size
        assert row[:32] == pytest.approx(share, abs=2 / volume.size)
        assert row[:32].sum() == pytest.approx(1)
        cells = volume.reshape(4, 2, 4, 3, 4, 3).mean((1, 3, 5))
        assert row[32:] == pytest.approx(cells.ravel(), abs=1e-6)
    with_channel = zs.histogram_and_pooled(volumes[:, None], bins=8, cells=2)
    assert with_channel.shape == (2, 16)
    volumes[1, 3, 3, 3] = np.nan
    with pytest.raises(MedtutError, match="Volume 1 "):
        zs.histogram_and_pooled(volumes)
