"""Read a CT in Hounsfield units, and bring it to the grid of the model.

A file's numbers are not always Hounsfield units (HU). Scanners store whole numbers, and
``HU = slope · stored + intercept`` is applied by whoever reads them: by NIfTI headers,
by scripts with a table beside the files, or once for all when a set is published again.
Twice is as wrong as never, and both run without an error. The second release of CT-RATE
is in HU, its table still says -1024 or -8192, and the published script applies that
(CT-CLIP, issue 50). `read_hu` therefore looks at the values: in a CT of a body there is
lung, gut gas or the air around it near -1000 and soft tissue near 0, or neither unit is
HU.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from medtut.errors import MedtutError

SIZE, SPACING, WINDOW = (48, 96, 96), (6.0, 3.6, 3.6), (-1000.0, 1000.0)
PUBLISHED_SIZE, PUBLISHED_SPACING = (240, 480, 480), (1.5, 0.75, 0.75)
# HU of air and lung (padding of -1024 and below is left out) and of soft tissue.
AIR, TISSUE, SHARE = (-1010, -600), (-150, 150), 0.003
OFFSET = (900, 1150)  # soft tissue before an intercept of -1024; of a body in HU, bone
# Directions of the axes in a NRRD header, towards nibabel's right, front and head.
_SIGNS = {"left": -1, "right": 1, "posterior": -1, "anterior": 1, "superior": 1}


class CTError(MedtutError):
    """A CT, a table of CT-RATE or a shard is not as it should be."""


@functools.cache
def _messages() -> dict[str, str]:
    import yaml

    file = Path(__file__).with_name("ct_messages.yml")
    return yaml.safe_load(file.read_text(encoding="utf-8"))


def fault(key: str, /, **facts: Any) -> CTError:
    """Return the error of ``ct_messages.yml`` called ``key``, to be raised."""
    return CTError(_messages()[key].format(**facts))


@dataclass(frozen=True, eq=False)
class CT:
    """One CT in canonical orientation.

    Attributes
    ----------
    hu : (X, Y, Z) float32
        Hounsfield units; indices grow to the patient's right, front and head, the "RAS"
        of nibabel.
    spacing : (3,) mm, along the same axes
    facts : dict
        ``path``; ``orientation`` as stored, such as "LPS"; ``stored`` range, after the
        ``header``'s own rescaling; ``rescale`` as applied on top of it, or None.
    """

    hu: np.ndarray
    spacing: tuple[float, float, float]
    facts: dict[str, Any] = field(default_factory=dict)


def load_image(path: Path | str) -> Any:
    """Open NIfTI or NRRD as a nibabel image, in the orientation and numbers stored.

    Raises
    ------
    CTError
        A file that cannot be read, or whose header does not say where it lies.
    """
    import nibabel

    path = Path(path)
    try:
        if path.suffix.lower() not in (".nrrd", ".nhdr"):
            image = nibabel.load(path)
            if not (image.header["sform_code"] or image.header["qform_code"]):
                raise ValueError("its header has no orientation (both codes are 0)")
            return image
        import nrrd

        values, header = nrrd.read(str(path))
        words = str(header.get("space")).split("-")
        if values.ndim != 3 or len(words) != 3 or not set(words) <= set(_SIGNS):
            raise ValueError(f"{values.ndim}-D in the space {header.get('space')}")
        affine = np.eye(4)
        affine[:3, :3] = np.asarray(header["space directions"], float).T
        affine[:3, 3] = header.get("space origin", (0, 0, 0))
        affine = np.diag([*(_SIGNS[word] for word in words), 1]) @ affine
        return nibabel.Nifti1Image(values.astype(np.float32), affine)
    except Exception as error:  # zlib, nibabel, pynrrd and the system: each its own
        raise fault("unreadable", path=path, error=error) from error


def looks_like(values: np.ndarray) -> str:
    """Tell from the values what unit they are in.

    Returns
    -------
    {"hu", "stored", "twice", "no air", "picture"}
        ``hu``: air or lung, and soft tissue, where they belong. ``stored``: not yet
        rescaled (nothing below 0, or a padding value and no air). ``twice``: what
        should be soft tissue lies where air belongs. ``no air``: below 0 there is fat
        only, a cut within the body. ``picture``: fewer than 500 units in all.
    """
    step = max(1, round((values.size / 2e6) ** (1 / 3)))  # about two million voxels
    v = values[::step, ::step, ::step]
    low, high = float(v.min()), float(v.max())
    shares = [np.mean((v >= a) & (v <= b)) for a, b in (AIR, TISSUE, OFFSET)]
    air, tissue = shares[0] > SHARE, shares[1] > SHARE
    if high - low < 500:
        return "picture"
    if air:
        return "hu" if tissue else "twice"
    inside = AIR[0] <= low < 0 and tissue and shares[2] < 0.1
    return "no air" if inside else "stored"


def read_hu(
    path: Path | str, slope: float | None = None, intercept: float | None = None,
    spacing: Sequence[float] | None = None,
) -> CT:  # fmt: skip
    """Read a CT volume in Hounsfield units, rescaled exactly once.

    Parameters
    ----------
    path : path
        ``.nii``, ``.nii.gz``, ``.nrrd``. A rescaling in the NIfTI header is applied by
        the reader, as always.
    slope, intercept : float, optional
        From the metadata beside the file, both or neither. 1 and 0 mean HU as stored.
    spacing : three mm, optional
        Of the axes as stored, from the metadata: the headers of CT-RATE's first release
        do not hold it. By default that of the header.

    Returns
    -------
    CT

    Raises
    ------
    CTError
        Values already in HU with a rescaling asked for, or rescaled twice, or never;
        NaN or infinity; fewer than two slices; not 3-D; no orientation, sheared axes.

    Warns
    -----
    UserWarning
        Axes more than 5° off the patient's: they are taken as the nearest ones.
    """
    import nibabel

    path, image = Path(path), load_image(path)
    if len(image.shape) != 3 or min(image.shape) < 2:
        raise fault("not_3d", path=path, shape=image.shape)
    axes = image.affine[:3, :3]
    sides = np.linalg.norm(axes, axis=0)
    if not np.isfinite(image.affine).all() or sides.min() <= 0:
        raise fault("no_spacing", path=path)
    cosines = axes / sides
    if np.abs(cosines.T @ cosines - np.eye(3)).max() > 0.02:
        raise fault("sheared", path=path)
    turned = np.degrees(np.arccos(np.abs(cosines).max(0).clip(0, 1))).max()
    if turned > 5:
        warnings.warn(str(fault("oblique", path=path, turned=turned)), stacklevel=2)
    try:
        values = np.array(image.dataobj, dtype=np.float32)
    except Exception as error:  # a file cut off shows only here
        raise fault("unreadable", path=path, error=error) from error
    if bad := values.size - np.count_nonzero(np.isfinite(values)):
        raise fault("nan", path=path, bad=bad, size=values.size)
    own = getattr(image.dataobj, "slope", 1), getattr(image.dataobj, "inter", 0)
    facts = {
        "path": str(path),
        "orientation": "".join(nibabel.aff2axcodes(image.affine)),
        "stored": (float(values.min()), float(values.max())),
        "header": None if own == (1, 0) else own,
        "rescale": None,
    }
    given = {"slope": slope, "intercept": intercept}
    if (slope is None) != (intercept is None) or (slope is not None and slope <= 0):
        raise fault("one_of_two", path=path, **given)
    if slope is not None and (slope, intercept) != (1, 0):
        if looks_like(values) == "hu":
            raise fault("already_hu", path=path, header=facts["header"], **given)
        values = values * np.float32(slope) + np.float32(intercept)
        facts["rescale"] = (float(slope), float(intercept))
    kind, span = looks_like(values), f"from {values.min():g} to {values.max():g}"
    if kind not in ("hu", "no air"):
        raise fault(kind, path=path, span=span, rescale=facts["rescale"])
    sides = sides if spacing is None else np.asarray(spacing, float)
    if sides.shape != (3,) or not (np.isfinite(sides) & (sides > 0)).all():
        raise fault("spacing", path=path, spacing=spacing)
    # Row i of the turn says on which canonical axis the stored axis i comes to lie.
    turn = nibabel.io_orientation(image.affine)
    hu = np.ascontiguousarray(nibabel.apply_orientation(values, turn))
    return CT(hu, tuple(sides[np.argsort(turn[:, 0])].tolist()), facts)


def prepare(
    ct: CT, size: tuple[int, int, int] = SIZE,
    spacing: tuple[float, float, float] = SPACING,
    window: tuple[float, float] = WINDOW, antialias: bool = True,
) -> np.ndarray:  # fmt: skip
    """Resample, window and cut a CT to the input of the model.

    As published (CT-CLIP, `scripts/data.py`): linear resampling with `align_corners`
    off to ``int(old · spacing / target)`` voxels along each axis, *then* the window,
    then a central cut or padding with -1. The successor windows first, which darkens
    what is brighter than the window: a voxel half metal (3000 HU) and half lung (-850)
    becomes 1000 here and 75 there.

    Parameters
    ----------
    ct : CT
    size : (D, H, W)
    spacing : (D, H, W) in mm
        Published: 240 × 480 × 480 at 1.5 × 0.75 × 0.75 mm.
    window : two HU, that become -1 and 1
    antialias : bool
        When an axis is reduced, average over the new voxel (a triangle, as wide as
        twice its side), as a thicker slice would. Plain interpolation, which the
        published code uses, looks at two neighbours only: from 0.75 to 3.6 mm it skips
        most voxels, a nodule may fall between the samples, and noise stays as it was.
        Without a reduction there is no difference.

    Returns
    -------
    (1, D, H, W) float32 in [-1, 1]
        From feet to head, front to back (row 0 is anterior), the patient's right on the
        left of the picture.
    """
    import torch
    from torch.nn.functional import interpolate, pad

    volume = torch.from_numpy(np.ascontiguousarray(ct.hu.T[:, ::-1, ::-1]))
    old, own = volume.shape, ct.spacing[::-1]
    # 1e-6: 96 · 3.6 / 3.6 is 96 in numbers too.
    ratios = zip(old, own, spacing, strict=True)
    new = [max(1, int(n * a / b + 1e-6)) for n, a, b in ratios]
    # A linear filter is separable, and torch averages in two dimensions only: first
    # rows and columns of every slice, then slices, with a picture as the other axis.
    how = {"mode": "bilinear", "align_corners": False, "antialias": antialias}
    volume = interpolate(volume[None].float(), size=new[1:], **how)
    flat = interpolate(volume.flatten(2)[None], size=(new[0], new[1] * new[2]), **how)
    low, high = window
    scaled = flat.view(new).sub((low + high) / 2).div((high - low) / 2).clamp(-1, 1)
    edges = []  # torch's pad counts from the last axis, and cuts where it is negative
    for n, m in zip(reversed(new), reversed(size), strict=True):
        before = int((m - n) / 2)
        edges += [before, m - n - before]
    return pad(scaled, edges, value=-1.0)[None].numpy()
