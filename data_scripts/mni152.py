"""Make the embedded 2 mm brain template from the 1 mm MNI152 average maps.

The course builds its synthetic brains on real anatomy, and must do so without a
network. The 1 mm maps (asset ``nilearn-mni152``) are 5 MB; this script brings them to
2 mm, about 0.7 MB, small enough to live in the repository.

How: every axis is smoothed with the binomial kernel [1, 2, 1] / 4 and every second
voxel is kept. The kernel is zero at the frequency that would alias onto the mean, and
because it is centred on a kept voxel, the mid-sagittal plane x = 0 stays a plane of
voxel centres: the left-right symmetry of the template survives. All sums are integers,
so that the voxels come out the same on every machine.

Run ``python data_scripts/mni152.py`` to write the files again, with ``--check`` to only
compare them with what is there.
"""

from __future__ import annotations

import argparse
import gzip
import io
import os
import sys
from pathlib import Path

import numpy as np

MAPS = ("t1", "gm", "wm")
TARGET = Path(__file__).resolve().parents[1] / "medtut" / "data" / "embedded"


def half(volume: np.ndarray) -> np.ndarray:
    """Halve the resolution of a uint8 volume along every axis.

    Parameters
    ----------
    volume : (X, Y, Z) uint8

    Returns
    -------
    (ceil(X/2), ceil(Y/2), ceil(Z/2)) uint8
        Voxel ``i`` of the result is centred on voxel ``2 i`` of the input; values are
        the [1, 2, 1]/4 weighted means, rounded half up.
    """
    total = volume.astype(np.int64)
    for axis in range(total.ndim):
        padded = np.pad(
            total,
            [(1, 2) if a == axis else (0, 0) for a in range(total.ndim)],
            mode="edge",
        )
        size = total.shape[axis]
        kept = np.arange(0, size, 2)
        total = (
            padded.take(kept, axis)
            + 2 * padded.take(kept + 1, axis)
            + padded.take(kept + 2, axis)
        )
    scale = 4**volume.ndim
    return ((total + scale // 2) // scale).astype(np.uint8)


def template(path: str | os.PathLike) -> tuple[np.ndarray, np.ndarray]:
    """Read one 1 mm map and return its 2 mm voxels (uint8, RAS) and 4×4 affine."""
    import nibabel

    image = nibabel.as_closest_canonical(nibabel.load(path))
    voxels = np.asanyarray(image.dataobj)
    if voxels.dtype != np.uint8:
        raise SystemExit(f"{path}: expected uint8 voxels, found {voxels.dtype}.")
    if not np.array_equal(image.affine[:3, :3], np.eye(3)):
        raise SystemExit(f"{path}: expected 1 mm isotropic voxels along the axes.")
    affine = image.affine.copy()
    affine[:3, :3] *= 2  # the first voxel keeps its centre, so the origin stays
    return half(voxels), affine


def nifti_bytes(voxels: np.ndarray, affine: np.ndarray, description: str) -> bytes:
    """NIfTI-1, gzipped without name or time: the same input gives the same bytes."""
    import nibabel

    image = nibabel.Nifti1Image(voxels, affine)
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = description.encode("ascii")[:79]
    for transform in (image.set_sform, image.set_qform):
        transform(affine, code="mni")
    buffer = io.BytesIO()
    with gzip.GzipFile(
        filename="", mode="wb", compresslevel=9, fileobj=buffer, mtime=0
    ) as file:
        file.write(image.to_bytes())
    return buffer.getvalue()


def main(argv: list[str] | None = None) -> int:
    """Write the three maps, or compare them; 1 if they differ."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    parser.add_argument("--out", type=Path, default=TARGET)
    parser.add_argument(
        "--maps", type=Path, help="folder with t1/gm/wm .nii.gz (default: the asset)"
    )
    args = parser.parse_args(argv)
    if args.maps:
        sources = {m: next(args.maps.glob(f"*{m}*.nii.gz")) for m in MAPS}
    else:
        from medtut.data.assets import fetch

        sources = fetch("nilearn-mni152")
    differ = 0
    for name in MAPS:
        voxels, affine = template(sources[name])
        path = args.out / f"mni152_2mm_{name}.nii.gz"
        if args.check:
            import nibabel

            there = nibabel.load(path)
            same = np.array_equal(np.asanyarray(there.dataobj), voxels)
            same &= np.array_equal(there.affine, affine)
            print(f"{path.name}: {'same' if same else 'DIFFERENT'}")
            differ += not same
            continue
        args.out.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        partial.write_bytes(
            nifti_bytes(voxels, affine, f"MNI152 2009a symmetric {name}, 2 mm")
        )
        os.replace(partial, path)
        print(f"{path.name}: {voxels.shape}, {path.stat().st_size:,} bytes")
    return int(differ > 0)


if __name__ == "__main__":
    sys.exit(main())
