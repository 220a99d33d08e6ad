"""Retrieval against loops over pairs, chance for models that know nothing."""

import itertools
import json

import numpy as np
import pytest

from medtut.errors import MedtutError
from medtut.evaluate import retrieval as rt


def rng(seed=0):
    return np.random.default_rng(seed)


def embeddings(n=24, d=6, noise=1.0, seed=0):
    image = rng(seed).normal(size=(n, d))
    return image + noise * rng(seed + 1).normal(size=(n, d)), image


def unit(v):
    return v / np.linalg.norm(v, axis=-1, keepdims=True)


# -------------------------------------------------------------------- report to volume
def test_recall_is_counted_as_in_a_loop():
    text, image = embeddings()
    found = rt.report_to_volume(text, 5 * image, (1, 5, 10))
    for k in (1, 5, 10):
        hits = []
        for i, row in enumerate(unit(text) @ unit(image).T):
            hits.append(i in sorted(range(24), key=lambda j: -row[j])[:k])
        assert found[f"R@{k}"]["value"][0] == pytest.approx(np.mean(hits))
        assert found[f"R@{k}"]["chance"] == pytest.approx(k / 24)
    assert found["gallery"] == 24
    assert json.loads(json.dumps(found)) == found


def test_a_perfect_model_and_one_that_knows_nothing():
    text, image = embeddings(noise=0)
    assert rt.report_to_volume(text, image, [1])["R@1"]["value"] == [1, 1, 1]
    same = np.tile(image[:1], (24, 1)).astype(np.float32)
    for pair in ((text, same), (same, image), (same, same)):
        found = rt.report_to_volume(*pair, (1, 7))
        for one in (found["R@1"], found["R@7"]):
            assert one["value"][0] == pytest.approx(one["chance"])


def test_ties_are_the_mean_over_all_orders():
    near = np.array([0.9, 0.5, 0.5, 0.5, 0.1])
    relevance = np.array([0.0, 1.0, 0.2, 0.0, 0.7])
    orders = []
    for middle in itertools.permutations([1, 2, 3]):
        orders.append(relevance[[0, *middle, 4]])
    assert rt._expected(near, relevance) == pytest.approx(np.mean(orders, 0))
    nearly = near + np.array([0, 1e-16, 0, -1e-16, 0])
    assert rt._expected(nearly, relevance) == pytest.approx(np.mean(orders, 0))
    apart = near + np.array([0, 1e-6, 0, -1e-6, 0])
    assert rt._expected(apart, relevance).tolist() == relevance.tolist()


def test_intervals_of_recall_resample_patients():
    text, image = embeddings(60, noise=1.5)
    one = rt.report_to_volume(text, image, [5])["R@5"]["value"]
    assert one[0] - one[1] > 0.02 < one[2] - one[0]
    binomial = 2 * 1.96 * np.sqrt(one[0] * (1 - one[0]) / 60)
    assert one[2] - one[1] == pytest.approx(binomial, rel=0.25)
    again, other = (rt.report_to_volume(text, image, [5], seed=s) for s in (0, 7))
    assert again["R@5"]["value"] == one != other["R@5"]["value"]
    pairs = rt.report_to_volume(text, image, [5], groups=np.repeat(range(30), 2))
    assert pairs["R@5"]["value"][0] == one[0]
    assert pairs["R@5"]["value"][1:] != one[1:]


def test_a_gallery_no_larger_than_k():
    text, image = embeddings(8)
    assert list(rt.report_to_volume(text, image)) == ["R@5", "gallery"]
    with pytest.raises(MedtutError, match="No K is"):
        rt.report_to_volume(text[:5], image[:5])


@pytest.mark.parametrize(
    ("text", "image", "more"),
    [((5, 3), (4, 3), {}), ((5, 3), (5, 2), {}), ((5,), (5,), {}),
     ((5, 3), (5, 3), {"groups": [1, 2]})],
)  # fmt: skip
def test_reports_that_do_not_fit(text, image, more):
    with pytest.raises(MedtutError, match="not \\(N, d\\)"):
        rt.report_to_volume(np.ones(text), np.ones(image), [1], **more)


def test_volumes_without_direction():
    text, image = embeddings()
    image[3, 2] = np.nan
    with pytest.raises(MedtutError, match="not finite"):
        rt.report_to_volume(text, image)


