"""One chest while it is drawn: where its organs are, and brushes in millimetres."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from medtut.data.chest_anatomy import LABELS, _polyline, axes, recipe

SUB = (2, 2, 3)  # points of a voxel: what is smaller than a voxel fills a part of it


def soft(distance: np.ndarray, width: float = 2.0) -> np.ndarray:
    """Share of a voxel inside a surface; `distance` in mm, less than 0 inside."""
    return np.clip(0.5 - distance / (2 * width), 0, 1)


@dataclass
class Canvas:
    """One patient while being drawn, on the grid of the recipe.

    Attributes
    ----------
    hu, labels : (X, Y, Z).
    f : the template's fields, sampled; `lung` is less than 0 inside the lungs (mm).
    at : (3, X, Y, Z) the place in the template (mm) that a voxel shows.
    noise : ``noise(period)`` gives a smooth random field of unit variance.
    tubes : ``tubes(points)`` gives distance to the nearest bronchus, its radius and the
        distance to its artery (mm) at points (N, 3) of the template.
    """

    hu: np.ndarray
    labels: np.ndarray
    f: dict[str, np.ndarray]
    at: np.ndarray
    rng: np.random.Generator
    noise: Callable[[float], np.ndarray]
    tubes: Callable[[np.ndarray], np.ndarray]
    marks: dict[str, Any]
    difficulty: float = 1.0

    def __post_init__(self) -> None:
        from scipy import ndimage

        self.how = recipe()["findings"]
        self.spacing = np.array(recipe()["spacing"])
        self.half = (np.array(self.hu.shape) - 1) / 2
        self.x, self.y, self.z = axes(self.hu.shape, self.spacing)
        self.depth = -self.f["lung"]
        # Lobes with the voxels that they share with the chest wall or the diaphragm.
        lobes = np.where(self.labels < 6, self.labels, 0)
        rim = (lobes == 0) & (self.depth > -5)
        self.lobe = np.where(rim, ndimage.maximum_filter(lobes, 3), lobes)

    def size(self, name: str, s: float) -> float:
        low, high = self.how[name]["mm"]
        return float(low * (high / low) ** s)

    def value(self, name: str) -> float:
        return float(self.rng.uniform(*self.how[name]["hu"]))

    def put(self, cover: np.ndarray, value: Any) -> None:
        self.hu += cover * (value - self.hu)

    def fill(self, cover: np.ndarray, value: Any) -> None:
        """Put something dense in the place of air, up to the pleura and not beyond."""
        air = np.clip((-100 - self.hu) / 150, 0, 1)
        cover = cover * np.where(self.depth > 2, 1, air)
        self.hu += cover * np.maximum(value - self.hu, 0)

    def only(self, *names: str) -> np.ndarray:
        return np.isin(self.labels, [LABELS[k] for k in names])

    def lobes(self, name: str, count: int = 1) -> list[int]:
        """Different lobes, as often as the finding is there."""
        odds = np.array(self.how[name].get("lobes", [1, 1, 1, 1, 1]), float)
        picked = self.rng.choice(5, min(count, 5), replace=False, p=odds / odds.sum())
        return [int(k) + 1 for k in picked]

    def spot(self, *masks: np.ndarray) -> np.ndarray | None:
        """A random place (mm) within the first mask that is not empty."""
        for mask in masks:
            if len(there := np.flatnonzero(mask)):
                index = np.unravel_index(self.rng.choice(there), mask.shape)
                jitter = self.rng.uniform(-0.5, 0.5, 3)
                return (np.array(index) + jitter - self.half) * self.spacing
        return None

    def place(self, mark: Any) -> np.ndarray:
        """Where in this patient a point of the template lies (mm)."""
        few = self.at[:, ::2, ::2, ::2]
        off = few - np.array(mark, np.float32)[:, None, None, None]
        i = 2 * np.array(np.unravel_index((off**2).sum(0).argmin(), few.shape[1:]))
        return (i - self.half) * self.spacing + np.array(mark) - self.at[:, *i]

    def _box(self, low: np.ndarray, high: np.ndarray) -> tuple[Any, np.ndarray]:
        """The part of the grid in a box (mm), and the sub-voxel points in it."""
        first = np.floor(low / self.spacing + self.half)
        last = np.ceil(high / self.spacing + self.half)
        first, last = np.clip((first, last), 0, 2 * self.half).astype(int)
        every = zip(first, last + 1, SUB, self.half, self.spacing, strict=True)
        points = [
            ((np.arange(i * n, j * n) + 0.5) / n - 0.5 - half) * step
            for i, j, n, half, step in every
        ]
        box = tuple(map(slice, first, last + 1))
        return box, np.stack(np.meshgrid(*points, indexing="ij"), -1)

    def _draw(self, box: Any, inside: np.ndarray, value: Any, allowed: Any) -> None:
        parts = [n for pair in zip(self.hu[box].shape, SUB, strict=True) for n in pair]
        cover = inside.reshape(parts).mean((1, 3, 5))
        cover = cover if allowed is None else cover * allowed[box]
        self.hu[box] += cover * (value - self.hu[box])

    def blob(
        self, centre: np.ndarray, radii: Any, value: float,
        allowed: np.ndarray | None = None, spikes: float = 0.0, turn: Any = None,
    ) -> None:  # fmt: skip
        """An ellipsoid turned at random or by `turn`; `spikes` makes it irregular."""
        from scipy.spatial.transform import Rotation

        radii = np.broadcast_to(np.asarray(radii, float), 3)
        if turn is None:
            turn = Rotation.random(random_state=int(self.rng.integers(2**31)))
        reach = radii.max() * (1 + spikes) + 1
        box, points = self._box(centre - reach, centre + reach)
        q = (points - centre) @ turn.as_matrix().T / radii
        rho = np.sqrt((q**2).sum(-1)) + 1e-6
        if spikes:
            wave = np.array([5, 4, 6]) * self.rng.uniform(0.7, 1.3, 3)
            phase = self.rng.uniform(0, 6, 3)
            waves = np.sin(q / rho[..., None] * wave + phase).prod(-1)
            rho = rho / (1 + spikes * waves)
        self._draw(box, soft((rho - 1) * radii.min(), 0.9), value, allowed)

    def line(
        self, points: Any, radius: float, value: float, allowed: Any = None
    ) -> None:
        """A tube along straight segments (mm)."""
        from scipy.spatial import cKDTree

        points = np.array(points)
        box, grid = self._box(points.min(0) - radius - 2, points.max(0) + radius + 2)
        tree = cKDTree(_polyline(points, 0.8))
        away = tree.query(grid, distance_upper_bound=radius + 2)[0]
        self._draw(box, soft(np.minimum(away, 99) - radius, 0.9), value, allowed)
