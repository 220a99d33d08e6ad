"""A detector that asks a segmentation metric what it says to cases of known answer."""

from __future__ import annotations

import warnings
from math import isnan, nan

import torch
from torch import Tensor

from medtut.audit.report import Finding
from medtut.audit.subject import Subject, SubjectError

SIDE = 64
MISSED, SLACK = 0.1, 1e-3  # most that a complete miss may score; rounding

_SAID = {
    "order": "A perfect prediction must score 1, one that finds half less, one that "
    "finds nothing least. Is it a loss, or a percentage?",
    "background": "A lesion missed completely must score about 0. What it scores more "
    "comes from the background, nearly all of the image (leave class 0 out), or from "
    "classes that are in neither map (leave these out too).",
    "empty": "An empty label stops the metric.",
    "alarm": "A lesion found where there is none must score 0: NaN hides it from the "
    "mean or spoils the mean, 1 rewards it.",
    "smooth": "A false alarm on an empty label scores above 0, more the smaller it is: "
    "a smoothing term such as (2·overlap + 1) / (sizes + 1) does this.",
    "right": "An empty label left empty is right: score it 1, or NaN to leave it out.",
}
_SHOWN = {
    "order": ("perfect", "half_found", "none_found"),
    "background": ("tiny_lesion_missed", "tiny_lesion_misplaced"),
    "empty": ("empty_left_empty", "one_voxel_on_empty", "lesion_on_empty"),
}


def _map(*squares: tuple[int, int, int]) -> Tensor:
    """A label map (1, 64, 64) with squares of (first row and column, side, label)."""
    label = torch.zeros(1, SIDE, SIDE, dtype=torch.long)
    for start, side, value in squares:
        label[:, start : start + side, start : start + side] = value
    return label


def _probes() -> dict[str, tuple[Tensor, Tensor]]:
    """Prediction and label of every probe, by name."""
    nothing, tiny, big = _map(), _map((10, 6, 1)), _map((20, 20, 1))
    return {
        "perfect": (big, big),
        "half_found": (_map((20, 14, 1)), big),
        "none_found": (nothing, big),
        "tiny_lesion_missed": (nothing, tiny),
        "tiny_lesion_misplaced": (_map((40, 6, 1)), tiny),
        "classes_swapped": (_map((4, 9, 2), (24, 9, 1)), _map((4, 9, 1), (24, 9, 2))),
        "empty_left_empty": (nothing, nothing),
        "one_voxel_on_empty": (_map((30, 1, 1)), nothing),
        "lesion_on_empty": (tiny, nothing),
        "two_in_a_batch": (torch.cat([nothing, big]), torch.cat([tiny, big])),
    }


def metric_misbehaves(subject: Subject) -> tuple[list[Finding], list[str]]:
    """Find a segmentation metric that counts background or fails on empty cases.

    `subject.metric` is called as ``metric(prediction, label) -> number`` with integer
    tensors (1, 64, 64), labels 0 to 3: a batch of one slice, or a volume of one.
    """
    if subject.metric is None:
        return [], []
    score, failed = {}, {}
    for key, maps in _probes().items():
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                score[key] = float(subject.metric(*(one.clone() for one in maps)))
        except Exception as error:
            score[key], failed[key] = nan, f"{type(error).__name__}: {error}"
    if "perfect" in failed:
        raise SubjectError(
            "metric(prediction, label) failed on integer label maps (1, 64, 64) with "
            f"a lesion: {failed['perfect']}"
        )
    perfect, half, none, missed, misplaced, swapped, empty, voxel, lesion, pooled = (
        score.values()
    )
    # What stands later in this list would follow from what stands earlier.
    said: list[str] = []
    if not (abs(perfect - 1) < SLACK and perfect > half > none):
        said.append("order")
    else:
        counted = not (missed <= MISSED and misplaced <= MISSED)
        said += ["background"] * counted
        if failed.keys() & set(_SHOWN["empty"]):
            said.append("empty")
        elif isnan(lesion) or lesion > 1 - SLACK:
            said.append("alarm")
        elif not counted and max(voxel, lesion) > MISSED:
            said.append("smooth")
        elif empty < 1 - SLACK:
            said.append("right")
    numbers = score | failed
    found = [
        Finding(
            "metric_misbehaves",
            "warning" if key in ("smooth", "right") else "error",
            key if key in ("order", "background") else "empty label",
            _SAID[key],
            {one: numbers[one] for one in _SHOWN.get(key, _SHOWN["empty"])},
        )
        for key in said
    ]
    if "order" in said:
        return found, []  # the rest reads scores between 0 and 1
    notes = []
    if swapped > 1 - SLACK:
        notes.append("the metric does not tell classes 1 and 2 apart")
    if empty > 1 - SLACK:
        notes.append("the metric scores an empty label left empty 1: say how many are")
    if abs(pooled - (perfect + missed) / 2) > SLACK:
        notes.append(
            "the metric pools a batch: small lesion missed and large one found get "
            f"{pooled:.3f} together, {(perfect + missed) / 2:.3f} as a mean of two; "
            "give it one patient at a time"
        )
    return found, notes
