"""A detector that asks a segmentation metric what it says to cases of known answer."""

from __future__ import annotations

import warnings
from functools import cache
from math import isnan, nan
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medtut.audit.report import Finding
from medtut.audit.subject import Subject, SubjectError

SIDE = 64
MISSED, SLACK = 0.1, 1e-3  # most that a complete miss may score; rounding


@cache
def _tables() -> dict[str, Any]:
    import yaml

    text = Path(__file__).with_suffix(".yml").read_text(encoding="utf-8")
    return yaml.safe_load(text)


def _batch(maps: list[list[tuple[int, int, int]]]) -> Tensor:
    """Label maps (N, 64, 64) with squares of (first row and column, side, label)."""
    batch = torch.zeros(len(maps), SIDE, SIDE, dtype=torch.long)
    for label, squares in zip(batch, maps, strict=True):
        for start, side, value in squares:
            label[start : start + side, start : start + side] = value
    return batch


def metric_misbehaves(subject: Subject) -> tuple[list[Finding], list[str]]:
    """Find a segmentation metric that counts background or fails on empty cases.

    `subject.metric` is called as ``metric(prediction, label) -> number`` with integer
    tensors (1, 64, 64), labels 0 to 3: a batch of one slice, or a volume of one.
    """
    if subject.metric is None:
        return [], []
    score, failed = {}, {}
    for key, maps in _tables()["probes"].items():
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                score[key] = float(subject.metric(*map(_batch, maps)))
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
    told = _tables()["findings"]
    # What stands later in this list would follow from what stands earlier.
    said: list[str] = []
    if not (abs(perfect - 1) < SLACK and perfect > half > none):
        said.append("order")
    else:
        counted = not (missed <= MISSED and misplaced <= MISSED)
        said += ["background"] * counted
        if failed.keys() & set(told["empty"]["shown"]):
            said.append("empty")
        elif isnan(lesion) or lesion > 1 - SLACK:
            said.append("alarm")
        elif not counted and max(voxel, lesion) > MISSED:
            said.append("smooth")
        elif empty < 1 - SLACK:
            said.append("right")
    numbers = score | failed
    found = []
    for one in (told[key].copy() for key in said):
        shown = {key: numbers[key] for key in one.pop("shown")}
        found.append(Finding("metric_misbehaves", **one, numbers=shown))
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
