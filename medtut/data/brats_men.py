"""BraTS-MEN 2023: meningiomas, four scan types, as slices for a promptable model.

One folder per study, ``BraTS-MEN-00007-000`` with ``-t1c``, ``-t1n``, ``-t2f``,
``-t2w`` and ``-seg`` (``.nii.gz``); the last three digits are the time point. Labels
are 0..3 on disk as in the package (LaBella et al., Scientific Data 11, 496, 2024). The
target of the lesson is the whole lesion, label > 0.

Two ways lead from a volume to pictures. ``"published"`` follows the public code of
lesson 03's source: `scale_published`, a crop, 8 bits, rows from right to left of the
patient's, so that a picture lies on its side (138 × 202). ``"clean"`` is `scale_clean`
with anterior up. `to_volume` leads back, exactly.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from functools import partial
from itertools import starmap
from typing import Any, Literal

import numpy as np
from tqdm.auto import tqdm

from medtut.data.brats import BratsError, Case, Layout, find_cases, load_case, read_mask
from medtut.data.brats_slices import file_facts
from medtut.data.cache import cached_arrays

MEN = ("t1c", "t1n", "t2f", "t2w")
_OTHER = "made for BraTS 2021 or before (4 was enhancing tumour) or after surgery"
BRATS_MEN = Layout(MEN, ("seg",), "-", (0, 1, 2, 3), 4, _OTHER)
Region = tuple[tuple[int, int], ...]  # (x0, x1), (y0, y1), (z0, z1), ends exclusive
# What the published code keeps of 240 × 240 × 155: 138 × 202 × 138 voxels around the
# middle. It is the same in canonical orientation, being symmetric in x and y.
PUBLISHED_CROP: Region = ((51, 189), (19, 221), (9, 147))
Pipeline = Literal["clean", "published"]
POLICIES = ("max", "all", "second", "random")
VERSION = 1  # part of every cache key: raise it when what is stored changes

# `medtut.data.brats.find_cases` for this set: root, modalities, masks -> list of Case.
find_men_cases = partial(find_cases, layout=BRATS_MEN)


def patient_of(case_id: str) -> str:
    """Return the patient of a study: BraTS-MEN-00007-001 -> BraTS-MEN-00007.

    Several studies of one patient belong in one part of a split; a name of another
    kind is its own patient.
    """
    return re.sub(r"(?<=-\d{5})-\d{3}$", "", case_id)


def _key(case: Case, *more: Any) -> list:
    files = [case.mask, *case.images.values()]
    return [VERSION, *more, *[file_facts(path) for path in files if path]]


# --- the crop ----------------------------------------------------------------------


def _measure(case: Case, modalities: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Box of what is not 0 in an image or in the mask, and the shape; cached."""

    def make() -> dict[str, Any]:
        from scipy.ndimage import find_objects

        volume = load_case(case, modalities)
        label = [] if volume.label is None else volume.label[None]
        inside = np.any([*volume.image, *label], axis=0)
        box = [(s.start, s.stop) for s in find_objects(inside.astype(int))[0]]
        return {"box": box, "shape": inside.shape}

    return cached_arrays("brats_men/box", _key(case, modalities), make)


def union_box(cases: Sequence[Case], modalities: tuple[str, ...] = MEN) -> Region:
    """Return the smallest box that holds brain and tumour of all cases.

    Brain is what is not 0 in any of the modalities; the mask counts too, so no tumour
    is cut off. Take the union over *all* parts of a split (it tells of positions, not
    of labels): pictures of all parts then have one size. Found once per case, then
    cached.

    Returns
    -------
    ((x0, x1), (y0, y1), (z0, z1))
        Voxels in canonical orientation, ends exclusive.

    Raises
    ------
    BratsError
        No case, a case that cannot be read, or cases of different shapes.
    """
    bar = tqdm(cases, "measuring brains", delay=3, unit="case")
    found = [_measure(case, tuple(modalities)) for case in bar]
    shapes = {tuple(one["shape"].tolist()) for one in found}
    if len(shapes) != 1:
        raise BratsError(f"union_box needs cases of one shape, not of {list(shapes)}.")
    boxes = np.array([one["box"] for one in found])
    low, high = boxes[:, :, 0].min(0).tolist(), boxes[:, :, 1].max(0).tolist()
    return tuple(zip(low, high, strict=True))


def crop(volume: np.ndarray, region: Region) -> np.ndarray:
    """Return the part (x, y, z) of a volume (X, Y, Z), as a view.

    Raises
    ------
    BratsError
        If the region leaves the volume: slicing would shorten it without a word, and
        `uncrop` could not lead back.
    """
    size = volume.shape
    if any(not 0 <= a < b <= n for (a, b), n in zip(region, size, strict=True)):
        raise BratsError(
            f"The crop {region} does not lie in a volume of {size}. Derive one with "
            "union_box(cases)."
        )
    return volume[tuple(starmap(slice, region))]


