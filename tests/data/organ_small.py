"""Small abdominal CTs with labels, in the layouts that the readers know."""

from pathlib import Path

import nibabel
import numpy as np

SHAPE, SPACING = (26, 22, 18), (2.0, 2.5, 3.0)
ORIGIN = (-20.0, 7.0, 100.0)


def ball(shape, centre, radius):
    """Voxels within a radius of a centre."""
    grid = np.indices(shape).reshape(3, -1).T - centre
    return ((grid**2).sum(1) <= radius**2).reshape(shape)


def arrays(seed=0, shape=SHAPE):
    """HU and the masks of three organs, the patient's right, front and head up."""
    rng = np.random.default_rng(seed)
    body = ball(shape, np.array(shape) / 2, 0.48 * max(shape))
    body[:3] = body[-2:] = False
    masks = {
        "liver": ball(shape, (17, 11, 9), 5.2),
        "spleen": ball(shape, (7, 8, 11), 3),
        "aorta": ball(shape, (12, 5, 8), 2) & (np.indices(shape)[0] < 14),
    }
    masks["liver"][:, 13, 9] = False  # no ball, so that a flip shows
    masks["aorta"] &= ~masks["liver"] & ~masks["spleen"]
    hu = np.where(body, 30, -990) + rng.normal(0, 12, shape)
    for i, mask in enumerate(masks.values()):
        hu[mask] += 40 + 30 * i
    return hu.round().astype(np.int16), {
        k: m.astype(np.uint8) for k, m in masks.items()
    }


def affine(spacing=SPACING):
    out = np.diag([*spacing, 1.0])
    out[:3, 3] = ORIGIN
    return out


def save(path, values, matrix, codes="RAS"):
    """Write NIfTI with the axes in another order and direction, the body unmoved."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(values, matrix)
    turn = nibabel.orientations.ornt_transform(
        nibabel.io_orientation(matrix), nibabel.orientations.axcodes2ornt(codes)
    )
    nibabel.save(image.as_reoriented(turn), path)
    return path


def write_case(root, name="s0001", seed=0, codes="RAS", spacing=SPACING, shape=SHAPE):
    """One case of TotalSegmentator: a CT and one file per organ."""
    hu, masks = arrays(seed, shape)
    folder = Path(root) / name
    save(folder / "ct.nii.gz", hu, affine(spacing), codes)
    for organ, mask in masks.items():
        save(folder / "segmentations" / f"{organ}.nii.gz", mask, affine(spacing), codes)
    return folder


def write_flare(root, key, ids, seed=0, labels=True):
    """One case of FLARE22: image and one file of ids."""
    hu, masks = arrays(seed)
    save(Path(root) / "images" / f"{key}_0000.nii.gz", hu, affine())
    if labels:
        one = sum(mask * ids[organ] for organ, mask in masks.items())
        save(Path(root) / "labels" / f"{key}.nii.gz", one.astype(np.uint8), affine())
