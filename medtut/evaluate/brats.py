"""Scores of one patient as BraTS counts them, and their table over patients.

Label maps hold 0 background, 1 necrotic core (NCR), 2 oedema (ED), 3 enhancing tumour
(ET). BraTS scores nested regions: the whole tumour WT, its core TC without the oedema,
and ET (Menze et al., IEEE TMI 2015; Bakas et al., arXiv:1811.02629).

Empty cases follow one rule throughout: what is absent from both maps is `NOTHING`,
NaN, and left out of means; what is found where there is none scores Dice 0 and the
penalty distance, and so does what is missed completely.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from medtut.errors import MedtutError
from medtut.evaluate.segmentation import tissue_dice

REGIONS = {"WT": (1, 2, 3), "TC": (1, 3), "ET": (3,), "NCR": (1,), "ED": (2,)}
NESTED, CLASSES = ("WT", "TC", "ET"), ("NCR", "ED", "ET")
NOTHING = math.nan  # absent from both: there was nothing to find
# Diagonal of a BraTS volume, 240 x 240 x 155 voxels of 1 mm, in mm: no surface is
# further away than that. BraTS' own tables round it to 374.
PENALTY = 373.13
COLUMNS = ("mean", "median", "min", "max", "std", "n")


def _tumour(
    prediction: ArrayLike, label: ArrayLike, caller: str
) -> dict[str, list[torch.Tensor]]:
    """Masks of every region of both maps, cut to the box that holds all tumour."""
    from scipy.ndimage import find_objects

    maps = []
    for name, one in (("prediction", prediction), ("label", label)):
        array = np.asarray(one.detach().cpu() if isinstance(one, torch.Tensor) else one)
        # Anything that is no 0, 1, 2 or 3 shows: 4 as on disk, logits, NaN.
        if array.size == 0 or not np.isin(array, (0, 1, 2, 3)).all():
            raise MedtutError(
                f"{caller}: the {name} {array.shape} must hold labels 0 to 3, not "
                f"{np.unique(array)[:6]}. Take argmax of logits; on disk ET is 4."
            )
        maps.append(array.astype(np.uint8))
    if maps[0].shape != maps[1].shape:
        raise MedtutError(
            f"{caller}: prediction {maps[0].shape} and label {maps[1].shape} must have "
            "the same shape."
        )
    # Most of a head is background: the box makes a case some twenty times cheaper and
    # changes no score.
    box = find_objects((maps[0] | maps[1]).astype(bool).astype(np.uint8))
    cut = [one[box[0]] if box else one.flat[:1] for one in maps]
    return {
        key: [torch.from_numpy(np.isin(one, of)) for one in cut]
        for key, of in REGIONS.items()
    }


def region_dice(prediction: ArrayLike, label: ArrayLike) -> dict[str, float]:
    """Dice of one patient: regions WT, TC, ET, the classes NCR, ED, and their mean.

    Parameters
    ----------
    prediction, label : integer arrays or tensors of one shape, labels 0 to 3.
        A patient's whole volume (X, Y, Z), or one slice.

    Returns
    -------
    dict with WT, TC, ET, NCR, ED and ``foreground``, the mean of the classes NCR, ED
    and ET that are not `NOTHING`. Background never counts.

    Raises
    ------
    MedtutError
        Shapes differ, or values other than 0 to 3.
    """
    dice = {
        key: float(tissue_dice(*(one[None].long() for one in pair), 2)[0, 0])
        for key, pair in _tumour(prediction, label, "region_dice").items()
    }
    there = [dice[key] for key in CLASSES if not math.isnan(dice[key])]
    return dice | {"foreground": float(np.mean(there)) if there else NOTHING}


def hd95(
    prediction: ArrayLike,
    label: ArrayLike,
    spacing: Sequence[float],
    penalty: float = PENALTY,
) -> dict[str, float]:
    """95th percentile of the Hausdorff distance of WT, TC and ET in mm, through MONAI.

    The larger of the two directed percentiles between the surfaces, as in BraTS.

    Parameters
    ----------
    prediction, label : as in `region_dice`.
    spacing : edge lengths of a voxel in mm, one per axis.
    penalty : mm for a region that only one of the two maps has.

    Raises
    ------
    MedtutError
        As `region_dice`, or a spacing that does not fit the volume.
    """
    from monai.metrics import compute_hausdorff_distance as measure

    masks = _tumour(prediction, label, "hd95")
    edges = [float(one) for one in spacing]
    if len(edges) != np.ndim(label) or not all(0 < one < math.inf for one in edges):
        raise MedtutError(f"hd95: {edges} are no {np.ndim(label)} voxel edges in mm.")
    found = {}
    for key in NESTED:
        first, second = masks[key]
        some = bool(first.any()), bool(second.any())
        found[key] = penalty if any(some) else NOTHING
        if all(some):
            pair = first[None, None].float(), second[None, None].float()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # within MONAI
                # The background: the one channel is the region itself.
                found[key] = float(measure(*pair, True, "euclidean", 95, False, edges))
    return found


def score_case(
    prediction: ArrayLike,
    label: ArrayLike,
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    distances: bool = True,
) -> dict[str, float]:
    """`region_dice` and, under "HD95 WT" and so on, `hd95` of one patient."""
    scores = region_dice(prediction, label)
    if distances:
        far = hd95(prediction, label, spacing)
        scores |= {f"HD95 {key}": value for key, value in far.items()}
    return scores


def score_cases(cases: Iterable[tuple], distances: bool = True) -> list[dict]:
    """`score_case` of every (prediction, label, spacing), one patient at a time."""
    return [score_case(*one, distances=distances) for one in cases]


def case_table(scores: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Turn one dict per patient into one array (patients,) per metric.

    Raises
    ------
    MedtutError
        No patient, or patients with different metrics.
    """
    if not scores or any(one.keys() != scores[0].keys() for one in scores):
        raise MedtutError(
            f"case_table: {len(scores)} patients; expected some, all with the same "
            "metrics."
        )
    return {key: np.array([one[key] for one in scores]) for key in scores[0]}


