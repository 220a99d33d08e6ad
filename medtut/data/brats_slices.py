"""Axial slices of BraTS cases, prepared once and read from the cache.

A case is read, normalised and resized one time; what is left is one ``.npy`` from which
single slices are read through a memory map. The entry is named after the case's files
(path, size, time of change) and everything that was asked for, so a case that was
prepared is never prepared again, also after an interruption.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from medtut.data.brats import BratsError, Case, load_case, read_mask
from medtut.data.cache import cached_file, cached_json

VERSION = 1  # part of every cache key: raise it when what is stored changes
NEAREST = "nearest-exact"  # torch's plain "nearest" is half a pixel off the image
Normalise = Literal["brain", "slice"]


def normalise_volume(image: np.ndarray, how: Normalise) -> np.ndarray:
    """Bring intensities to a common scale.

    Parameters
    ----------
    image : (C, X, Y, Z) float32
    how : {"brain", "slice"}
        "brain": mean and standard deviation over the voxels of the volume that are not
        0 (BraTS is skull-stripped), each channel apart; background stays 0. "slice":
        those of the whole slice, background included, as the published code does: the
        same tissue then gets another value on every level, by how much air is around.

    Returns
    -------
    (C, X, Y, Z) float32
    """
    if how not in ("brain", "slice"):
        raise BratsError(f"normalise must be 'brain' or 'slice', not {how!r}.")
    inside = image != 0 if how == "brain" else np.ones(image.shape, bool)
    over = {"axis": (1, 2, 3) if how == "brain" else (1, 2), "keepdims": True}
    mean = image.mean(**over, where=inside, dtype=np.float64)
    std = image.std(**over, where=inside, dtype=np.float64)
    scaled = (image - mean) / np.where(std > 0, std, 1)
    return np.where(inside, scaled, 0).astype(np.float32)


def _to_slices(volume: np.ndarray, size: int, mode: str) -> Tensor:
    """(C, X, Y, Z) -> (Z, C, size, size), anterior up, patient's left on the left."""
    turned = np.ascontiguousarray(np.rot90(volume, axes=(1, 2)).transpose(3, 0, 1, 2))
    return interpolate(torch.from_numpy(turned).float(), (size, size), mode=mode)


def to_volume(labels: Any, shape: Sequence[int]) -> np.ndarray:
    """Bring predicted slices back to the grid of the case: the way in, reversed.

    Parameters
    ----------
    labels : (Z, size, size) int array or tensor
    shape : (X, Y, Z)

    Returns
    -------
    (X, Y, Z) uint8
        Nearest neighbour between pixel centres. For a ``size`` not below X and Y, a
        label that went to slices and back is exactly the same; from 240 to 224 pixels
        and back, one row in 15 is its neighbour's.
    """
    stack = torch.as_tensor(labels)
    if stack.ndim != 3 or len(stack) != shape[2]:
        raise BratsError(
            f"to_volume: (Z, size, size) labels of all {shape[2]} slices are needed, "
            f"not {tuple(stack.shape)}."
        )
    back = interpolate(stack[:, None].float(), (shape[1], shape[0]), mode=NEAREST)
    turned = np.rot90(back[:, 0].byte().cpu().numpy(), k=-1, axes=(1, 2))
    return np.ascontiguousarray(turned.transpose(1, 2, 0))


def file_facts(path: Path) -> list:
    # Not a hash of the content: that would read 10 GB at every start.
    facts = path.stat()
    return [str(path.absolute()), facts.st_size, facts.st_mtime_ns]


def tumour_slices(case: Case) -> tuple[int, ...]:
    """Return the axial levels z whose mask is not empty, from the cache if known.

    This is the published rule for what is kept: a slice is dropped if its mask sums to
    0. Of the 369 · 155 = 57,195 slices of BraTS 2020 the source keeps 24,354.
    """
    if case.mask is None:
        raise BratsError(
            f"Case {case.id} has no mask, so its tumour slices are not known. Ask for "
            "slices='all', or find the cases with masks=True."
        )

    def make() -> list[int]:
        tumour = read_mask(case.mask, case.layout)[0].any((0, 1))
        return np.flatnonzero(tumour).tolist()

    return tuple(cached_json("brats/z", [VERSION, file_facts(case.mask)], make))


