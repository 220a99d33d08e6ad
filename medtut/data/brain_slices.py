"""Axial brain slices with tissue labels under several contrasts (lesson 01).

Every slice starts from the embedded MNI152 template: its averaged real T1 image and
its grey and white matter maps (Fonov et al., NeuroImage 2011). A *subject* is one
random smooth deformation of a level of that template, so the anatomy is that of one
averaged brain, drawn many times; an interval over subjects says nothing about people.

The **source** contrast is the template's T1. The **target** contrasts are mixed from
the tissue maps with the relative intensities of a T2-weighted or a FLAIR sequence, so
that the order of the tissues is another one than in T1. Both then get a bias field and
Rician noise (Gudbjartsson & Patz, Magn. Reson. Med. 1995), stronger in the target.

Training and test subjects come from different slabs of the head, with a gap between.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from medtut.data.assets import fetch
from medtut.data.cache import cached_arrays
from medtut.errors import MedtutError

VERSION = 1  # part of the cache key: raise it when the recipe below changes
SIDE = 96  # pixels of 2 mm
TISSUES = ("background", "CSF", "grey matter", "white matter")

# Slabs along the body axis, in mm above the anterior commissure (MNI z).
SLABS: dict[str, tuple[tuple[int, int], ...]] = {
    "train": ((-16, -2), (20, 34)),
    "validation": ((4, 8), (40, 44)),
    "test": ((12, 14), (50, 58)),
}

# Mean signal of CSF, grey and white matter, relative to the brightest tissue.
CONTRASTS: dict[str, tuple[float, float, float]] = {
    "t2": (0.95, 0.58, 0.42),
    "flair": (0.12, 0.62, 0.48),
}

Contrast = Literal["t1", "t2", "flair"]
Split = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class SliceSpec:
    """What is drawn: `count` subjects of one split under one contrast."""

    contrast: Contrast
    split: Split
    count: int
    seed: int = 0
    bias: float = 0.3  # largest coefficient of the bias field's polynomial
    noise: float = 0.05  # standard deviation of the Rician noise, relative


@lru_cache(maxsize=1)
def template() -> dict[str, np.ndarray]:
    """T1, grey and white matter of the template, each (x, y, z), and the z of slices.

    Returns
    -------
    dict with ``t1``, ``gm``, ``wm`` in 0..1 (float32) and ``z`` in mm.
    """
    import nibabel

    maps: dict[str, np.ndarray] = {}
    for name, path in fetch("mni152-2mm").items():
        image = nibabel.as_closest_canonical(nibabel.load(path))
        volume = np.asarray(image.dataobj, dtype=np.float32)
        maps[name] = volume / volume.max()
        affine = image.affine
    depth = maps["t1"].shape[2]
    maps["z"] = affine[2, 3] + affine[2, 2] * np.arange(depth, dtype=np.float32)
    return maps


def brain_slices(spec: SliceSpec) -> dict[str, np.ndarray]:
    """Draw the slices of `spec`, or read them from the cache.

    Returns
    -------
    dict of arrays
        ``image`` (count, 1, 96, 96) float32, zero mean and unit variance within
        the brain; ``label`` (count, 96, 96) int64, an index of `TISSUES`;
        ``z`` (count,) float32, the template's level in mm.

    Raises
    ------
    MedtutError
        Unknown contrast or split, or a count below one.
    """
    known = {"contrast": ("t1", *CONTRASTS), "split": SLABS}
    for field, names in known.items():
        if (given := getattr(spec, field)) not in names:
            there = f"there are {', '.join(names)}"
            raise MedtutError(f"brain_slices: unknown {field} {given!r}; {there}.")
    if spec.count < 1:
        raise MedtutError(f"brain_slices: count must be at least 1, not {spec.count}.")
    key = {"version": VERSION, **asdict(spec)}
    return cached_arrays("brain_slices", key, lambda: _draw(spec))


def _levels(split: str, z: np.ndarray) -> np.ndarray:
    return np.flatnonzero(
        np.any([(z >= low) & (z <= high) for low, high in SLABS[split]], axis=0)
    )


def _draw(spec: SliceSpec) -> dict[str, np.ndarray]:
    # MONAI takes seconds to import: only when something has to be drawn.
    from monai import transforms as mt

    maps = template()
    levels = _levels(spec.split, maps["z"])
    deform = mt.Rand2DElasticd(
        keys=["maps"],
        spacing=(24, 24),
        magnitude_range=(0.5, 2.0),
        prob=1.0,
        rotate_range=0.15,
        scale_range=(0.08, 0.08),
        translate_range=(2, 2),
        padding_mode="zeros",
    )
    bias = mt.RandBiasField(degree=3, coeff_range=(-spec.bias, spec.bias), prob=1.0)
    noise = mt.RandRicianNoise(
        prob=1.0, mean=0.0, std=spec.noise, sample_std=False, relative=False
    )
    pad = mt.ResizeWithPadOrCrop((SIDE, SIDE))
    place = ("t1", *CONTRASTS).index(spec.contrast), list(SLABS).index(spec.split)
    images, labels, zs = [], [], []
    for subject in range(spec.count):
        # Deterministic by (seed, contrast, split, subject): a longer list begins
        # with the shorter one, and no subject stands in two splits.
        rng = np.random.default_rng([spec.seed, *place, subject])
        level = int(rng.choice(levels))
        stack = np.stack([maps[name][:, :, level] for name in ("t1", "gm", "wm")])
        state = int(rng.integers(2**31))
        for transform in (deform, bias, noise):
            transform.set_random_state(state)
        t1, gm, wm = np.clip(np.asarray(deform({"maps": pad(stack)})["maps"]), 0, 1)
        brain = (t1 > 0.1) | (gm + wm > 0.5)
        csf = np.clip(1 - gm - wm, 0, 1)
        if spec.contrast == "t1":
            clean = t1
        else:
            means = np.array(CONTRASTS[spec.contrast]) + rng.normal(0, 0.03, 3)
            clean = np.tensordot(means, np.stack([csf, gm, wm]), 1)
        clean = clean * brain
        image = np.asarray(noise(bias(clean[None].astype(np.float32))))[0]
        inside = image[brain]
        images.append((image - inside.mean()) / inside.std())
        labels.append(np.where(brain, 1 + np.stack([csf, gm, wm]).argmax(0), 0))
        zs.append(maps["z"][level])
    # Anterior up, the patient's left on the left.
    image = np.rot90(np.stack(images)[:, None], axes=(2, 3)).astype(np.float32)
    label = np.rot90(np.stack(labels), axes=(1, 2)).astype(np.int64)
    z = np.array(zs, dtype=np.float32)
    return {"image": image.copy(), "label": label.copy(), "z": z}
