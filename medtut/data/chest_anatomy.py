"""Two real chests as templates: whole, without table and tumour, with label maps.

The bodies are the CTs `lung1` and `lung2` of the pyradiomics archive. What is made of
them here, once, is kept in the cache: HU on a fine grid, and maps of the organs, from
thresholds and shapes and the landmarks of ``chest_cohort.yml``. Arrays are (X, Y, Z),
x to the patient's right, y to the front, z to the head; positions are mm from the
middle of the grid. The tumours that the real patients had are replaced by healthy lung.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from medtut.data.assets import fetch
from medtut.data.cache import cached_arrays
from medtut.data.ct_volume import load_image
from medtut.errors import MedtutError

LABELS = {
    "right upper lobe": 1, "right middle lobe": 2, "right lower lobe": 3,
    "left upper lobe": 4, "left lower lobe": 5, "airway": 6, "heart": 7, "aorta": 8,
    "bone": 9, "mediastinum": 10, "below diaphragm": 11, "fat": 12, "soft tissue": 13,
    "oesophagus": 14,
}  # fmt: skip
FINE = 2  # the template's grid is finer than the drawn one by this factor


@lru_cache(maxsize=1)
def recipe() -> dict[str, Any]:
    """The numbers of ``chest_cohort.yml``."""
    import yaml

    path = Path(__file__).with_name("chest_cohort.yml")
    return yaml.safe_load(path.read_text(encoding="utf-8"))


@dataclass(frozen=True, eq=False)
class Body:
    """A template on the fine grid.

    Attributes
    ----------
    name : of the template.
    hu : (X, Y, Z) float32.
    labels : (X, Y, Z) uint8, values of `LABELS`, 0 outside the body.
    spacing : mm of a voxel, (3,).
    fields : name to (X, Y, Z) float32; see `fields` of the recipe.
    marks : landmarks of the recipe, mm from the middle of the grid.
    """

    name: str
    hu: np.ndarray
    labels: np.ndarray
    spacing: np.ndarray
    fields: dict[str, np.ndarray]
    marks: dict[str, Any]


def axes(shape: tuple[int, ...], spacing: np.ndarray) -> list[np.ndarray]:
    """Positions (mm from the middle) of the voxels along every axis, broadcastable."""
    every = zip(np.ix_(*map(np.arange, shape)), shape, spacing, strict=True)
    return [((i - (n - 1) / 2) * step).astype("f4") for i, n, step in every]


def _biggest(mask: np.ndarray, count: int = 1) -> list[np.ndarray]:
    from scipy import ndimage

    found, _ = ndimage.label(mask)
    sizes = np.bincount(found.ravel())
    return [found == k for k in 1 + np.argsort(sizes[1:])[::-1][:count]]


def _filled(mask: np.ndarray) -> np.ndarray:
    """Holes of every axial slice filled."""
    from scipy import ndimage

    return np.stack([ndimage.binary_fill_holes(m) for m in np.moveaxis(mask, 2, 0)], 2)


def _on_grid(name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """HU of the body alone (air elsewhere) and its tumour on the fine grid."""
    from nibabel import as_closest_canonical
    from scipy import ndimage

    how, files = recipe(), fetch("pyradiomics-lung")
    images = (load_image(files[f"{name}_{part}"]) for part in ("image", "label"))
    ct, tumour = map(as_closest_canonical, images)
    hu, tumour = ct.get_fdata(dtype=np.float32), tumour.get_fdata() > 0
    size = np.array(ct.header.get_zooms()) * how["bodies"][name]["scale"]
    solid = ndimage.binary_opening(hu > -300, np.ones((5, 5, 1)))
    body = _biggest(ndimage.binary_erosion(solid, np.ones((5, 5, 1))))[0]
    body = _filled(ndimage.binary_dilation(body, np.ones((7, 7, 1))))
    hu = np.where(body, np.clip(hu, -1000, 1600), -1000)
    shape, spacing = np.array(how["shape"]) * FINE, np.array(how["spacing"]) / FINE
    flat = np.argwhere(body.any(2))
    middle = [*(flat.min(0) + flat.max(0)) / 2, 0]
    grids = axes(tuple(shape), spacing)
    at = [g / s + m for g, s, m in zip(grids, size, middle, strict=True)]
    at[2] = at[2] - at[2].max() + body.shape[2] - 1  # the heads of both at one height
    last = int((at[2] < 0).sum())
    at = np.broadcast_arrays(*at)
    seen = ndimage.map_coordinates(tumour.astype(np.float32), at, order=1) > 0.3
    smooth = ndimage.gaussian_filter(hu, spacing / size * [0.35, 0.35, 0.0])
    # Where the real scan ends it goes on mirrored, and the lungs narrow to nothing.
    mirrored = [at[0], at[1], np.abs(at[2])]
    grid = ndimage.map_coordinates(smooth, mirrored, order=1, cval=-1000)
    for k in range(last):
        outer = ndimage.binary_fill_holes(grid[..., k] > -500)
        depth = ndimage.distance_transform_edt(outer & (grid[..., k] < -300))
        gone = (depth > 0) & (depth < (last - k) * 3.5)
        gone = ndimage.gaussian_filter(gone.astype(np.float32), 1.0)
        grid[..., k] += gone * np.maximum(45 - grid[..., k], 0)
    # Buttons and chains on the skin are no medical material.
    skin = ndimage.distance_transform_edt(ndimage.binary_closing(grid > -700), spacing)
    return np.where((skin < 9) & (grid > 130), -60, grid).astype("f4"), seen, spacing


def _polyline(points: Any, step: float = 1.5) -> np.ndarray:
    """Points along straight segments, `step` mm apart."""
    pieces = []
    for a, b in pairwise(np.asarray(points, float)):
        count = max(2, round(np.linalg.norm(b - a) / step))
        pieces.append(a + (b - a) * np.linspace(0, 1, count)[:, None])
    return np.concatenate(pieces)


def _tree(body: dict[str, Any], labels: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """Bronchi from the hila into every lobe, rows of x, y, z and radius in mm.

    Slices of 5 mm do not show them; like real ones they branch and taper, from 3.5 mm
    at the hilum to about 1 mm near the pleura.
    """
    from scipy import ndimage

    rng, found = np.random.default_rng(5), []
    middle = (np.array(labels.shape) - 1) / 2
    t = np.linspace(0, 1, 80)[:, None]
    for lobe in range(1, 6):
        start = np.array(body["hilum"]["right" if lobe < 4 else "left"], float)
        depth = ndimage.distance_transform_edt(labels == lobe, sampling=spacing)
        deep = (np.argwhere(depth > 14) - middle) * spacing
        far = deep[np.linalg.norm(deep - start, axis=1) > 35]
        ends = [far[rng.integers(len(far))]]
        while len(ends) < 6:  # spread out: the farthest of a few from those taken
            few = far[rng.integers(len(far), size=20)]
            gaps = [min(np.linalg.norm(f - e) for e in ends) for f in few]
            ends.append(few[int(np.argmax(gaps))])
        trunk = start + 0.35 * (np.mean(ends, 0) - start)
        for end in ends:
            bend = (trunk + end) / 2 + rng.normal(0, 6, 3)
            path = (1 - t) ** 2 * trunk + 2 * t * (1 - t) * bend + t**2 * end
            twig = path[45] + rng.normal(0, 16, 3) + 0.3 * (end - trunk)
            whole = np.concatenate([_polyline([start, trunk], 0.8), path])
            for way, wide in ((whole, 3.2), (_polyline([path[45], twig], 0.8), 1.6)):
                found.append(np.column_stack([way, np.linspace(wide, 1.0, len(way))]))
    return np.concatenate(found)


def _lungs(hu: np.ndarray, windpipe: np.ndarray, edt: Any) -> np.ndarray:
    """1 in the right lung, 2 in the left, vessels included."""
    from scipy import ndimage

    air, _ = ndimage.label(hu < -500)
    rim = np.unique(np.concatenate([air[[0, -1]].ravel(), air[:, [0, -1]].ravel()]))
    inside = (air > 0) & ~np.isin(air, rim) & ~windpipe
    seeds = _biggest(ndimage.binary_erosion(inside, iterations=3), 2)
    seeds.sort(key=lambda m: -np.argwhere(m)[:, 0].mean())
    number = seeds[0] + 2 * seeds[1].astype(np.uint8)
    away, at = edt(number == 0, return_indices=True)
    number = np.where(away < 12, number[tuple(at)], 0) * inside
    for k in (1, 2):  # close: vessels belong to the lung
        full = edt(edt(number != k) < 7) > 7
        number = np.where(full & (number == 0) & ~windpipe, k, number)
    return number


def _lobes(lung: np.ndarray) -> np.ndarray:
    """Codes of lobes; fissures are planes through each lung's own height and depth."""
    labels = np.zeros(lung.shape, np.uint8)
    for k, (top, middle, low) in ((1, (1, 2, 3)), (2, (4, 4, 5))):
        place = np.argwhere(lung == k)
        start, end = np.quantile(place, (0.005, 0.995), axis=0)
        _, front, height = ((place - start) / (end - start)).T
        upper = np.where(height < 0.47, middle, top)
        lower = height < 0.02 + 0.68 * (1 - front)
        labels[lung == k] = np.where(lower, low, upper)
    return labels