def _prepared(
    case: Case, modalities: Sequence[str], normalise: str, size: int, tumour: bool
) -> tuple[Path, Sequence[int]]:
    """Return the file with (N, C, size, size) float16 and the N levels z in it.

    Where there is a mask, its classes stand as one more channel: one read per item.
    """
    kept = tumour_slices(case) if tumour else None

    def make(path: Path) -> None:
        volume = load_case(case, tuple(modalities))
        z = slice(None) if kept is None else list(kept)
        scaled = normalise_volume(volume.image, normalise)[..., z]
        channels = [_to_slices(scaled, size, "bilinear")]
        if volume.label is not None:
            channels.append(_to_slices(volume.label[None, ..., z], size, NEAREST))
        np.save(path, torch.cat(channels, 1).half().numpy())

    used = [p for m, p in case.images.items() if m in modalities] + [case.mask]
    key = [VERSION, list(modalities), normalise, size, tumour]
    key += [file_facts(path) for path in used if path]
    path = cached_file("brats/slices", key, make, ".npy")
    return path, range(len(np.load(path, mmap_mode="r"))) if kept is None else kept


@lru_cache(maxsize=64)  # each holds a file descriptor; some systems allow 256
def _mapped(path: Path) -> np.ndarray:
    return np.load(path, mmap_mode="r")


def volume_slices(
    case: Case,
    modalities: Sequence[str] = ("flair",),
    normalise: Normalise = "brain",
    size: int = 224,
) -> Tensor:
    """All slices of one case, (Z, C, size, size) float32, for evaluation in 3-D."""
    path, _ = _prepared(case, modalities, normalise, size, tumour=False)
    return torch.from_numpy(np.load(path)[:, : len(modalities)]).float()


class SliceDataset:
    """Slices of several cases for training: a map-style set with ``len`` and ``[]``.

    Every case is prepared when the data set is made (a bar appears if that takes more
    than some seconds). It may be interrupted: what is done is not done again. Nothing
    is held open in the object, so that DataLoader workers can receive it.

    Parameters
    ----------
    cases : sequence of Case
    modalities : sequence of str
        The channels.
    normalise : {"brain", "slice"}
        See `normalise_volume`.
    slices : {"tumour", "all"}
        "tumour": only slices with a mask that is not empty (see `tumour_slices`).
    step : int
        Of the levels 0, 1, 2... of a case take every step-th.
    size : int
        Pixels of a side; images bilinear, labels nearest.

    Attributes
    ----------
    cases : tuple of Case
    index : list of (case id, z)

    Notes
    -----
    An item is ``{"image": (C, size, size) float32, "label": (size, size) int64,
    "case": str, "z": int}``, without "label" for a case without mask. Stored values are
    float16: within 0.05 % of the computed ones.
    """

    def __init__(
        self,
        cases: Sequence[Case],
        modalities: Sequence[str] = ("flair",),
        normalise: Normalise = "brain",
        slices: Literal["tumour", "all"] = "tumour",
        step: int = 1,
        size: int = 224,
    ) -> None:
        from tqdm.auto import tqdm

        self.cases, self.channels = tuple(cases), len(modalities)
        self.index: list[tuple[str, int]] = []
        self._rows: list[tuple[Path, int]] = []
        tumour = {"tumour": True, "all": False}.get(slices)
        if tumour is None or len({c.id for c in self.cases}) < len(self.cases):
            raise BratsError("SliceDataset: slices='tumour' or 'all', each case once.")
        for case in tqdm(self.cases, "preparing slices", delay=3, unit="case"):
            path, levels = _prepared(case, modalities, normalise, size, tumour)
            for row, z in enumerate(levels):
                if z % step == 0:
                    self.index.append((case.id, z))
                    self._rows.append((path, row))
        if not self.index:
            raise BratsError(
                f"SliceDataset: no slice is left of {len(self.cases)} cases with "
                f"slices={slices!r}, step={step}. Are there cases, and are masks empty?"
            )

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> dict[str, Any]:
        (case, z), (path, row) = self.index[i], self._rows[i]
        stored = torch.from_numpy(np.array(_mapped(path)[row]))
        item = {"image": stored[: self.channels].float(), "case": case, "z": z}
        if len(stored) > self.channels:
            item["label"] = stored[-1].long()
        return item

    def case_slices(self, case_id: str) -> list[int]:
        """Return the indices of the slices of one case, from the lowest level up."""
        return [i for i, (case, _) in enumerate(self.index) if case == case_id]