def uncrop(part: np.ndarray, region: Region, shape: Sequence[int]) -> np.ndarray:
    """Put a part back into a volume (X, Y, Z) of zeros: `crop` reversed.

    Raises
    ------
    BratsError
        If the region leaves the shape or is not of the part's size.
    """
    whole = np.zeros(shape, part.dtype)
    place = crop(whole, region)
    if place.shape != part.shape:  # numpy would repeat a single slice
        raise BratsError(f"{part.shape} voxels do not fill {region}: {place.shape}.")
    place[:] = part
    return whole


def cut_off(cases: Sequence[Case], region: Region = PUBLISHED_CROP) -> dict[str, int]:
    """Count the tumour voxels that a fixed crop loses.

    Returns
    -------
    dict
        Case id -> voxels of the mask outside, only of cases that lose any. A region
        that leaves the volume counts as far as it overlaps, as slicing does.
    """
    lost = {}
    for case in cases:
        if case.mask is None:
            raise BratsError(f"Case {case.id} has no mask: find it with masks=True.")
        tumour = read_mask(case.mask, case.layout)[0] > 0
        lost[case.id] = int(tumour.sum() - tumour[tuple(starmap(slice, region))].sum())
    return {name: voxels for name, voxels in lost.items() if voxels}


# --- intensities -------------------------------------------------------------------


def scale_published(image: np.ndarray) -> np.ndarray:
    """Scale one volume as the public code does: (X, Y, Z) to float32, k/255.

    z-score over the voxels that are not 0; linear to 0..255 (two decimals); the 1st to
    99th percentile of the *whole volume* to 0..1; 8 bits, the rest left off. The second
    step undoes the first, so no standardised value ever reaches the model; and as most
    of a volume is air, the 1st percentile is air and the 99th lies anywhere in the
    brain, by how much of the volume is brain. `scale_clean` asks the brain only.

    Raises
    ------
    BratsError
        If both percentiles are the same: less than 1 % of the voxels are brain.
    """
    brain = image[image != 0].astype(np.float64)
    score = (image - brain.mean()) / (brain.std() or 1)
    grey = np.round((score - score.min()) / (np.ptp(score) or 1) * 255, 2)
    return np.floor(_stretch(grey, grey, 1) * 255) / 255


def scale_clean(image: np.ndarray) -> np.ndarray:
    """Scale one volume by its brain: (X, Y, Z) to float32 in [0, 1], air 0.

    The 0.5th and 99.5th percentile of the voxels that are not 0 become 0 and 1: the
    gain of the scanner and the amount of air do not matter.
    """
    return np.where(image != 0, _stretch(image, image[image != 0], 0.5), 0)


def _stretch(values: np.ndarray, over: np.ndarray, tail: float) -> np.ndarray:
    low, high = np.percentile(over, (tail, 100 - tail))
    if not high > low:
        raise BratsError(f"An image cannot be scaled: percentiles {low:g}, {high:g}.")
    return np.clip((values - low) / (high - low), 0, 1).astype(np.float32)


SCALES = {"clean": scale_clean, "published": scale_published}


def rgb8(image: np.ndarray) -> np.ndarray:
    """Return (H, W) in [0, 1] as (H, W, 3) uint8, three times the same grey."""
    return np.repeat(np.rint(image * 255).astype(np.uint8)[..., None], 3, -1)


# --- slices ------------------------------------------------------------------------


def choose_slices(
    mask: np.ndarray, policy: str, count: int = 1, seed: int | Sequence[int] = 0
) -> list[int]:
    """Choose axial levels of a mask (X, Y, Z), from the lowest up.

    Parameters
    ----------
    policy : {"max", "all", "second", "random"}
        The level of the largest area (the lowest of equal ones); every level with
        tumour; every second of these; ``count`` of these, drawn with ``seed`` (all if
        there are not more).

    Notes
    -----
    These are levels of the volume. The published ``find_slices(skip=1)`` measures every
    second level and returns positions in that shorter list: levels half as high, which
    may hold no tumour.

    Raises
    ------
    BratsError
        An unknown policy, not 3 axes, or no tumour at all.
    """
    area = (np.asarray(mask) > 0).sum((0, 1))
    levels = np.flatnonzero(area)
    if policy not in POLICIES or area.ndim != 1 or not levels.size:
        raise BratsError(
            f"choose_slices: one of {POLICIES} and a mask (X, Y, Z) that is not empty "
            f"are needed, not {policy!r} and {np.shape(mask)}, {area.sum()} voxels."
        )
    drawn = sorted(np.random.default_rng(seed).permutation(levels)[:count])
    every = {"max": [area.argmax()], "all": levels, "second": levels[::2]}
    return [int(z) for z in every.get(policy, drawn)]


def _pictures(volume: np.ndarray, pipeline: Pipeline) -> np.ndarray:
    """(X, Y, Z) -> (Z, H, W)."""
    # The published code does not turn what it reads; files of the set run to the left
    # and to the back.
    turned = np.rot90(volume) if pipeline == "clean" else volume[::-1, ::-1]
    return np.ascontiguousarray(turned.transpose(2, 0, 1))