def _prepare(name: str) -> dict[str, np.ndarray]:
    from scipy import ndimage
    from scipy.spatial import cKDTree

    body, ways = recipe()["bodies"][name], recipe()["coronaries"].values()
    hu, tumour, spacing = _on_grid(name)
    grow = ndimage.binary_dilation
    edt = partial(ndimage.distance_transform_edt, sampling=spacing)
    grid = np.stack(np.broadcast_arrays(*axes(hu.shape, spacing)), -1)

    def near(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Distance (mm) of every voxel to the nearest point, up to 60; its number."""
        distance, number = cKDTree(points).query(grid, distance_upper_bound=60)
        return np.minimum(distance, 60), np.minimum(number, len(points) - 1)

    trachea = near(_polyline(body["trachea"]))[0]
    aorta = near(_polyline(body["aorta"]))[0] - body["aorta_radius"]
    windpipe = (trachea < 13) & (hu < -700)
    for side in ("right", "left"):
        main = _polyline([body["trachea"][-1], body["hilum"][side]])
        windpipe |= (near(main)[0] < 8) & (hu < -600)
    lung = _lungs(hu, windpipe, edt)
    # The tumour and its surroundings; the other lung, mirrored, takes its place.
    around = (edt(~tumour) < 16) & (hu > -650) & (aorta > 3)
    tumour = grow(tumour, iterations=3) | (around & grow(lung > 0, iterations=3))
    tumour &= ndimage.binary_erosion(edt(lung == 0) < 24) & (hu < 120)
    span = np.flatnonzero((lung > 0).any((1, 2)))
    other = hu[np.clip(span[0] + span[-1] - np.arange(len(hu)), 0, len(hu) - 1)]
    hu = np.where(tumour, np.where(other < -500, other, -860), hu)
    right = np.argwhere(tumour)[:, 0].mean() > (span[0] + span[-1]) / 2
    lung = np.where(tumour, 1 if right else 2, lung)
    # Where no lung lies on the diaphragm (heart, spine), it is as high as beside.
    centre, radii = (np.array(body["heart"][k], float) for k in ("centre", "radii"))
    ball = np.linalg.norm((grid - centre) / radii, axis=-1)
    base = np.argmax(lung > 0, axis=2)
    seen = (lung > 0).any(2) & ~(ball < 1.15).any(2)
    seen &= base < np.quantile(base[seen], 0.6)
    beside = ndimage.distance_transform_edt(~seen, return_indices=True)[1]
    floor = ndimage.gaussian_filter(base[tuple(beside)].astype(np.float32), 6)
    below = (np.arange(hu.shape[2]) < floor[..., None]) & (lung == 0)
    between = np.maximum.accumulate(lung == 2, 0)
    between &= np.maximum.accumulate((lung == 1)[::-1], 0)[::-1] & (lung == 0) & ~below
    # Both patients have calcified arteries: blood instead, bone stays.
    hard, _ = ndimage.label(hu > 115)
    specks = (np.bincount(hard.ravel())[hard] < 250) & (hard > 0) & between
    specks |= (hu > 115) & ((aorta < 2) | (ball < 1.05))
    hu = np.where(grow(specks) & (hu > 60), 45, hu)
    bone = ndimage.binary_closing((hu > 160) & (lung == 0) & (aorta > 2), iterations=2)
    heart = (ball < 1.08) & (lung == 0) & (aorta > 0) & ~bone & ~below
    heart &= ndimage.gaussian_filter(hu, 1) > 0
    heart = _biggest(ndimage.binary_opening(heart, iterations=2))[0]
    inside = _filled(grow(hu > -900))
    gullet = near(_polyline(body["oesophagus"]))[0]
    labels, rest = _lobes(lung), inside & (lung == 0)
    for key, mask in {
        "soft tissue": rest, "fat": hu < -30, "mediastinum": between,
        "below diaphragm": below & (edt(lung == 0) < 60), "oesophagus": gullet < 7,
        "heart": heart, "aorta": aorta < 0, "bone": bone, "airway": windpipe,
    }.items():  # fmt: skip
        labels = np.where(mask & rest, LABELS[key], labels)
    tree = _tree(body, labels, spacing)
    airway, number = near(tree[:, :3])
    artery = near(tree[:, :3] + 2.2 * tree[:, 3:] * [0.8, 0.6, 0.0])[0]
    ways = [np.array(way) / np.linalg.norm(way, axis=1)[:, None] for way in ways]
    coronary = near(np.concatenate([_polyline(centre + w * radii) for w in ways]))[0]
    signed = {"lung": lung > 0, "heart": heart, "skin": inside}
    fields = {k: edt(~mask) - edt(mask) for k, mask in signed.items()} | {
        "aorta": aorta, "airway": airway, "radius": tree[number, 3], "gullet": gullet,
        "artery": artery, "coronary": coronary, "trachea": trachea,
    }  # fmt: skip
    hu = ndimage.gaussian_filter(hu.astype(np.float32), 0.45)  # as a coarser voxel sees
    maps = {f"field {k}": v.astype(np.float16) for k, v in fields.items()}
    return {"hu": hu, "labels": labels.astype(np.uint8)} | maps


@lru_cache(maxsize=2)
def load_body(name: str) -> Body:
    """A template, prepared at first use (a minute) and then from the cache.

    Raises
    ------
    MedtutError
        No such body.
    AssetUnavailable
        The real CT is not here and cannot be fetched.
    """
    how = recipe()
    if name not in how["bodies"]:
        known = ", ".join(how["bodies"])
        raise MedtutError(f"load_body: no body {name!r}; there are {known}.")
    key = {"version": how["anatomy_version"], "body": name, **how["bodies"][name]}
    key |= {"shape": how["shape"], "spacing": how["spacing"]}
    got = cached_arrays("chest_body", key, lambda: _prepare(name))
    fields = {k[6:]: v.astype(np.float32) for k, v in got.items() if k[:6] == "field "}
    spacing = np.array(how["spacing"]) / FINE
    return Body(name, got["hu"], got["labels"], spacing, fields, how["bodies"][name])
