"""Draw one patient: the trunk, the organs in their order, the scan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from medtut.data.abdomen_anatomy import (
    DRAWN,
    MAPS,
    Frame,
    Painter,
    load_trunk,
    look_polar,
    noise,
    outline,
    polar,
    recipe,
    soft,
    spine_at,
)
from medtut.data.abdomen_organs import bowel, heart, upper, vessels
from medtut.data.abdomen_trunk import back, organs_of_pelvis, pelvis, wall
from medtut.data.chest_anatomy import LABELS
from medtut.data.chest_anatomy import recipe as chest
from medtut.data.chest_findings import _look

LOBES = {k: LABELS[v] for k, v in {
    "lung_upper_lobe_right": "right upper lobe", "lung_upper_lobe_left":
    "left upper lobe", "lung_middle_lobe_right": "right middle lobe",
    "lung_lower_lobe_right": "right lower lobe", "lung_lower_lobe_left":
    "left lower lobe"}.items()}  # fmt: skip
PHASES = ("native", "arterial", "venous")


@dataclass(frozen=True)
class AbdomenPatient:
    """A drawn patient.

    Attributes
    ----------
    hu : (X, Y, Z) float32, whole numbers; axes towards right, front and head (RAS).
    labels : (X, Y, Z) uint8, 0 or 1 + the place of a structure in `DRAWN`.
    facts : phase, field, sex, disease and so on.
    spacing : mm.
    """

    hu: np.ndarray
    labels: np.ndarray
    facts: dict[str, Any]
    spacing: np.ndarray


def _place(
    rng: np.random.Generator, name: str, window: Any, spacing: np.ndarray,
    size: float, hard: float,
) -> tuple[Frame, np.ndarray]:  # fmt: skip
    """The patient's frame, and where in the template (mm) every voxel is."""
    how, trunk = recipe()["patient"], load_trunk(name)
    grow = size * (1 + rng.uniform(-1, 1, 3) * how["grow"])
    counts = np.rint(np.array([*recipe()["size"], np.ptp(window) * grow[2]]) / spacing)
    x, y = ((np.arange(n) - (n - 1) / 2) * s for n, s in
            zip(counts[:2], spacing, strict=False))  # fmt: skip
    z = np.arange(counts[2]) * spacing[2] / grow[2] + window[0]
    # In mm of the template, then of the recipe.
    whole = [
        x / grow[0] + trunk.origin[0],
        y / grow[1] + trunk.origin[1] + 24,
        z + trunk.origin[2],
    ]
    grid = np.stack(np.meshgrid(*whole, indexing="ij")).astype(np.float32)
    shape, turn = grid.shape[1:], rng.normal(0, 0.02)
    grid[0] += turn * grid[1]
    for warp in ("warp", "ripple"):
        for a in range(3):
            field = noise(rng, shape, spacing, how[warp]["period"])
            grid[a] += how[warp]["size"] * hard**0.5 * field
    scale = np.array([*trunk.stretch, 1.0], np.float32)
    at = (grid - trunk.origin[:, None, None, None].astype(np.float32)) / scale[
        :, None, None, None
    ]
    sides = [(g - o) / s for g, o, s in zip(whole, trunk.origin, scale, strict=True)]
    return Frame(at.astype(np.float32), sides), grid


def _means(rng: np.random.Generator, phase: str, hard: float) -> dict[str, Any]:
    """This patient's density of every tissue."""
    how, number = recipe(), PHASES.index(phase)
    shared = 1 + rng.normal(0, 1.6 * how["spread"]) * (number > 0)
    means: dict[str, Any] = {}
    for name, values in how["hu"].items():
        own = 1 + rng.normal(0, 0.6 * how["spread"])
        gain = (values[number] - values[0]) * shared * own
        means[name] = values[0] + rng.normal(0, 0.5 * how["native"]) + gain
    for name in means:  # harder: organs come nearer to muscle
        means[name] += (means["muscle"] - means[name]) * (1 - min(1, hard**-0.5))
    if rng.random() < how["steatosis"]:
        means["liver"] -= rng.uniform(10, 35)
    means["fat"] = rng.normal(*how["fat"])
    means["marrow"] = rng.uniform(120, 215)
    means["food"] = rng.uniform(4, 40)
    means["pelvis"] = rng.uniform(4, 14)
    means["given"] = number > 0
    return means


