"""The trunk in which abdomens are drawn: a real chest, continued down to the thighs.

The chest is a template of `medtut.data.chest_anatomy`. From the dome of the liver down,
what is inside the body is drawn; from a few centimetres below it, where the templates
end, its wall as well. The numbers are in ``abdomen_cohort.yml``, in mm: x to the
patient's right, y to the front from the spine's front, z to the head from the dome.

Organs are distances to smooth shapes, less than 0 inside; the share of a voxel that an
organ fills follows from its distance (partial volume).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from medtut.data.chest_anatomy import axes, load_body
from medtut.data.chest_canvas import soft
from medtut.data.organs import BASE, NOVEL

MAPS = ("hu", "lung", "heart", "aorta", "gullet")  # of the template, as sampled
ANGLES = 72
DRAWN = (
    *BASE, "kidney_right", "inferior_vena_cava", "portal_vein_and_splenic_vein",
    "adrenal_gland_right", "adrenal_gland_left", "urinary_bladder", *NOVEL,
)  # fmt: skip
"""What a drawn patient is labelled with; codes are 1 and up, in this order."""


@lru_cache(maxsize=1)
def recipe() -> dict[str, Any]:
    """The numbers of ``abdomen_cohort.yml``."""
    import yaml

    path = Path(__file__).with_name("abdomen_cohort.yml")
    return yaml.safe_load(path.read_text(encoding="utf-8"))


@dataclass(frozen=True, eq=False)
class Trunk:
    """A chest template and how it goes on below.

    Attributes
    ----------
    maps : tensor (1, 5, X, Y, Z), `MAPS` of the template.
    labels : tensor (1, 1, X, Y, Z), its labels.
    floor : (X, Y), height of the diaphragm in it (mm from the middle of its grid).
    outline : (ANGLES,), distance of the skin from the middle where the template ends.
    wall : (ANGLES,), distance from the skin to the lungs there.
    origin, stretch, last : see the recipe.
    """

    maps: Any
    labels: Any
    floor: np.ndarray
    outline: np.ndarray
    wall: np.ndarray
    origin: np.ndarray
    stretch: np.ndarray
    last: float


def _profile(mask: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Largest distance from the middle at which `mask` (X, Y) is found, by angle."""
    from scipy import ndimage

    angle = ((np.arctan2(y, x) / (2 * np.pi) % 1) * ANGLES).astype(int)
    far = ndimage.maximum(np.hypot(x, y) * mask, angle, np.arange(ANGLES))
    far = np.asarray(far, float)
    known = np.flatnonzero(far)
    far = np.interp(np.arange(ANGLES), known, far[known], period=ANGLES)
    return ndimage.gaussian_filter1d(far, 2.5, mode="wrap")


@lru_cache(maxsize=2)
def load_trunk(name: str) -> Trunk:
    """Prepare a template (see `medtut.data.chest_anatomy.load_body`) for abdomens."""
    import torch
    from scipy import ndimage

    how, body = recipe()["bodies"][name], load_body(name)
    maps = [body.hu if k == "hu" else body.fields[k] for k in MAPS]
    x, y, z = axes(body.hu.shape, body.spacing)
    origin = np.array(how["origin"], float)
    lung = (body.labels > 0) & (body.labels < 6)
    # The lungs stand on the diaphragm; where the heart does, it is as high as beside.
    base, seen = np.argmax(lung, axis=2), lung.any(2)
    seen &= ~(body.fields["heart"] < 2).any(2)
    seen &= z[0, 0, base] < origin[2] + 12
    near = ndimage.distance_transform_edt(~seen, return_indices=True)[1]
    floor = ndimage.gaussian_filter(z[0, 0, base][tuple(near)], 5)
    stretch = np.array(how["stretch"])
    flat = np.broadcast_arrays(
        (x[..., 0] - origin[0]) / stretch[0],
        (y[..., 0] - origin[1]) / stretch[1] - recipe()["middle"],
    )

    def at(height: float) -> int:
        return int(np.abs(z[0, 0] - height).argmin())

    outline = _profile(body.hu[..., at(how["last"])] > -300, *flat)
    here = slice(at(origin[2] + 4), at(origin[2] + 22))
    skin = _profile((body.hu[..., here] > -300).all(2), *flat)
    wall = skin - _profile(lung[..., here].any(2), *flat)
    return Trunk(
        torch.from_numpy(np.stack(maps))[None],
        torch.from_numpy(body.labels.astype(np.float32))[None, None],
        floor, outline, np.clip(wall, 14, 60), origin, stretch,
        how["last"] - origin[2],
    )  # fmt: skip


