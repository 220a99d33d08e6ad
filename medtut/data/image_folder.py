"""Any folder of 2-D images with masks, and the slices of four real patients.

Two arrangements of a folder are read. ``images/x.png`` with ``masks/x.png`` (a mask may
be called ``x_mask.png`` there, and have another suffix than its image); or, in a folder
without ``images``, ``x.png`` with ``x_mask.png`` beside it. PNG, JPEG, TIFF and BMP.

An item is ``{"image": (H, W) or (H, W, 3) float32 in [0, 1], "mask": (H, W) bool,
"name": str}``. A mask may be empty.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from medtut.data.assets import fetch
from medtut.data.brats_men import choose_slices, scale_clean
from medtut.errors import MedtutError

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
REAL = {f"{part}{n}": f"pyradiomics-{part}" for part in ("brain", "lung") for n in "12"}


class Pair(NamedTuple):
    """Where the image and the mask of one name are."""

    name: str
    image: Path
    mask: Path


def find_pairs(folder: Path | str) -> list[Pair]:
    """List images with their masks, sorted by name; see the module's text.

    Raises
    ------
    MedtutError
        No pair at all, an image without mask or a mask without image, or two files of
        one name (``x.png`` and ``x.jpg``).
    """
    folder = Path(folder)
    apart = (folder / "images").is_dir()
    places = ("images/*", "masks/*") if apart else ("*",)
    found = defaultdict(lambda: ([], []))  # images, masks
    for path in sorted(path for place in places for path in folder.glob(place)):
        stem, suffix = path.stem, path.suffix.lower()
        mask = path.parent.name == "masks" if apart else stem.endswith("_mask")
        if suffix in SUFFIXES and not stem.startswith("."):
            found[stem.removesuffix("_mask") if mask else stem][mask].append(path)
    numbers = {name: (len(i), len(m)) for name, (i, m) in sorted(found.items())}
    odd = [
        f"{k} ({i} images, {m} masks)" for k, (i, m) in numbers.items() if i * m != 1
    ]
    if odd or not found:
        raise MedtutError(
            f"{folder}: needs one mask to every image, as images/x.png and masks/x.png "
            f"or as x.png and x_mask.png ({', '.join(SUFFIXES)}). "
            + (f"Not so: {', '.join(odd[:5])}." if odd else "There is no such file.")
        )
    return [Pair(name, *found[name][0], *found[name][1]) for name in numbers]


def _read(path: Path) -> np.ndarray:
    """(H, W) of any type, or (H, W, 3) uint8."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            if (pages := getattr(file, "n_frames", 1)) > 1:
                raise ValueError(f"it holds {pages} pages; save the one to be used")
            image = ImageOps.exif_transpose(file)
            if image.mode[0] not in "IF":
                grey = image.mode in ("1", "L", "LA")
                image = image.convert("L" if grey else "RGB")
            values = np.asarray(image)
        if not np.isfinite(values).all():
            raise ValueError("it holds NaN or infinite values")
        return values
    except Exception as error:  # Pillow's readers raise many kinds
        raise MedtutError(f"{path} cannot be used: {error}.") from error


def read_image(path: Path) -> np.ndarray:
    """Read (H, W), or (H, W, 3) if it has colours or a palette, float32 in [0, 1].

    8 bits are divided by 255. Of 16 and 32 bits nobody knows what is white: they are
    stretched from their own minimum to their maximum. Transparency is left out.
    """
    values = _read(path)
    eight = values.dtype == np.uint8
    values = values.astype(np.float64)
    low, high = (0, 255) if eight else (values.min(), values.max())
    return ((values - low) / ((high - low) or 1)).astype(np.float32)


def read_mask(path: Path) -> np.ndarray:
    """Read (H, W) bool: what is not black.

    There may be black and one other value or colour (1, 255, red...). JPEG blurs
    edges: such a mask is cut at half, if more of it is white (192 and above) than in
    between. In any other format a third value is a class or a blurred edge; which, the
    file does not tell, so it is refused.
    """
    values = _read(path)
    if path.suffix.lower() in (".jpg", ".jpeg"):
        grey = values if values.ndim == 2 else values.mean(-1)
        white, dark = (grey >= 192).sum(), (grey < 64).sum()
        good = white > grey.size - white - dark or not grey.any()
        mask = grey >= 128
    else:
        one = values if values.ndim == 2 else values @ np.array([65536, 256, 1])
        found = np.unique(one)
        good = len(found) == 1 or (len(found) == 2 and found[0] == 0)
        mask = one != 0
    if not good:
        raise MedtutError(
            f"{path} is not the mask of one object: black and one other value are "
            f"needed, it holds {len(np.unique(values))} from {values.min():g} to "
            f"{values.max():g}. Save each class apart, without smoothing, as PNG."
        )
    return mask


def load_pair(pair: Pair) -> dict[str, Any]:
    """Read the item of one pair; image and mask must be of one size."""
    image, mask = read_image(pair.image), read_mask(pair.mask)
    if image.shape[:2] != mask.shape:
        raise MedtutError(
            f"{pair.mask} has {mask.shape} rows and columns, {pair.image} has "
            f"{image.shape[:2]}. Draw the mask on this image, or resize neither."
        )
    return {"image": image, "mask": mask, "name": pair.name}


def real_slices(
    name: str, window: tuple[float, float] = (-160, 240)
) -> list[dict[str, Any]]:
    """Return the slices with tumour of a real patient, anterior up, from the lowest.

    Parameters
    ----------
    name : {"brain1", "brain2", "lung1", "lung2"}
        Of the PyRadiomics test data: T1 with contrast agent and with the skull, or CT.
    window : two Hounsfield values
        For CT: what becomes 0 and 1. The default is the soft-tissue window (level 40,
        width 400) of MedSAM's preparation; its lung window is (-910, 590). The brains
        are scaled by `scale_clean`.

    Returns
    -------
    list of items, each with ``"z": int`` too
        At the scanner's own pixels: 256 × 256 for the brains, 512 × 512 for the lungs.

    Raises
    ------
    MedtutError
        Another name.
    AssetUnavailable
        Without a network, when the file was not fetched before.
    """
    import nibabel
    import nrrd

    if name not in REAL:
        raise MedtutError(f"There is no real patient {name!r}, only {list(REAL)}.")
    files, volumes = fetch(REAL[name]), []
    for part in ("image", "label"):
        values, header = nrrd.read(str(files[f"{name}_{part}"]))
        # These files count to the patient's left and back, nibabel to right and front.
        affine = np.diag([-1.0, -1, 1, 1])
        affine[:3, :3] @= header["space directions"].T
        image = nibabel.Nifti1Image(values.astype(np.float32), affine)
        volumes.append(nibabel.as_closest_canonical(image).get_fdata())
    image, mask = volumes[0], volumes[1] > 0
    low, high = window
    brain = name.startswith("brain")
    image = scale_clean(image) if brain else np.clip((image - low) / (high - low), 0, 1)
    items = []
    for z in choose_slices(mask, "all"):
        one, other = (np.rot90(volume[:, :, z]).copy() for volume in (image, mask))
        item = {"image": one.astype(np.float32), "mask": other, "z": z}
        items.append(item | {"name": f"{name} z={z}"})
    return items
