"""Find a volume by its report, and volumes like a volume: R@K and MAP@K.

Equal similarities count as drawn in random order and are replaced by the expectation,
so that a model which gives every volume the same embedding scores exactly chance.
Counted by place in the file, such a model can score 0 or 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike as Array

from medtut.errors import MedtutError
from medtut.evaluate.zero_shot import unit

TIED = 1e-9  # cosines nearer than this differ by rounding
R_AT, MAP_AT = (5, 10, 50, 100), (1, 5, 10, 50)  # CT-CLIP's
Ks = Sequence[int]
DRAWS = 1000  # resamples of an interval


def _expected(similarity: np.ndarray, relevance: np.ndarray) -> np.ndarray:
    """Relevance expected at each place (n,), first the most similar."""
    order = np.argsort(-similarity, kind="stable")
    tie = np.append(0, (np.diff(similarity[order]) < -TIED).cumsum())
    mean = np.bincount(tie, relevance[order]) / np.bincount(tie)
    return mean[tie]


def _at(
    name: str, ks: Ks, places: list, gallery: int, group: Array, seed: int
) -> dict[str, Any]:
    """Score the first K places of each query, and draw patients again."""
    if not (ks := [k for k in ks if 0 < k < gallery]):  # at it, every model is perfect
        raise MedtutError(f"No K is below the gallery's {gallery} volumes.")
    size = np.array(ks) if name == "R" else 1  # a sum over places, or their mean
    table = np.array([[place[:k].mean() for k in ks] for place in places]) * size
    chance = np.mean([place.mean() for place in places]) * size * np.ones(len(ks))
    _, group = np.unique(group, return_inverse=True)
    n = int(group.max()) + 1
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), DRAWS)
    means = drawn[:, group] @ table / drawn[:, group].sum(1)[:, None]
    ends = np.vstack([table.mean(0), np.quantile(means, [0.025, 0.975], axis=0)])
    every = zip(ks, ends.T.tolist(), chance.tolist(), strict=True)
    return {f"{name}@{k}": {"value": v, "chance": c} for k, v, c in every}


def report_to_volume(
    text: Array, image: Array, ks: Ks = R_AT, groups: Array | None = None, seed: int = 0
) -> dict[str, Any]:
    """R@K: share of reports whose own volume is among the K nearest by cosine.

    As in CT-CLIP (arXiv 2403.17834; scripts/report_to_volume.py at 9172791), but for
    ties. One volume per report: with several reconstructions of a scan give one of
    them. R@K falls as the gallery grows, so never compare it without ``gallery``.

    Parameters
    ----------
    text, image : (N, d), row i of one belongs to row i of the other.
    ks : sequence of int
        Those not below N are left out.
    groups : (N,), optional
        Patients, who are drawn again for the interval; the gallery stays as it is.

    Returns
    -------
    dict
        "R@K" to ``value`` [value, low, high] (95 % percentile interval) and ``chance``
        K / N, for each K; ``gallery``, N.

    Raises
    ------
    MedtutError
        Shapes that do not fit, embeddings without direction, no K below N.
    """
    t, v = unit(text), unit(image)
    group = np.arange(len(t)) if groups is None else np.asarray(groups)
    if t.ndim != 2 or t.shape != v.shape or len(group) != len(t):
        raise MedtutError(
            f"Reports {t.shape}, volumes {v.shape}, or groups: not (N, d)."
        )
    places = [*map(_expected, t @ v.T, np.eye(len(t)))]
    return _at("R", ks, places, len(t), group, seed) | {"gallery": len(t)}


def overlap(truth: Array) -> np.ndarray:
    """Shared findings over all findings of two volumes, (N, N): Jaccard's index.

    0 where neither has one, as CT-CLIP's gallery without healthy volumes never asks.
    """
    y = np.asarray(truth).astype(float)
    both = y @ y.T
    either = y.sum(1)[:, None] + y.sum(1) - both
    return both / np.maximum(either, 1)


def volume_to_volume(
    image: Array,
    truth: Array,
    ks: Ks = MAP_AT,
    groups: Array | None = None,
    published: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """MAP@K of volumes like a volume, relevance being the `overlap` of findings.

    What CT-CLIP calls MAP@K (scripts/volume_to_volume.py at 9172791) is the mean
    relevance of the K nearest by cosine, averaged over queries: places within the K do
    not count, as they would in an average precision. The gallery holds volumes with a
    finding. Three things differ from that script. A query is not in its own gallery,
    nor are other volumes of its patient. Volumes without a finding do not query, since
    they score 0 whatever the model does. And each K is averaged by itself: there the
    list is not emptied between two K, so that the number printed for K = 5 is the mean
    of those for 1 and 5.

    Parameters
    ----------
    image, truth : (N, d) and (N, K) of 0 and 1
    ks : sequence of int
        Those not below the number of volumes with a finding are left out.
    groups : (N,), optional
        Patient of each volume; by default each is its own.
    published : bool
        The first two differences undone: every volume queries, and finds itself.

    Returns
    -------
    dict
        "MAP@K" to ``value`` [value, low, high] and ``chance`` (the gallery in random
        order) for each K; ``queries``; ``gallery``, all volumes with a finding.

    Raises
    ------
    MedtutError
        Shapes that do not fit, embeddings without direction, a query whose gallery is
        empty, no K below the gallery's size.
    """
    v, y = unit(image), np.asarray(truth)
    group = np.arange(len(v)) if groups is None else np.asarray(groups)
    if v.ndim != 2 or y.ndim != 2 or not len(v) == len(y) == len(group):
        raise MedtutError(f"Volumes {v.shape}, truth {y.shape}, {len(group)} groups.")
    ill, alike, near = y.any(1), overlap(y), v @ v.T
    queries, places = np.flatnonzero(ill | bool(published)), []
    for q in queries:
        gallery = ill & ((group != group[q]) | bool(published))
        if not gallery.any():
            raise MedtutError(f"Volume {q}: no other patient has a finding.")
        places.append(_expected(near[q, gallery], alike[q, gallery]))
    found = _at("MAP", ks, places, int(ill.sum()), group[queries], seed)
    return found | {"queries": len(queries), "gallery": int(ill.sum())}