def noise(
    rng: np.random.Generator, shape: tuple[int, ...], spacing: Any, period: float
) -> np.ndarray:
    """A smooth random field of unit variance, drawn coarsely and interpolated."""
    import torch
    from scipy import ndimage
    from torch.nn.functional import interpolate

    wide = period > 30  # for a fine texture, interpolation is smooth enough
    lattice = np.ceil(np.array(shape) * spacing / period * (3 if wide else 2.2))
    rough = rng.standard_normal(lattice.astype(int) + 3, np.float32)
    rough = ndimage.gaussian_filter(rough, 1.0, mode="wrap") if wide else rough
    coarse = torch.from_numpy(rough / rough.std())[None, None]
    fine = interpolate(coarse, shape, mode="trilinear", align_corners=True)
    return fine[0, 0].numpy()


def blend(a: Any, b: Any, width: float) -> Any:
    """The smaller of two distances, rounded where they meet."""
    h = np.clip(0.5 + 0.5 * (b - a) / width, 0, 1)
    return b + (a - b) * h - width * h * (1 - h)


@dataclass
class Frame:
    """Where a patient's voxels are in the trunk, and distances from there.

    Attributes
    ----------
    at : (3, X, Y, Z) place of every voxel, mm as in the recipe.
    grid : three arrays (n,), the same without the smooth deformation.
    """

    at: np.ndarray
    grid: list[np.ndarray]

    def box(self, low: Any, high: Any, margin: float = 24.0) -> tuple[slice, ...]:
        """Voxels between two places (mm)."""
        found = []
        for g, a, b in zip(self.grid, low, high, strict=True):
            i, j = np.searchsorted(g, (a - margin, b + margin))
            found.append(slice(int(i), max(int(j), int(i))))
        return tuple(found)

    def tube(self, rows: Any, box: Any = None) -> tuple[Any, np.ndarray]:
        """Distance to a smooth tube through rows of x, y, z, radius, in a box."""
        from scipy.interpolate import CubicSpline

        rows = np.asarray(rows, np.float32)
        if box is None:
            reach = rows[:, 3:]
            box = self.box((rows[:, :3] - reach).min(0), (rows[:, :3] + reach).max(0))
        p, fine = self.at[:, *box], 3 * (len(rows) - 1) + 1
        if len(rows) > 2:
            t = np.arange(len(rows))
            rows = CubicSpline(t, rows)(np.linspace(0, t[-1], fine)).astype(np.float32)
        best = np.full(p.shape[1:], 1e3, np.float32)
        for a, b in pairwise(rows):
            way = b[:3] - a[:3]
            off = p - a[:3, None, None, None]
            t = np.tensordot(way, off, 1) / max(float(way @ way), 1e-6)
            t = np.clip(t, 0, 1)
            off -= way[:, None, None, None] * t
            far = np.sqrt((off * off).sum(0)) - (a[3] + t * (b[3] - a[3]))
            best = np.minimum(best, far)
        return box, best

    def balls(self, rows: Any, box: Any = None) -> tuple[Any, np.ndarray]:
        """Distance (about) to ellipsoids of rows x, y, z and three radii, merged."""
        rows = np.asarray(rows, np.float32)
        if box is None:
            low, high = rows[:, :3] - rows[:, 3:], rows[:, :3] + rows[:, 3:]
            box = self.box(low.min(0), high.max(0))
        p, best = self.at[:, *box], None
        for row in rows:
            off = (p - row[:3, None, None, None]) / row[3:, None, None, None]
            k = np.sqrt((off * off).sum(0))
            steep = np.sqrt(((off / row[3:, None, None, None]) ** 2).sum(0))
            far = k * (k - 1) / (steep + 1e-6)
            best = far if best is None else blend(best, far, 18)
        return box, best


def polar(p: np.ndarray, middle: float) -> tuple[np.ndarray, np.ndarray]:
    """Distance (mm) of places from the middle line, and angle from 0 to `ANGLES`."""
    x, y = p[0], p[1] - middle
    return np.hypot(x, y), np.arctan2(y, x) / (2 * np.pi) % 1 * ANGLES