def to_volume(
    stack: np.ndarray, shape: Sequence[int], pipeline: Pipeline, region: Region | None
) -> np.ndarray:
    """Bring pictures of all levels back to the grid of the case, exactly.

    Parameters
    ----------
    stack : (Z, H, W)
        As `volume_slices` gives them, or labels on them.
    shape : (X, Y, Z)
        Of the case; outside of ``region`` it is 0.
    """
    planes = np.asarray(stack).transpose(1, 2, 0)
    back = np.rot90(planes, -1) if pipeline == "clean" else planes[::-1, ::-1]
    return uncrop(back, region or tuple((0, n) for n in shape), shape)


def volume_slices(
    case: Case,
    modalities: Sequence[str] = MEN,
    pipeline: Pipeline = "clean",
    region: Region | None = None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Every axial level of one case, tumour or not, for going through a volume.

    Returns
    -------
    images : (Z, M, H, W) float32 in [0, 1]
        The slices that `MenSlices` gives, of every level of the region.
    mask : (Z, H, W) bool, or None for a case without

    Raises
    ------
    BratsError
        An unknown pipeline, a region that leaves the volume or cuts tumour off, or what
        `load_case` refuses.
    """
    if pipeline not in SCALES:
        raise BratsError(f"pipeline is one of {list(SCALES)}, not {pipeline!r}.")
    volume = load_case(case, tuple(modalities))
    region = region or tuple((0, n) for n in volume.image.shape[1:])
    scaled = [crop(SCALES[pipeline](image), region) for image in volume.image]
    images = np.stack([_pictures(part, pipeline) for part in scaled], 1)
    if volume.label is None:
        return images, None
    tumour = volume.label > 0
    kept = crop(tumour, region)
    if lost := int(tumour.sum() - kept.sum()):
        raise BratsError(
            f"The crop {region} cuts {lost} voxels off the tumour in {case.mask}. "
            "Derive one that holds all with union_box(cases)."
        )
    return images, _pictures(kept, pipeline)


class MenSlices:
    """Slices with tumour of several cases: a map-style set with ``len`` and ``[]``.

    The tumour slices of a case are prepared once, then read from the cache; an
    interrupted preparation goes on where it stopped. The chosen ones stay in memory.

    Parameters
    ----------
    cases : sequence of Case
        With masks, each once.
    modalities : sequence of str
    policy, count, seed
        See `choose_slices`. "random" draws for every case apart, the same levels in
        every modality.
    pipeline : {"clean", "published"}
    region : Region, optional
        What is kept of the volumes, for example ``union_box(all_cases)``; all of it by
        default.

    Attributes
    ----------
    index : list of (case id, z, modality)
        In this order, modalities running fastest; z in the whole volume.

    Notes
    -----
    An item is ``{"image": (H, W) float32 in [0, 1], "mask": (H, W) bool, "case": str,
    "z": int, "modality": str}``, turned as the pipeline has it. Images are kept as
    float16: within 0.0003, and `rgb8` finds the 8 bits of "published" exactly.

    Raises
    ------
    BratsError
        No case or one twice, no mask, an empty mask (the file is named), or what
        `volume_slices` refuses.
    """

    def __init__(
        self,
        cases: Sequence[Case],
        modalities: Sequence[str] = MEN,
        policy: str = "max",
        pipeline: Pipeline = "clean",
        region: Region | None = None,
        count: int = 1,
        seed: int = 0,
    ) -> None:
        self._items: list[dict[str, Any]] = []
        if not cases or len({c.id for c in cases}) < len(cases):
            raise BratsError("MenSlices: at least one case, each once, is needed.")
        for case in tqdm(cases, "preparing slices", delay=3, unit="case"):
            found = _tumour_slices(case, tuple(modalities), pipeline, region)
            own = (seed, zlib.crc32(case.id.encode()))
            stack = found["mask"].transpose(1, 2, 0)
            for row in choose_slices(stack, policy, count, own):
                # Copies: a view would keep all slices of the case in memory.
                item = {"mask": found["mask"][row].copy(), "case": case.id}
                item["z"] = int(found["z"][row])
                for image, name in zip(found["image"][row], modalities, strict=True):
                    self._items.append(item | {"image": image.copy(), "modality": name})
        self.index = [(i["case"], i["z"], i["modality"]) for i in self._items]

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, i: int) -> dict[str, Any]:
        item = self._items[i]
        return item | {"image": item["image"].astype(np.float32)}


def _tumour_slices(
    case: Case, modalities: tuple[str, ...], pipeline: Pipeline, region: Region | None
) -> dict[str, np.ndarray]:
    """``image`` (N, M, H, W) float16, ``mask`` (N, H, W), ``z`` (N,); cached."""

    def make() -> dict[str, np.ndarray]:
        images, mask = volume_slices(case, modalities, pipeline, region)
        if mask is None or not mask.any():
            raise BratsError(
                f"Case {case.id} has no tumour slice ({case.mask or 'no mask'}): leave "
                "it out, or go through it with volume_slices."
            )
        rows = np.flatnonzero(mask.any((1, 2)))
        z = rows + (region[2][0] if region else 0)
        return {"image": images[rows].astype(np.float16), "mask": mask[rows], "z": z}

    key = _key(case, modalities, pipeline, region)
    return cached_arrays("brats_men/slices", key, make)
