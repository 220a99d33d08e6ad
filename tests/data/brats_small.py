"""Small BraTS folders for the tests: a bright lesion in a round head, then air."""

from pathlib import Path

import nibabel
import numpy as np

SHAPE = (24, 20, 12)
LPS = np.array([[-1.0, 0, 0, 11], [0, -1, 0, 9], [0, 0, 2, -5], [0, 0, 0, 1]])
MODALITIES = ("flair", "t1", "t1ce", "t2")


def arrays(seed: int, shape: tuple = SHAPE) -> tuple[np.ndarray, np.ndarray]:
    """Return (4, X, Y, Z) int16 images and (X, Y, Z) uint8 labels 0, 1, 2, 4."""
    rng = np.random.default_rng(seed)
    grid = np.indices(shape, dtype=float)
    centre = np.array(shape).reshape(3, 1, 1, 1)
    head = (((grid - centre / 2) / (0.45 * centre)) ** 2).sum(0) < 1
    # Off the middle on every axis, so that a flip or a transposition is seen.
    lesion = (((grid - centre * 0.36) / (0.16 * centre)) ** 2).sum(0)
    mask = np.select([lesion < 0.2, lesion < 0.5, lesion < 1], [1, 4, 2]).astype("u1")
    noise = rng.normal(200, 20, (4, *shape))
    ramp = 3 * grid[0] + 5 * grid[1] + 7 * grid[2]
    images = np.where(head, noise + ramp + 60 * (mask > 0), 0).astype("i2")
    return images, mask * head


def write_case(
    root: Path,
    name: str,
    seed: int = 0,
    suffix: str = ".nii.gz",
    affine: np.ndarray = LPS,
    mask: str | None = "{name}_seg",
    modalities: tuple = MODALITIES,
    shape: tuple = SHAPE,
) -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    images, label = arrays(seed, shape)
    for modality, image in zip(MODALITIES, images, strict=True):
        if modality in modalities:
            path = folder / f"{name}_{modality}{suffix}"
            nibabel.save(nibabel.Nifti1Image(image, affine), path)
    if mask:
        path = folder / (mask.format(name=name) + suffix)
        nibabel.save(nibabel.Nifti1Image(label, affine), path)
    return folder


def rewrite(path: Path, change, affine: np.ndarray = LPS) -> None:
    """Replace the voxels of a file by ``change(voxels)``."""
    voxels = change(np.array(nibabel.load(path).dataobj))
    nibabel.save(nibabel.Nifti1Image(voxels, affine), path)
