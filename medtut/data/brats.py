"""Read BraTS folders as they are on disk, and write predictions back.

One folder per case, five files in it: ``<case>_flair.nii``, ``_t1``, ``_t1ce``,
``_t2`` and the mask ``_seg``, each ``.nii`` or ``.nii.gz`` (Menze et al., IEEE TMI
2015; Bakas et al., arXiv:1811.02629). Labels on disk are 0, 1 (necrotic core), 2
(oedema) and 4 (enhancing tumour); in the package 4 becomes 3: classes are 0..3. Sets
that name files or labels otherwise have a `Layout` of their own: BraTS-MEN 2023 is in
`medtut.data.brats_men`.

Volumes are turned to the closest canonical orientation (x to the right, y to the front,
z up), image and mask alike; `save_prediction` turns back.
"""

from __future__ import annotations

import gzip
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from medtut.data.splits import Split, load_split, save_split, split_cases, split_slices  # noqa: F401
from medtut.errors import MedtutError
from medtut.files import write_bytes

MODALITIES = ("flair", "t1", "t1ce", "t2")


class BratsError(MedtutError):
    """A folder, a file or a label of a BraTS data set is not as it should be."""


class Layout(NamedTuple):
    """How a data set names its files and its classes.

    Attributes
    ----------
    modalities, masks : the last part of the file names, the usual mask first.
    joint : what stands between the case and that part.
    on_disk : the labels of the classes 0..3; the first three are 0, 1, 2.
    foreign : a label that tells that the mask is of another kind, ``told`` in words.
    """

    modalities: tuple[str, ...]
    masks: tuple[str, ...]
    joint: str
    on_disk: tuple[int, ...]
    foreign: int
    told: str


_REMAPPED = "remapped to 0..3 before (on disk the 3 is a 4)"
BRATS2020 = Layout(MODALITIES, ("seg", "segm"), "_", (0, 1, 2, 4), 3, _REMAPPED)


@dataclass(frozen=True)
class Case:
    """Where the files of one study are; ``images`` in the order asked for."""

    id: str
    images: dict[str, Path]
    mask: Path | None
    layout: Layout = BRATS2020


@dataclass(frozen=True, eq=False)
class Volume:
    """One study in canonical orientation.

    Attributes
    ----------
    image : (C, X, Y, Z) float32
    label : (X, Y, Z) uint8 in 0..3, or None
    affine : (4, 4) float64
        From indices of these arrays to mm.
    spacing : (3,) mm
    """

    image: np.ndarray
    label: np.ndarray | None
    affine: np.ndarray
    spacing: tuple[float, float, float]


def _some(names: list[str], most: int = 5) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "nothing") + rest


def find_cases(
    root: Path | str,
    modalities: tuple[str, ...] | None = None,
    masks: bool = True,
    layout: Layout = BRATS2020,
) -> list[Case]:
    """List the cases in ``root`` or anywhere below it, sorted by id.

    Parameters
    ----------
    root : path
        The data set, a folder above it, or one case.
    modalities : tuple of str, optional
        Of the layout's; the others need not be there. All by default.
    masks : bool
        Every case must have its mask. If False, masks are not looked for, and
        ``Case.mask`` is None.
    layout : Layout
        The names and labels of the data set.

    Notes
    -----
    The mask of training case 355 is called ``W39_1998.09.19_Segm.nii`` in the copy on
    Kaggle. Where there is no ``_seg`` file, a ``_Segm`` file is taken.

    Raises
    ------
    BratsError
        No case, a missing or doubled file, a doubled id, or cases without mask.
    """
    root, folders, cases = Path(root), {}, {}
    modalities = layout.modalities if modalities is None else modalities
    joint, seg = layout.joint, layout.joint + layout.masks[0]
    kinds = "|".join(layout.modalities + layout.masks)
    # Not "._name", which macOS leaves beside each file that it unpacks.
    file = re.compile(rf"(?!\.).+{joint}({kinds})\.nii(\.gz)?", re.IGNORECASE)
    for path in sorted(root.rglob("*")):
        match = file.fullmatch(path.name)
        if match and path.is_file():
            kinds = folders.setdefault(path.parent, {})
            kinds.setdefault(match[1].lower(), []).append(path)
    if not folders:
        there = _some(sorted(p.name for p in root.rglob("*")))
        names = f".nii, {joint}".join((*layout.modalities, layout.masks[0]))
        raise BratsError(
            f"No BraTS case in {root}: looked there and below for <case>{joint}{names}"
            f".nii (or .nii.gz). Found {there}."
        )
    for folder, kinds in folders.items():
        name = folder.resolve().name
        if name in cases:
            raise BratsError(
                f"Case {name} stands twice below {root}, once in {folder}. Remove one, "
                "or name a folder further down."
            )
        images = {m: _only(kinds.get(m, []), joint + m, folder) for m in modalities}
        found = [kinds[m] for m in layout.masks if masks and m in kinds]
        mask = _only(found[0], seg, folder) if found else None
        cases[name] = Case(name, images, mask, layout)
    bare = sorted(c.id for c in cases.values() if c.mask is None)
    if masks and bare:
        every = len(bare) == len(cases)
        names = "this is the validation part, it has no masks" if every else _some(bare)
        raise BratsError(
            f"{len(bare)} of {len(cases)} cases in {root} have no <case>{seg}.nii: "
            f"{names}. Name the training part, or ask for masks=False to predict only."
        )
    return [cases[name] for name in sorted(cases)]