def _draw(
    rng: np.random.Generator, body: str, hospital: str, hard: float, wanted: str = ""
) -> tuple[Painter, dict[str, Any]]:
    from scipy import ndimage

    how, number, trunk = recipe(), recipe()["patient"], load_trunk(body)
    place = how["hospitals"][hospital]

    def lot(table: dict[str, float]) -> str:
        odds = np.array(list(table.values()), float)
        return str(rng.choice(list(table), p=odds / odds.sum()))

    sex = lot({"female": 1, "male": 1})
    organ = lot({"liver": 1, "kidney_right": 1, "kidney_left": 1})
    facts: dict[str, Any] = {
        "hospital": hospital, "phase": lot(place["phases"]),
        "field": lot(place["fields"]), "sex": sex,
        "prone": bool(rng.random() < number["prone"]),
        "resected": bool(rng.random() < number["no_gallbladder"]),
        "cyst": organ if rng.random() < number["cyst"] else "",
        "filling": float(np.round(rng.uniform(0.45, 1.1), 2)),
        "lobulation": float(np.round(rng.uniform(0.3, 1.3), 2)),
    }  # fmt: skip
    facts["field"] = wanted or facts["field"]
    window = np.array(how["fields"][facts["field"]]) + rng.uniform(-12, 12, 2)
    spacing = np.array(place["spacing"], float)
    size = place["size"] * (0.98 if sex == "female" else 1.02)
    frame, at = _place(rng, body, window, spacing, size, hard)
    p = frame.at
    # The template, and its lungs and heart rounded off where it ends.
    below = np.maximum(trunk.last + trunk.origin[2] - at[2], 0)
    seen = at.copy()
    seen[2] += below
    maps = dict(zip(MAPS, _look(trunk.maps, seen), strict=True))
    codes = _look(trunk.labels, seen, "nearest")[0].astype(np.uint8)
    maps["heart"] = maps["heart"] + 1.3 * below
    means = _means(rng, facts["phase"], hard)
    c = Painter(frame, maps["hu"].copy(), spacing, rng, means)
    c.zoom = float(np.prod(place["size"] ** 3))
    c.size = 0.98 if sex == "female" else 1.02
    # Skin and inner wall from the middle line, where the chest ends and below.
    heights = np.arange(-450, 60, 5.0)
    wide = rng.normal(1.0 if sex == "male" else 0.97, 0.03)
    fat = rng.uniform(*number["fat"][sex])
    skin = outline(trunk, heights, wide, 0.8 * (fat - 14))
    far, angle = polar(p, how["middle"])
    i = (p[2] - heights[0]) / 5
    depth = look_polar(skin, np.clip(i, 0, len(heights) - 1), angle) - far
    cleft = np.clip((-285 - p[2]) / 40, 0, 1) * (p[1] < 0)
    depth = depth - 22 * cleft * np.exp(-((p[0] / 8) ** 2))
    means["under skin"], means["depth"] = fat, depth
    own = look_polar(np.stack([trunk.wall] * 2), 0 * angle, angle)
    turn = np.sin(angle / 36 * np.pi)
    under = fat * (1 + 0.35 * np.clip(-turn, 0, 1) + 0.15 * np.cos(angle / 18 * np.pi))
    meat = 10 + 3 * np.abs(turn) + 30 * np.clip(-turn - 0.1, 0, 1)
    down = np.clip((trunk.last + 12 - p[2]) / 55, 0, 1)
    inner = own + (under + meat - own) * down
    under = np.clip(under, inner - meat - 4, inner - 7)
    # The lungs go on as a crescent along the wall and end.
    crescent = depth - inner - (48 * np.exp(-below / 20) - 6)
    crescent = np.maximum(crescent, np.maximum(inner - depth, below - 42))
    maps["lung"] = np.where(below > 0, np.maximum(maps["lung"], crescent), maps["lung"])
    # Under the diaphragm, inside the wall, off the lungs, the heart and the spine.
    half = (np.array(trunk.floor.shape) - 1) / 2
    fine = np.array(chest()["spacing"][:2]) / 2
    spot = [at[a] / fine[a] + half[a] for a in (0, 1)]
    floor = ndimage.map_coordinates(trunk.floor, spot, order=1, mode="nearest")
    floor = np.maximum(floor, trunk.last + trunk.origin[2])
    behind, _ = spine_at(p)
    column = np.minimum(np.hypot(p[0], behind + 17) - 25,
                        np.maximum(np.abs(p[0]) - 32, behind + 20))  # fmt: skip
    cavity = np.maximum.reduce([
        inner - depth, at[2] - floor + 2, 2.5 - maps["lung"], 2.5 - maps["heart"],
        -column, -366 - p[2] - 0.3 * np.abs(p[0])])  # fmt: skip
    # The wall below the chest.
    low = int(np.searchsorted(p[2].min((0, 1)), trunk.last + 22))
    if low:
        z = slice(0, low)
        cut = (slice(None), slice(None), z)
        drawn = wall(c, p[:, *cut], depth[cut], under[cut], inner[cut], z)
        share = np.clip((p[2][cut] - trunk.last + 6) / 16, 0, 1)
        c.hu[cut] = drawn + (c.hu[cut] - drawn) * share
    every = (slice(None),) * 3
    visceral = means["fat"] + 6 * c.noise(9) + 26 * np.clip(c.noise(20) - 1, 0, 1)
    visceral += 90 * np.clip(c.noise(13) - 1.35, 0, 0.9)  # small vessels
    c.put(every, cavity, visceral)
    # Lungs where the template has ended.
    ended = below > 0
    lung = -860 + 30 * c.noise(9) + 70 * np.clip(c.noise(8) - 1.2, 0, 1)
    c.put(every, np.where(ended, maps["lung"], 9), lung)
    lobe = np.where(codes < 6, codes, 0)
    lobe = np.where(lobe > 0, lobe, ndimage.maximum_filter(lobe, 5))
    for name, code in LOBES.items():
        c.labels[(lobe == code) & (maps["lung"] < 0)] = DRAWN.index(name) + 1
    gap = rng.uniform(*number["gap"]) * (1 + 0.3 * (sex == "male"))
    bowel(c, cavity, gap, -1.0 if facts["prone"] else 1.0)
    upper(c, cavity, facts)
    organs_of_pelvis(c, facts)
    back(c, trunk.last + 8)
    vessels(c, trunk, maps, body)
    pelvis(c)
    heart(c, maps, body, at)
    return c, facts


