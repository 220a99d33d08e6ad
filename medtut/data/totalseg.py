"""Read labelled abdominal CT for a network, and take its predictions back to the file.

`load_case` gives an isotropic grid; `to_original` takes a prediction to the grid of the
file, where metrics belong. The chain is the published one (upstream ``fseft/datasets/
dataset.py:19-38``, without its random part): RAS, spacing, window, foreground, padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from medtut.data.ct_volume import load_image, read_hu
from medtut.data.organ_records import Record, find_cases, read_partition  # noqa: F401
from medtut.data.organs import NOVEL, STRUCTURES, UNIONS, OrganError, fault  # noqa: F401

WINDOW = (-175.0, 250.0)  # HU that become 0 and 1


@dataclass(frozen=True, eq=False)
class OrganCase:
    """A case as a network takes it.

    Attributes
    ----------
    record : Record
    structures : the S names, in the order of `labels`.
    image : (1, X, Y, Z) float32 in [0, 1], RAS
    labels : (S, X, Y, Z) uint8, 0 or 1; zeros where nothing is annotated.
    annotated : (S,) bool
    empty : annotated structures without a voxel in the file.
    affine : (4, 4), from voxels of `image` to mm.
    original : (affine, shape) of the file.
    """

    record: Record
    structures: tuple[str, ...]
    image: np.ndarray
    labels: np.ndarray
    annotated: np.ndarray
    empty: tuple[str, ...]
    affine: np.ndarray
    original: tuple[np.ndarray, tuple[int, ...]]

    @property
    def spacing(self) -> tuple[float, ...]:
        """Edges of a voxel of the file in mm, along its own axes."""
        return tuple(np.linalg.norm(self.original[0][:3, :3], axis=0).tolist())


def _stored(record: Record, name: str | None, image: Any) -> np.ndarray:
    """The values of a label file, if it belongs to the image and holds known ids."""
    path = record.labels if name is None else record.labels / f"{name}.nii.gz"
    labels, shape = load_image(path), tuple(image.shape)
    corners = np.array([(*c, 1) for c in np.ndindex(2, 2, 2)]).T
    corners[:3] *= np.array(shape[:3])[:, None]
    apart = np.abs((labels.affine - image.affine) @ corners).max()
    if labels.shape != shape or apart > 0.1 * min(image.header.get_zooms()[:3]):
        at = {"apart": apart, "wanted": shape}
        raise fault("other_volume", path=path, shape=labels.shape, **at)
    try:
        values = np.asarray(labels.dataobj)
    except Exception as error:  # a file cut off: zlib, nibabel or the system
        raise fault("label_unreadable", path=path, error=error) from error
    ids, highest = np.nan_to_num(values, nan=-1).astype(np.int16), record.highest
    if (ids != values).any() or ids.min() < 0 or ids.max() > highest:
        ends = np.unique(values)[[0, -1]].tolist()
        raise fault("ids", path=path, values=ends, highest=highest)
    return ids


def masks(
    record: Record, structures: Sequence[str], partial: bool = False
) -> Iterator[np.ndarray | None]:
    """Yield the mask (x, y, z) bool of every structure, axes as stored.

    None for a structure without labels, if that is allowed; see `read_labels`.
    """
    have, image = record.annotated, load_image(record.image)
    known = {*STRUCTURES, *NOVEL, *UNIONS, *have} if partial else have
    if lost := [s for s in structures if s not in known]:
        why = str(fault("hint_heart")) if "heart_" in str(lost) else ""
        where, said = record.labels or record.image, ", ".join(have) or "none"
        raise fault("no_labels", where=where, lost=", ".join(lost), have=said, why=why)
    ids, names = record.ids, record.names
    if ids is not None and have:
        values = _stored(record, None, image)
        # From the middle of the volume towards the patient's right.
        way, size = image.affine[0, :3], image.shape
        axis = int(np.abs(way).argmax())
        x = np.sign(way[axis]) * (np.arange(size[axis]) - (size[axis] - 1) / 2)
        right = np.expand_dims(x > 0, [a for a in range(3) if a != axis])
    for name in structures:
        parts = (name,) if name in names else UNIONS.get(name, ())
        found = None
        for part in parts if name in have else ():
            if ids is None:
                mask = _stored(record, part, image) == 1
            elif isinstance(ids[part], int):
                mask = values == ids[part]
            else:
                mask = (values == ids[part][0]) & (right == (ids[part][1] == "right"))
            found = mask if found is None else found | mask
        yield found


def read_labels(
    record: Record, structures: Sequence[str], partial: bool = False
) -> np.ndarray:
    """Read the whole ground truth on the grid of the file.

    Parameters
    ----------
    record : Record
    structures : S names
    partial : bool
        Give zeros for a structure without labels, instead of refusing.

    Returns
    -------
    (S, x, y, z) uint8, axes as stored.

    Raises
    ------
    OrganError
        No labels of a structure; labels of another volume; unknown ids; a file that
        cannot be read.
    """
    none = np.zeros(load_image(record.image).shape, bool)
    every = masks(record, structures, partial)
    return np.array([none if m is None else m for m in every]).astype(np.uint8)


def load_case(
    record: Record, structures: Sequence[str] = STRUCTURES,
    spacing: float | Sequence[float] = 1.5, window: tuple[float, float] = WINDOW,
    roi: int | Sequence[int] = 1, partial: bool = False,
) -> OrganCase:  # fmt: skip
    """Read a case, and bring it to the grid and the numbers of the network.

    Parameters
    ----------
    record : Record
    structures : S names; () reads no labels at all.
    spacing : mm, or three of them
    window : HU that become 0 and 1
    roi : pad with 0 to at least this many voxels.
    partial : bool
        As in `read_labels`.

    Returns
    -------
    OrganCase

    Raises
    ------
    OrganError
        As `read_labels`, or a spacing that is none.
    medtut.data.ct_volume.CTError
        The image cannot be read, holds NaN, one slice only, or no Hounsfield units.
    """
    import nibabel
    import torch
    from monai import transforms as monai
    from monai.data import MetaTensor

    both, sides = ("image", "label"), np.broadcast_to(spacing, 3).tolist()
    if not all(0 < side < np.inf for side in sides):  # MONAI takes 0 as "as it is"
        raise fault("spacing", spacing=spacing)
    ct, stored = read_hu(record.image), load_image(record.image)
    turn = nibabel.io_orientation(stored.affine)
    affine = stored.affine @ nibabel.orientations.inv_ornt_aff(turn, stored.shape)
    # Nearest neighbours of ids are ids: structures that do not overlap travel in one
    # map, so that 29 cost little more than one.
    layers: list[np.ndarray] = [np.zeros(stored.shape, np.float32)]
    at: dict[int, int] = {}
    empty = []
    for i, mask in enumerate(masks(record, structures, partial)):
        if mask is None:
            continue
        free = (n for n, layer in enumerate(layers) if not layer[mask].any())
        at[i] = next(free, len(layers))
        if at[i] == len(layers):
            layers.append(np.zeros(stored.shape, np.float32))
        layers[at[i]][mask] = i + 1
        empty += [] if mask.any() else [structures[i]]
    turned = np.stack([nibabel.apply_orientation(one, turn) for one in layers])
    chain = [
        monai.Spacingd(both, sides, mode=("bilinear", "nearest"), dtype=np.float32),
        monai.ScaleIntensityRanged("image", *window, 0.0, 1.0, clip=True),
        monai.CropForegroundd(both, source_key="image", allow_smaller=True),
        monai.SpatialPadd(both, roi),
    ]
    grid = torch.from_numpy(affine)
    given = zip(both, map(torch.from_numpy, (ct.hu[None], turned)), strict=True)
    data = monai.Compose(chain)({key: MetaTensor(v, affine=grid) for key, v in given})
    image, maps = (np.ascontiguousarray(data[key].numpy()) for key in both)
    labels = np.zeros((len(structures), *image.shape[1:]), np.uint8)
    for i, n in at.items():
        labels[i] = maps[n] == i + 1
    annotated = np.isin(range(len(structures)), list(at))
    return OrganCase(
        record, tuple(structures), image.astype(np.float32), labels, annotated,
        tuple(empty), data["image"].affine.numpy().astype(float),
        (stored.affine, tuple(stored.shape)),
    )  # fmt: skip


def to_original(prediction: Any, case: OrganCase) -> np.ndarray:
    """Bring a prediction back to the grid of the file it was made for.

    Parameters
    ----------
    prediction : (X, Y, Z) or (C, X, Y, Z) array or tensor
        On the grid of ``case.image``. Floats (probabilities) are interpolated, whole
        numbers and bool take the nearest voxel.
    case : OrganCase

    Returns
    -------
    (x, y, z) or (C, x, y, z), of the same dtype
        Axes as stored; 0 where the network did not look. The outermost voxels of the
        network's grid reach one voxel further: they end half a voxel before the file.

    Raises
    ------
    OrganError
        A prediction of another shape.
    """
    import torch
    from monai.data import MetaTensor
    from monai.transforms import SpatialResample

    given = prediction.detach().cpu() if hasattr(prediction, "detach") else prediction
    array, (target, shape) = np.asarray(given), case.original
    if array.shape[-3:] != case.image.shape[1:] or array.ndim not in (3, 4):
        raise fault("grid", id=case.record.id, shapes=(array.shape, case.image.shape))
    flat = array.reshape(-1, *array.shape[-3:]).astype(np.float32)
    wide = np.pad(flat, [(0, 0), *[(1, 1)] * 3], mode="edge")
    affine = case.affine.copy()
    affine[:3, 3] -= affine[:3, :3].sum(1)
    mode = "bilinear" if array.dtype.kind == "f" else "nearest"
    resample = SpatialResample(mode=mode, padding_mode="zeros", dtype=np.float32)
    there = MetaTensor(torch.from_numpy(wide), affine=torch.from_numpy(affine))
    back = resample(there, torch.from_numpy(np.asarray(target, float)), shape)
    return back.numpy().astype(array.dtype).reshape(*array.shape[:-3], *shape)