def _only(paths: list[Path], kind: str, folder: Path) -> Path:
    if len(paths) != 1:
        there = sorted(p.name for p in folder.iterdir())
        raise BratsError(
            f"Case {folder.resolve().name} has {len(paths) or 'no'} files *{kind}.nii "
            f"or .nii.gz, one is needed. In {folder}: {_some(there, 8)}."
        )
    return paths[0]


def _read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return voxels and affine, both in canonical orientation."""
    import nibabel

    try:
        image = nibabel.load(path)
        if len(image.shape) != 3:
            raise ValueError(f"not a 3-D volume, but of shape {image.shape}")
        image = nibabel.as_closest_canonical(image)
        voxels = np.asanyarray(image.dataobj)
        if bad := np.count_nonzero(~np.isfinite(voxels)):
            raise ValueError(f"{bad} of {voxels.size} voxels are NaN or infinite")
        return voxels, image.affine
    except Exception as error:  # zlib, gzip, nibabel and the system: each its own
        raise BratsError(
            f"{path} cannot be used: {error}. If it was damaged on the way, get it "
            "again; else leave the case out."
        ) from error


def read_mask(path: Path, layout: Layout = BRATS2020) -> tuple[np.ndarray, np.ndarray]:
    """Read a mask: (X, Y, Z) uint8 classes 0..3 and the (4, 4) affine, canonical."""
    mask, affine = _read(path)
    values, counts = np.unique(mask, return_counts=True)
    known, last = layout.on_disk, layout.on_disk[-1]
    wrong = {v: n for v, n in zip(values, counts, strict=True) if v not in known}
    if wrong:
        why = layout.told if set(wrong) == {layout.foreign} else "resampled"
        raise BratsError(
            f"{path} has labels other than 0, 1, 2 and {last}: "
            f"{_some([f'{v:g} ({n} voxels)' for v, n in wrong.items()])}. The mask was "
            f"probably {why}: get the original."
        )
    return np.where(mask == last, 3, mask).astype(np.uint8), affine


def load_case(case: Case, modalities: tuple[str, ...] = ("flair",)) -> Volume:
    """Read and check the images and the mask of one case.

    Parameters
    ----------
    case : Case
    modalities : tuple of str
        In the order of the channels; of those the case was found with.

    Raises
    ------
    BratsError
        A file that cannot be read, is not 3-D, holds NaN or infinity, is all zero or
        lies elsewhere than the first image (another shape, or half a voxel away by its
        header); a mask with other labels than the layout's.
    """
    if not modalities or not set(modalities) <= set(case.images):
        raise BratsError(
            f"Case {case.id} was found with {_some(list(case.images))}, not with "
            f"{modalities}: name those in find_cases(root, modalities=...)."
        )
    paths = [case.images[m] for m in modalities] + [case.mask] * bool(case.mask)
    read = [read_mask(p, case.layout) if p == case.mask else _read(p) for p in paths]
    shape, affine = read[0][0].shape, read[0][1]
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    corners = np.indices((2, 2, 2)).reshape(3, 8) * (np.c_[shape].T - 1)
    for path, (voxels, own) in zip(paths, read, strict=True):
        if path != case.mask and not voxels.any():
            raise BratsError(f"{path}: every voxel is 0. Get a copy, or skip it.")
        moved = (own - affine)[:3] @ np.r_[corners, np.ones((1, 8))]
        far = np.linalg.norm(moved, axis=0).max()
        if voxels.shape != shape or not far < spacing.min() / 2:
            raise BratsError(
                f"{path} is not on the grid of {paths[0]}: {voxels.shape}, {shape}; "
                f"{far:.1f} mm apart by the headers (affine). Get both again; "
                "if only the header is wrong, copy the image's."
            )
    label = read.pop()[0] if case.mask else None
    image = np.stack([voxels for voxels, _ in read]).astype(np.float32)
    return Volume(image, label, affine, tuple(spacing.tolist()))


def save_prediction(path: Path | str, label: np.ndarray, case: Case) -> Path:
    """Write classes as a BraTS mask that lies on the case's own files, by rename.

    The mask gets the labels of the layout, and the orientation, shape and header of
    the first image of the case: an evaluation server refuses one with another origin.

    Parameters
    ----------
    path : path
        Ends in ``.nii`` or ``.nii.gz``.
    label : (X, Y, Z) int in 0..3
        Canonical, as `load_case` gives it.

    Raises
    ------
    BratsError
        Another shape, other classes, another suffix, or a folder not writable.
    """
    import nibabel

    path, label = Path(path), np.asarray(label)
    image = nibabel.load(next(iter(case.images.values())))
    want, found = nibabel.as_closest_canonical(image).shape, np.unique(label).tolist()
    named = path.name.endswith((".nii", ".nii.gz"))
    if label.shape != want or not {0, 1, 2, 3}.issuperset(found) or not named:
        raise BratsError(
            f"Prediction for {case.id}: needs classes 0..3 in the shape {want} and a "
            f"name.nii.gz, not {_some(list(map(str, found)))} in {label.shape}, {path}."
        )
    canonical, own = [[0, 1], [1, 1], [2, 1]], nibabel.io_orientation(image.affine)
    turn = nibabel.orientations.ornt_transform(canonical, own)
    on_disk = np.array(case.layout.on_disk, np.uint8)[label.astype(np.intp)]
    voxels, header = nibabel.apply_orientation(on_disk, turn), image.header.copy()
    header.set_data_dtype(np.uint8)
    header.set_slope_inter(1, 0)
    header["cal_min"] = header["cal_max"] = 0  # the window of the image, not of labels
    content = nibabel.Nifti1Image(voxels, image.affine, header).to_bytes()
    packed = gzip.compress(content, mtime=0) if path.suffix == ".gz" else content
    return write_bytes(path, packed)
