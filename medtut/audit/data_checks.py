"""Detectors that look at the data: a split that leaks, channels that were not moved.

Each takes a `Subject` and returns (findings, notes), both empty where the subject does
not carry what the detector looks at.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import combinations
from pathlib import PureWindowsPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medtut.audit.report import Finding
from medtut.audit.subject import Subject, SubjectError, tensors_in
from medtut.data.near_duplicates import alike, thumbnails

# Two thumbnails are of one patient when both their intensities and their details agree.
# On slices of one deformed template, neighbours at 2 mm have 0.998 and 0.956 (medians),
# other subjects and mirror images at most 0.992 and 0.865.
ALIKE, ALIKE_DETAIL = 0.99, 0.9
MOST_IMAGES = 4000  # per side; more are sampled evenly
# Row differences read back over those as is: photographs and brain slices have 0.03 to
# 0.35 with the defect, 0.57 under heavy noise, and at least 0.98 without it.
ROWS_RATIO, SAME_CHANNELS = 0.6, 0.9

# What follows the patient in a name: file endings, sequences, slice numbers.
_TAIL = re.compile(
    r"(\.(nii|gz|png|jpe?g|np[yz]|h5|dcm|tiff?|bmp|nrrd|mha|pt)"
    r"|[-_.](flair|t1(ce|c|n|gd)?|t2[wf]?|seg|mask|label)"
    r"|(^|[-_. ])(z|sl|slice|frame|axial|coronal|sagittal)[-_ ]?\d+)$",
    re.I,
)
_NOBODY = re.compile(r"(images?|slices?|data|train|val\w*|test|masks?|labels?)?$", re.I)
_VISIT = re.compile(r"^(BraTS-[A-Z]+-\d+)-\d{3}$", re.I)  # later scans of one patient


def patient_id(item: Any) -> str:
    """Whose image an entry of a split is, as far as its name tells.

    Takes an id, a path, an (id, z) tuple, a MONAI-style dict or anything with ``id``;
    drops file endings, slice and sequence suffixes and BraTS' visit number.
    ``p7/slice_012.png`` belongs to p7.
    """
    if isinstance(item, Mapping):
        keys = ("patient", "case", "id", "image")
        item = next((item[key] for key in keys if key in item), str(item))
    if isinstance(item, tuple | list) and item:
        return patient_id(item[0])
    path = PureWindowsPath(str(getattr(item, "id", item)))  # reads both separators
    name = path.name
    while name != (shorter := _TAIL.sub("", name)):
        name = shorter
    if not name:  # the file is only a slice number: its folder may be the patient
        folder = path.parent.name
        name = path.name if _NOBODY.match(folder) else folder
    return _VISIT.sub(r"\1", name).casefold()


def _side(name: str, value: Any) -> tuple[list[Any], Tensor | None]:
    """Ids and thumbnails of one side of a split, in whichever form it was given."""
    if not isinstance(value, Mapping):
        value = {"images" if getattr(value, "ndim", 0) > 1 else "ids": value}
    ids, images = value.get("ids"), value.get("images")
    x = np.zeros((0, 1, 1)) if images is None else images
    x = torch.as_tensor(np.asarray(x[:: 1 + len(x) // MOST_IMAGES])).float()
    if x.ndim == 4:
        x = x.mean(-1 if x.shape[-1] <= 4 else 1)
    if isinstance(ids, str) or x.ndim != 3 or (ids is None and images is None):
        raise SubjectError(
            f"split[{name!r}] must be a list of ids or paths, an array (N, H, W) or "
            "(N, C, H, W) of images, or a dict with 'ids', 'images' or both."
        )
    found = np.asarray(ids).tolist() if hasattr(ids, "ndim") else list(ids or ())
    if not len(x):
        return found, None
    return found, thumbnails(x)


def split_shares_a_patient(subject: Subject) -> tuple[list[Finding], list[str]]:
    """Find a patient on two sides of the split, by id and by near-duplicate images.

    Neighbouring slices of a head are nearly the same picture, so a split over slices
    tests on what was trained on.
    """
    if subject.split is None:
        return [], []
    name, found = "split_shares_a_patient", []
    split = subject.split
    if not isinstance(split, Mapping) and hasattr(split, "__dict__"):
        # Of an object, its lists of names: what else it carries says how it was drawn.
        split = {
            key: value
            for key, value in vars(split).items()
            if isinstance(value, tuple | list)
            and all(isinstance(v, str) for v in value)
        }
    if not isinstance(split, Mapping):
        raise SubjectError("split must map names such as 'train' to what is in them.")
    sides = {str(key): _side(key, value) for key, value in split.items()}
    owner = subject.patient_of or patient_id
    patients = {key: {owner(one) for one in ids} for key, (ids, _) in sides.items()}
    for one, other in combinations(sides, 2):
        where = f"{one} / {other}"
        shared = sorted(patients[one] & patients[other], key=str)
        if shared:
            message = (
                f"{len(shared)} patients are on both sides, such as "
                f"{', '.join(map(str, shared[:3]))}: scores on {other} measure memory. "
                "Split the patients first, then list their slices."
            )
            of = {f"of_patients_in_{key}": len(patients[key]) for key in (one, other)}
            numbers = {"shared_patients": len(shared), **of}
            found.append(Finding(name, "error", where, message, numbers))
        first, second = sides[one][1], sides[other][1]
        if first is None or second is None:
            continue
        rows = [
            alike(part, first, ALIKE, ALIKE_DETAIL).max(1) for part in second.split(512)
        ]
        best = torch.cat([row.values for row in rows])
        if count := int((best > 0).sum()):
            k = int(best.argmax())
            twin = int(torch.cat([row.indices for row in rows])[k])
            message = (
                f"{count} of {len(best)} images compared of {other} have a near-"
                f"duplicate in {one}, such as its number {k} and number {twin}. Are "
                "they slices of the same patients?"
            )
            numbers = {"near_duplicates": count, "of_images": len(best)}
            numbers["largest_correlation"] = float(best.max())
            found.append(Finding(name, "warning", where, message, numbers))
    return found, []


def hwc_viewed_as_chw(subject: Subject) -> tuple[list[Finding], list[str]]:
    """Find images whose channels were moved by ``view`` instead of ``permute``.

    ``hwc.view(c, h, w)`` has the right shape and the wrong pixels: a row of it takes
    up where the last one stopped, a third of a picture's row further on. Read back as
    (h, w, c), its rows are neighbours again. For a sound image that reading makes
    rows strangers (lag 3 in place of 1), so the ratio of the two row differences is
    near 0.1 for the defect and above 1 without it.

    Looks at `subject.images`, else at the images (B, C, H, W) in the batch. Anything
    that resamples the picture after the ``view`` hides the traces.
    """
    given = subject.images if subject.images is not None else subject.batch
    given = torch.as_tensor(given) if isinstance(given, np.ndarray) else given
    found = []
    for x in tensors_in(given):
        if x.ndim != 4 or not 2 <= x.shape[1] <= 4 or min(x.shape[2:]) < 8:
            continue
        x = x.detach().cpu().double().nan_to_num()
        b, c, h, w = x.shape
        back = x.reshape(b, h, w, c)
        as_is = x.diff(dim=2).abs().flatten(1).mean(1)
        read_back = back.diff(dim=1).abs().flatten(1).mean(1)
        ratio = read_back / as_is  # NaN, thus unsuspected, for a constant image
        flat = x.flatten(2) - x.flatten(2).mean(2, keepdim=True)
        flat = flat / flat.norm(dim=2, keepdim=True).clamp_min(1e-12)
        # The thirds of a picture do not match pixel by pixel; true channels may.
        differ = (flat @ flat.mT).flatten(1).amin(1) < SAME_CHANNELS
        # Grey repeated to c channels: every value stands there c times in a row.
        varied = x.diff(dim=3).flatten(1).any(1)
        grey = (back == back[..., :1]).flatten(1).all(1) & varied
        bad = differ & ((ratio < ROWS_RATIO) | (grey & (ratio < 1.5)))
        count, told = int(bad.sum()), int((as_is > 0).sum())
        if 2 * count > told:
            message = (
                f"{count} of {told} images look like (H, W, {c}) memory viewed as "
                f"({c}, H, W): each channel shows a strip of the picture, its colours "
                "side by side. Use permute(0, 3, 1, 2), not view or reshape."
            )
            both = {"as_is": as_is, "read_as_hwc": read_back}
            numbers: dict[str, Any] = {
                f"row_difference_{key}": float(x[bad].mean()) for key, x in both.items()
            }
            numbers |= {"ratio": float(ratio[bad].mean()), "images": count}
            where = "images " + "×".join(map(str, x.shape))
            found.append(Finding("hwc_viewed_as_chw", "error", where, message, numbers))
    return found, []
