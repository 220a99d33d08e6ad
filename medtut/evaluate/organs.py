"""Scores of organ masks in the space of the file, against the whole ground truth.

Upstream scores at 1.5 mm in a cropped volume, keeps only the largest component of the
truth (``fseft/datasets/utils.py:54``), and adds 1 to the denominator of Dice alone
(``utils/metrics.py:18-20``), by which a perfect organ of 100 voxels scores 200 / 201.

Empty cases follow one rule: what is absent from both is `nothing` (NaN, left out of
means, or 1, as you choose); what only one of them has scores Dice 0, surface Dice 0 and
the diagonal of the volume as HD95, further than which no surface can be.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from medtut.data.organs import fault
from medtut.evaluate.statistics import Comparison, interval, paired_comparison

TOLERANCE = 3.0  # mm, as TotalSegmentator's paper (Wasserthal et al. 2023)
METRICS, SIZES = ("dice", "nsd", "hd95"), ("ml_predicted", "ml_true")


def _array(mask: Any) -> np.ndarray:
    return np.asarray(mask.detach().cpu() if hasattr(mask, "detach") else mask)


def _pair(where: str, prediction: Any, truth: Any) -> tuple[np.ndarray, np.ndarray]:
    """Two sets of masks (C, X, Y, Z) bool."""
    both = [_array(mask) for mask in (prediction, truth)]
    shapes = {"prediction": both[0].shape, "truth": both[1].shape}
    fits = both[0].shape == both[1].shape and both[0].ndim in (3, 4)
    if not fits or not all(((m == 0) | (m == 1)).all() for m in both):
        raise fault("masks", where=where, **shapes)
    first, second = (m.reshape(-1, *m.shape[-3:]).astype(bool) for m in both)
    return first, second


def dice(prediction: Any, truth: Any, nothing: float = math.nan) -> np.ndarray:
    """Dice of every channel.

    Parameters
    ----------
    prediction, truth : (X, Y, Z) or (C, X, Y, Z) of 0 and 1
    nothing : the score where both are empty.

    Returns
    -------
    (C,) float64; C is 1 for (X, Y, Z).

    Raises
    ------
    OrganError
        Shapes that differ, or values other than 0 and 1.
    """
    a, b = (m.reshape(len(m), -1) for m in _pair("dice", prediction, truth))
    shared, sizes = (a & b).sum(1), a.sum(1) + b.sum(1)
    return np.where(sizes > 0, 2 * shared / np.maximum(sizes, 1), nothing)


def largest_component(mask: Any) -> np.ndarray:
    """Keep the largest 26-connected component of (X, Y, Z), or of each channel.

    Of two of one size the first in memory stays. Upstream's fails on its own 4-D masks
    (``main_fseft.py:98``).
    """
    from scipy.ndimage import label

    array = _array(mask)
    if array.ndim == 4:
        return np.stack([largest_component(one) for one in array])
    parts, count = label(array != 0, np.ones((3, 3, 3)))
    if count < 2:
        return array
    return array * (parts == 1 + np.bincount(parts.flat)[1:].argmax())


def score_case(
    prediction: Any, truth: Any, spacing: Sequence[float], structures: Sequence[str],
    case: str = "", tolerance: float = TOLERANCE, component: bool = False,
    nothing: float = math.nan, surfaces: bool = True, **more: Any,
) -> list[dict[str, Any]]:  # fmt: skip
    """Score one volume, one row per structure.

    Parameters
    ----------
    prediction, truth : (S, X, Y, Z) of 0 and 1, or (X, Y, Z) for one structure
        On the grid of the file: see `medtut.data.totalseg.to_original`, `read_labels`.
    spacing : edges of a voxel in mm
    structures : the S names
    case : its id
    tolerance : mm within which two surfaces agree, for the surface Dice (MONAI's: the
        share of surface voxels, not of area).
    component : keep the largest component of the *prediction* first. Never of the
        truth.
    nothing : the score where both are empty; for HD95 NaN, or 0 if this is a number.
    surfaces : also the two surface metrics, which take most of the time.
    more : further columns, such as the seed.

    Returns
    -------
    list of dict with case, structure, dice, nsd, hd95 (mm), ml_predicted, ml_true

    Raises
    ------
    OrganError
        As `dice`, or another number of channels, or no such spacing.
    """
    import torch
    from monai.metrics import compute_hausdorff_distance, compute_surface_dice
    from scipy.ndimage import find_objects

    a, b = _pair("score_case", prediction, truth)
    edges = np.asarray(spacing, float)
    good = edges.shape == (3,) and np.isfinite(edges).all() and (edges > 0).all()
    if len(a) != len(structures) or not good:
        counts = {"channels": len(a), "structures": len(structures)}
        raise fault("count", where="score_case", spacing=spacing, **counts)
    a = largest_component(a) if component else a
    scores, ml = dice(a, b, nothing), edges.prod() / 1000
    rows = []
    for one, other, value, name in zip(a, b, scores, structures, strict=True):
        nsd, far = float(value), math.nan if math.isnan(nothing) else 0.0
        if one.any() != other.any():
            far = float(np.linalg.norm(edges * one.shape))
        elif one.any() and surfaces:
            box = find_objects((one | other).astype(np.uint8))[0]
            pair = [torch.from_numpy(m[box])[None, None] for m in (one, other)]
            how = {"include_background": True, "spacing": edges.tolist()}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # within MONAI
                nsd = float(compute_surface_dice(*pair, [tolerance], **how))
                far = float(compute_hausdorff_distance(*pair, percentile=95, **how))
        surface = {"nsd": nsd, "hd95": far} if surfaces else {}
        row = {"case": case, "structure": name, "dice": float(value), **surface}
        sizes = (float(mask.sum() * ml) for mask in (one, other))
        rows.append(row | dict(zip(SIZES, sizes, strict=True)) | more)
    return rows


def _table(
    structure: str, metric: str, *methods: Sequence[Mapping[str, Any]]
) -> list[np.ndarray]:
    """(seeds, cases) of one structure per method, sorted; NaN of any is left out."""
    mine = [
        {
            (r.get("seed", 0), r["case"]): r[metric]
            for r in m
            if r["structure"] == structure
        }
        for m in methods
    ]
    seeds, cases = (sorted({key[i] for found in mine for key in found}) for i in (0, 1))
    if not cases or any(len(found) != len(seeds) * len(cases) for found in mine):
        raise fault("no_rows", structure=structure)
    tables = [np.array([[f[s, c] for c in cases] for s in seeds], float) for f in mine]
    keep = ~np.isnan(tables).any((0, 1))
    return [table[:, keep] for table in tables]


def summarise(
    rows: Sequence[Mapping[str, Any]], metrics: Sequence[str] = METRICS
) -> dict[str, dict[str, dict[str, float]]]:
    """Mean and 95 % interval per structure, over cases with seeds nested.

    Parameters
    ----------
    rows : of `score_case`, with ``seed`` where there are several.

    Returns
    -------
    structure -> metric -> mean, low, high, n
        ``n`` cases count: those that are NaN in any seed are left out. With fewer than
        two cases there is no interval: low and high are NaN.

    Raises
    ------
    OrganError
        No rows, or a seed that lacks a case.
    """
    done: dict[str, dict[str, dict[str, float]]] = {}
    for name in dict.fromkeys([r["structure"] for r in rows] or [""]):
        for metric in (m for m in metrics if not rows or m in rows[0]):
            (table,) = _table(name, metric, rows)
            n = table.shape[1]
            low, high = interval(table) if n > 1 else (math.nan, math.nan)
            mean = float(table.mean()) if n else math.nan
            found = {"mean": mean, "low": low, "high": high, "n": n}
            done.setdefault(name, {})[metric] = found
    return done


def paired_difference(
    first: Sequence[Mapping], second: Sequence[Mapping], structure: str,
    metric: str = "dice", **options: Any,
) -> Comparison:  # fmt: skip
    """Compare two methods scored on the same cases and seeds, first minus second.

    Cases that are NaN for either are left out. ``options`` go to
    `medtut.evaluate.statistics.paired_comparison`, which asks for five seeds unless
    told otherwise.

    Raises
    ------
    MedtutError
        Other cases or seeds in one of them.
    """
    return paired_comparison(*_table(structure, metric, first, second), **options)


def predict_volume(
    model: Any, image: ArrayLike, roi: Sequence[int], overlap: float = 0.25,
    activation: str | None = "sigmoid", flips: Sequence[Sequence[int]] = ((),),
) -> np.ndarray:  # fmt: skip
    """Go over a volume in windows with Gaussian weights that sum to 1.

    Parameters
    ----------
    model : network of (B, 1, X, Y, Z)
        Run in eval mode without a gradient; left as it was.
    image : (1, X, Y, Z)
    roi : three sizes of a window
    overlap : of two windows
    activation : "sigmoid", "softmax" (over channels) or None
        Applied to the blend of logits.
    flips : axes (0 to 2) to mirror, one entry per pass; their mean is returned.
        Left and right are different organs here: axis 0 is not to be mirrored.

    Returns
    -------
    (C, X, Y, Z) float32
    """
    import torch
    from monai.inferers import sliding_window_inference

    given = torch.as_tensor(np.asarray(image), dtype=torch.float32)[None]
    device, training = next(model.parameters(), given).device, model.training
    model.eval()
    total = 0
    with torch.no_grad():
        for axes in flips:
            dims = [axis + 2 for axis in axes]
            x = given.to(device).flip(dims)
            y = sliding_window_inference(x, roi, 1, model, overlap, "gaussian")
            total = total + y.flip(dims).float()
    model.train(training)
    ways = {"sigmoid": torch.sigmoid, "softmax": lambda logits: logits.softmax(1)}
    mean = total / len(flips)
    return ways.get(activation, torch.nn.Identity())(mean)[0].cpu().numpy()