@dataclass(frozen=True)
class Summary:
    """Metrics over patients: ``rows[metric]`` holds `COLUMNS`; prints as a table."""

    rows: dict[str, dict[str, float]]

    def _cells(self) -> list[list[str]]:
        return [
            [key, *(f"{row[one]:.3f}" for one in COLUMNS[:-1]), f"{row['n']:.0f}"]
            for key, row in self.rows.items()
        ]

    def __str__(self) -> str:
        lines = [["", *COLUMNS], *self._cells()]
        wide = max(len(one[0]) for one in lines)
        return "\n".join(
            a.ljust(wide) + "".join(one.rjust(9) for one in more) for a, *more in lines
        )

    __repr__ = __str__

    def _repr_html_(self) -> str:
        head = "".join(f"<th scope='col'>{one}</th>" for one in ("metric", *COLUMNS))
        body = "".join(
            f"<tr><th scope='row'>{escape(key)}</th>"
            + "".join(f"<td>{one}</td>" for one in cells)
            + "</tr>"
            for key, *cells in self._cells()
        )
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def summary(scores: Sequence[Mapping[str, Any]]) -> Summary:
    """Mean, median, min, max, standard deviation and number of patients per metric.

    `NOTHING` is left out, so ``n`` says how many patients a row speaks of. The
    deviation is the sample's (n - 1). Entries that are no numbers, such as ids, are
    skipped.
    """
    rows, measures = {}, (np.mean, np.median, np.min, np.max)
    for key, values in case_table(scores).items():
        if values.dtype.kind not in "fiu":
            continue
        there = values[~np.isnan(values)]
        n = len(there)
        said = [measure(there) if n else NOTHING for measure in measures]
        deviation = np.std(there, ddof=1) if n > 1 else NOTHING
        rows[key] = dict(zip(COLUMNS, map(float, (*said, deviation, n)), strict=True))
    return Summary(rows)