def _scan(c: Painter, place: dict[str, Any], hard: float) -> np.ndarray:
    """The scanner's sharpness, noise, streaks and calibration."""
    from scipy import ndimage

    rng, hu = c.rng, c.hu
    blur = np.array(place["blur"])[[0, 0, 1]] / c.spacing
    hu = ndimage.gaussian_filter(hu, blur * rng.uniform(0.8, 1.2))
    white = rng.standard_normal((2, *hu.shape), dtype=np.float32)
    grain = ndimage.gaussian_filter(white[0], [place["grain"]] * 2 + [0.0])
    inside = soft(-c.means["depth"] + 60, 50)
    size = rng.uniform(*place["noise"]) * hard
    hu = hu + grain / grain.std() * size * (0.7 + 0.6 * inside)
    # Bone on both sides, hips or shoulders, makes streaks from side to side.
    bone = np.clip((hu > 250).mean((0, 1)) * 25, 0, 1)
    lines = ndimage.gaussian_filter1d(white[1], 9, axis=0)
    power = rng.uniform(*recipe()["patient"]["streaks"]) * hard
    hu = hu + lines / lines.std() * power * bone * inside
    hu = np.where(c.hu < -970, hu * 0.25 - 745, hu)  # little noise in air
    hu = hu + rng.normal(0, place["offset"])
    return np.rint(np.clip(hu, -1024, 1900)).astype(np.float32)


def draw_abdomen(
    body: str, hospital: str, seed: tuple[int, ...], difficulty: float = 1.0,
    field: str = "",
) -> AbdomenPatient:  # fmt: skip
    """Draw one patient.

    Parameters
    ----------
    body : lung1 or lung2, the template of the chest.
    hospital : of the recipe.
    seed : numbers that name the patient; the same ones give the same patient.
    difficulty : at more than 1 organs differ less in density, their shapes vary more
        and the noise is stronger.
    field : what is in the scan, a key of ``fields``; or by the hospital's habit.
    """
    how = recipe()
    names = list(how["bodies"]).index(body), list(how["hospitals"]).index(hospital)
    rng = np.random.default_rng(np.random.SeedSequence([*seed, *names]))
    c, facts = _draw(rng, body, hospital, difficulty, field)
    hu = _scan(c, how["hospitals"][hospital], difficulty)
    return AbdomenPatient(hu, c.labels, facts, c.spacing)