def superellipse(angle: np.ndarray, half: Any) -> np.ndarray:
    """Radius at angles (0 to `ANGLES`); half width, front, back and exponent."""
    wide, front, back, n = half
    turn = angle / ANGLES * 2 * np.pi
    deep = np.where(np.sin(turn) > 0, front, back)
    parts = np.abs(np.cos(turn) / wide) ** n + np.abs(np.sin(turn) / deep) ** n
    return parts ** (-1 / n)


def outline(trunk: Trunk, heights: np.ndarray, wide: float, more: float) -> np.ndarray:
    """Distance of the skin from the middle line, (heights, ANGLES), below the chest.

    The chest's own outline goes over into that of a waist and hips, with `more` mm of
    fat under the skin.
    """
    rows = np.array(recipe()["trunk"], float)[::-1]
    angle, own = np.arange(ANGLES), trunk.outline
    drawn = np.stack([superellipse(angle, r[2:] * [wide, wide, wide, 1]) for r in rows])
    share = rows[:, 1:2]
    level = share * own + (1 - share) * (drawn + more)
    return np.stack(
        [np.interp(heights, rows[:, 0], level[:, a]) for a in angle], 1
    ).astype(np.float32)


def look_polar(table: np.ndarray, i: np.ndarray, angle: np.ndarray) -> np.ndarray:
    """Values of a table (heights, ANGLES) at places in it, angles going round."""
    from scipy import ndimage

    return ndimage.map_coordinates(table, [i, angle], order=1, mode="grid-wrap")


@dataclass
class Painter:
    """A patient while being drawn."""

    frame: Frame
    hu: np.ndarray
    spacing: np.ndarray
    rng: np.random.Generator
    means: dict[str, float]
    size: float = 1.0  # of organs, relative
    zoom: float = 1.0  # voxels for what is drawn at this size
    labels: np.ndarray = field(init=False)
    moved: dict[str, tuple] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.labels = np.zeros(self.hu.shape, np.uint8)
        self.width = float(self.spacing.mean()) / 2

    def noise(self, period: float, box: Any = ()) -> np.ndarray:
        shape = self.hu[box].shape
        return noise(self.rng, shape, self.spacing, period)

    def put(
        self, box: Any, far: np.ndarray, value: Any, name: str | None = None,
        only: Any = None, keep: bool = False,
    ) -> None:  # fmt: skip
        """Fill where `far` is less than 0; without a name the label goes (or stays)."""
        cover, inside = soft(far, self.width), far < 0
        if only is not None:
            cover, inside = cover * only, inside & (np.asarray(only) > 0.5)
        part = self.hu[box]
        part += cover * (value - part)
        if not keep:
            self.labels[box][inside] = DRAWN.index(name) + 1 if name else 0

    def shape(self, name: str, key: str = "", box: Any = None) -> tuple[Any, Any]:
        """Distance to a shape of the recipe, moved and scaled as this patient has it.

        Shapes that share a `key` move together.
        """
        how, number = recipe()["shapes"][name], recipe()["patient"]
        if (key or name) not in self.moved:
            step = self.rng.normal(0, number["move"], 3)
            grown = np.exp(np.clip(self.rng.normal(0, number["radius"]), -0.13, 0.13))
            self.moved[key or name] = step, grown * self.size
        step, grown = self.moved[key or name]
        rows, far = {k: np.array(v, float) for k, v in how.items()}, None
        if "pair" in how:
            rows["left"] = rows["pair"] * [-1, 1, 1, 1]
        for r in rows.values():
            r[:, :3] += step
            r[:, 3:] *= grown
        if box is None:
            low = np.min([(r[:, :3] - r[:, 3:]).min(0) for r in rows.values()], 0)
            high = np.max([(r[:, :3] + r[:, 3:]).max(0) for r in rows.values()], 0)
            box = self.frame.box(low, high)
        for kind, r in rows.items():
            new = (self.frame.balls if kind == "ball" else self.frame.tube)(r, box)[1]
            far = new if far is None else np.minimum(far, new)
        return box, far


def spine_at(p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """y behind the front of the spine, and height within a vertebra, -1 to 1."""
    way, how = np.array(recipe()["spine"])[::-1], recipe()["vertebra"]
    back = p[1] - np.interp(p[2], *way.T).astype(np.float32)
    level = (p[2] - how["first"]) / how["height"] % 1 * 2 - 1
    return back, level