# -------------------------------------------------------------------- volume to volume
def labelled(n=30, k=5, seed=0):
    truth = (rng(seed).random((n, k)) < 0.35).astype(int)
    truth[:3] = 0
    return rng(seed + 5).normal(size=(n, 8)) + 2 * truth @ rng(9).normal(
        size=(k, 8)
    ), truth


def jaccard(a, b):
    both, either = int((a & b).sum()), int((a | b).sum())
    return both / either if either else 0.0


def looped(image, truth, k, group=None, own=False):
    """The definition, one query and one volume at a time."""
    group, near, scores = range(len(truth)) if group is None else group, unit(image), []
    for q in range(len(truth)):
        if not own and not truth[q].any():
            continue
        here = [g for g in range(len(truth)) if truth[g].any()]
        here = [g for g in here if own or group[g] != group[q]]
        here.sort(key=lambda g: -near[q] @ near[g])
        scores.append(np.mean([jaccard(truth[q], truth[g]) for g in here[:k]]))
    return np.mean(scores), len(scores)


def test_overlap_is_jaccard():
    _, truth = labelled()
    got = rt.overlap(truth)
    for a, b in np.ndindex(got.shape):
        assert got[a, b] == pytest.approx(jaccard(truth[a], truth[b]))


@pytest.mark.parametrize("own", [False, True])
def test_map_is_counted_as_in_a_loop(own):
    image, truth = labelled()
    found = rt.volume_to_volume(image, truth, (1, 5, 10), published=own)
    for k in (1, 5, 10):
        wanted, queries = looped(image, truth, k, own=own)
        assert found[f"MAP@{k}"]["value"][0] == pytest.approx(wanted)
        low, high = found[f"MAP@{k}"]["value"][1:]
        assert low < wanted < high
    assert found["queries"] == queries
    assert found["gallery"] == truth.any(1).sum()
    assert json.loads(json.dumps(found)) == found


def test_as_published_a_query_finds_itself():
    image, truth = labelled()
    noise = rng(3).normal(size=image.shape)  # knows nothing
    ours, published = (
        rt.volume_to_volume(noise, truth, (1, 10), published=own)
        for own in (False, True)
    )
    ill = truth.any(1).mean()
    assert published["MAP@1"]["value"][0] == pytest.approx(ill)
    assert published["MAP@1"]["value"][0] > 2 * published["MAP@1"]["chance"]
    one = ours["MAP@10"]
    assert one["value"][1] < one["chance"] < one["value"][2]


def test_volumes_of_the_same_patient_are_not_retrieved():
    image, truth = labelled()
    twice, labels, group = (
        np.repeat(image, 2, 0),
        np.repeat(truth, 2, 0),
        np.arange(60) // 2,
    )
    loose = rt.volume_to_volume(twice, labels, [1])["MAP@1"]["value"][0]
    kept = rt.volume_to_volume(twice, labels, [1], groups=group)["MAP@1"]["value"][0]
    assert loose == pytest.approx(1)  # the copy
    assert kept == pytest.approx(
        rt.volume_to_volume(image, truth, [1])["MAP@1"]["value"][0]
    )
    wanted, _ = looped(image, truth, 5, np.arange(30) // 3)
    got = rt.volume_to_volume(image, truth, [5], groups=np.arange(30) // 3)
    assert got["MAP@5"]["value"][0] == pytest.approx(wanted)


def test_equal_volumes_score_chance():
    _, truth = labelled()
    found = rt.volume_to_volume(np.ones((30, 4)), truth, (1, 5))
    for one in (found["MAP@1"], found["MAP@5"]):
        assert one["value"][0] == pytest.approx(one["chance"])
    orders = [
        rt.volume_to_volume(rng(s).normal(size=(30, 4)), truth, [5]) for s in range(30)
    ]
    mean = np.mean([one["MAP@5"]["value"][0] for one in orders])
    assert mean == pytest.approx(found["MAP@5"]["chance"], abs=0.02)


def test_labels_as_embeddings_retrieve_better_than_chance():
    _, truth = labelled()
    one = rt.volume_to_volume(truth + 0.01, truth, [1])["MAP@1"]
    assert one["value"][1] > 1.5 * one["chance"]


def test_galleries_that_are_empty():
    image, truth = labelled()
    with pytest.raises(MedtutError, match="No K is"):
        rt.volume_to_volume(image, 0 * truth)
    with pytest.raises(MedtutError, match="no other patient"):
        rt.volume_to_volume(image, truth, groups=np.zeros(30))
    with pytest.raises(MedtutError, match="groups"):
        rt.volume_to_volume(image, truth[:20])
