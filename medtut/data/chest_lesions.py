"""How each chest finding is drawn, in HU, at its place in one patient.

Every painter takes the `Canvas` and a severity in 0..1, changes ``canvas.hu`` and says
what it drew. Ranges of size and density are in ``chest_cohort.yml`` with their sources.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from medtut.data.chest_anatomy import LABELS
from medtut.data.chest_canvas import Canvas, soft

LOBES = tuple(LABELS)[:5]


def said(lobes: list[int] | str = "", size: float = 0.0, **more: Any) -> dict[str, Any]:
    """Side, lobe and size, for the report."""
    side, lobe = lobes, ""
    if not isinstance(lobes, str):
        right, left = min(lobes) < 4, max(lobes) > 3
        side = "bilateral" if right and left else "right" if right else "left"
        lobe = LOBES[lobes[0] - 1] if len(lobes) == 1 else ""
    return {"side": side, "lobe": lobe, "size_mm": round(size, 1), **more}


def _plan(c: Canvas, name: str, s: float, count: int) -> tuple[float, list, float]:
    """Size (mm), the different lobes it is in, and density (HU) of a finding."""
    return c.size(name, s), c.lobes(name, count), c.value(name)


def nodule(c: Canvas, s: float) -> dict[str, Any]:
    """One to three spiculated or smooth spheres of soft tissue."""
    name, rng = "Lung nodule", c.rng
    size = c.size(name, s)
    lobes = c.lobes(name, 1 + int(rng.random() < 0.3) + int(rng.random() < 0.15))
    for n, k in enumerate(lobes):
        r = size / 2 * (1 if n == 0 else rng.uniform(0.5, 0.9))
        own = c.labels == k
        spot = c.spot(own & (c.depth > r + 1), own & (c.depth > 3))
        radii = r * rng.uniform(0.85, 1.0, 3)
        spikes = rng.uniform(0, 0.35) if r > 4 else 0.0
        c.blob(spot, radii, c.value(name), None, spikes)
    return said(lobes, size)


def _region(c: Canvas, lobe: int, radius: float, ragged: float) -> np.ndarray:
    """Soft map (0..1) of an irregular region within one lobe, at the pleura."""
    spot = c.spot((c.labels == lobe) & (c.depth < 20))
    stretch = c.rng.uniform(0.75, 1.3, 3)
    off = (c.x - spot[0], c.y - spot[1], c.z - spot[2])
    away = np.sqrt(sum((a / k) ** 2 for a, k in zip(off, stretch, strict=True)))
    edge = away - radius + ragged * radius * (c.noise(30) + 0.4 * c.noise(13))
    return soft(edge, 0.22 * radius + 2) * (c.lobe == lobe)


def opacity(c: Canvas, s: float) -> dict[str, Any]:
    """Ground glass: patches of raised density with soft edges, vessels kept."""
    size, lobes, rise = _plan(c, "Lung opacity", s, 1 + int(c.rng.integers(0, 3)))
    for k in lobes:
        faint = rise / c.difficulty**0.5
        c.hu += _region(c, k, size / 2, 0.3) * faint * soft(c.hu + 350, 150)
    return said(lobes, size)


def consolidation(c: Canvas, s: float) -> dict[str, Any]:
    """Airless lung around open bronchi."""
    count = 1 + int(c.rng.random() < 0.25)
    size, lobes, value = _plan(c, "Consolidation", s, count)
    for k in lobes:
        cover = np.clip(_region(c, k, size / 2, 0.35) * 1.6 - 0.2, 0, 1)
        air = soft(c.f["airway"] - 0.8 * c.f["radius"], 1.8) * 0.8
        c.fill(cover * (1 - air), value + 8 * c.noise(12))
    return said(lobes, size)


def atelectasis(c: Canvas, s: float) -> dict[str, Any]:
    """Plates of collapsed lung, or a dependent wedge where it is more."""
    from scipy.spatial.transform import Rotation

    count = 1 + int(c.rng.random() < 0.35)
    size, lobes, value = _plan(c, "Atelectasis", s, count)
    for k in lobes:
        inside = c.lobe == k
        if size < 45:  # a band, touching the pleura
            spot = c.spot((c.labels == k) & (c.depth < 12) & (c.depth > 3))
            turn = Rotation.from_euler("xy", c.rng.normal(0, 0.4, 2))
            for _ in range(1 + int(size > 30)):
                radii = [0.6 * size, 0.45 * size, c.rng.uniform(2.0, 4.0)]
                c.blob(spot, radii, value, inside, 0.1, turn)
                spot = spot + np.array([0, 0, c.rng.uniform(9, 16)])
        else:
            down = -c.y - 0.3 * c.z + 0 * c.hu
            level = np.quantile(down[inside], 0.995) - 0.55 * size - 4 * c.noise(25)
            c.fill(soft(level - down, 4) * inside, value + 6 * c.noise(10))
    return said(lobes, size)


def effusion(c: Canvas, s: float) -> dict[str, Any]:
    """Fluid behind and below, rising along the pleura."""
    size = c.size("Pleural effusion", s)
    side = str(c.rng.choice(["right", "left", "bilateral"], p=[0.3, 0.25, 0.45]))
    value = c.value("Pleural effusion")
    down = -0.92 * c.y - 0.38 * c.z + 0 * c.hu
    for name, codes in (("right", (1, 2, 3)), ("left", (4, 5))):
        if side in (name, "bilateral"):
            less = side == "bilateral" and name == "left"
            part = size * c.rng.uniform(0.4, 1) if less else size
            lung = np.isin(c.lobe, codes)
            creep = 0.45 * part * np.exp(-c.depth / 6)  # the meniscus
            level = np.quantile(down[lung], 0.998) - part - creep
            c.fill(soft(level - down, 2.5) * lung, value)
    return said(side, size)


def pericardial(c: Canvas, s: float) -> dict[str, Any]:
    """A shell of fluid round the heart, thicker below and behind."""
    size, heart = c.size("Pericardial effusion", s), c.f["heart"]
    middle = (np.argwhere(c.only("heart")) - c.half) * c.spacing
    middle = 0.7 * np.median(middle[:, 1]) + 0.7 * np.median(middle[:, 2])
    low = soft(0.7 * c.y + 0.7 * c.z - middle, 40)
    shell = soft(heart - size * (0.45 + 0.55 * low), 2.0) * soft(-heart, 1.5)
    free = ~c.only("bone", "aorta", "airway")
    free &= ~c.only("below diaphragm") | (heart < 3)
    c.put(shell * free, c.value("Pericardial effusion"))
    return said("", size)


def emphysema(c: Canvas, s: float) -> dict[str, Any]:
    """Holes without walls, most in the upper lobes."""
    share = c.size("Emphysema", s)  # per cent of the upper lobes
    upper = np.isin(c.labels, (1, 4))
    holes = c.noise(float(c.rng.uniform(16, 26)))
    level = np.quantile(holes[upper], 1 - share / 100)
    depth = soft(2 - c.depth, 2) * soft(c.hu + 650, 60)
    weight = upper + 0.45 * np.isin(c.labels, (2, 3, 5))
    cover = np.clip((holes - level) / 0.25, 0, 1) * depth * weight
    c.put(cover, c.value("Emphysema"))
    return said("bilateral", detail=round(share, 1))


def fibrosis(c: Canvas, s: float) -> dict[str, Any]:
    """Bands and streaks from an apex, with a thick cap of pleura."""
    name, rng = "Pulmonary fibrotic sequela", c.rng
    size, lobes, value = _plan(c, name, s, 1 + int(rng.random() < 0.4))
    for k in lobes:
        lung, apex = c.lobe == k, k in (1, 4)
        levels = np.flatnonzero(lung.any((0, 1)))
        high = np.arange(lung.shape[2]) >= levels[int(len(levels) * (0.55 * apex))]
        for _ in range(2 + int(5 * s)):
            spot = c.spot(lung & (c.depth < 8) & high)
            way = rng.normal(0, 1, 3) * [1, 1, 0.5]
            inward = np.array([-np.sign(spot[0]), -0.2 * np.sign(spot[1]), -0.4])
            way = way / np.linalg.norm(way) + 1.2 * inward
            end = spot + way / np.linalg.norm(way) * size * rng.uniform(0.6, 1.1)
            bend = (spot + end) / 2 + rng.normal(0, 3, 3)
            c.line([spot, bend, end], rng.uniform(1.0, 2.4), value, lung)
        if apex:
            tip = np.arange(lung.shape[2]) >= levels[int(len(levels) * 0.85)]
            cap = soft(c.depth - 2 - 4 * s + 1.5 * c.noise(20), 2)
            c.fill(cap * lung * tip, value)
    return said(lobes, size)


def mosaic(c: Canvas, s: float) -> dict[str, Any]:
    """Sharp patches of lighter and darker lung on both sides."""
    name = "Mosaic attenuation pattern"
    swing = c.value(name) * (0.75 + 0.25 * s) / c.difficulty**0.5
    patch = np.clip(c.noise(c.size(name, s)) * 5, -1, 1)
    c.hu += swing * patch * soft(1 - c.depth, 1.5) * soft(c.hu + 600, 80)
    return said("bilateral")


def septal(c: Canvas, s: float) -> dict[str, Any]:
    """Walls of polygons of 10 to 25 mm below the pleura."""
    from scipy.spatial import cKDTree

    name = "Interlobular septal thickening"
    lobes = c.lobes(name, 1 + int(3 * s))
    band = 14 + 12 * s
    there = np.isin(c.labels, lobes) & (c.depth < band) & (c.hu < -600)
    place = (np.argwhere(there) - c.half) * c.spacing
    count = int(np.prod(np.ptp(place, 0)) / 17**3)
    cells = c.rng.uniform(place.min(0), place.max(0), (count, 3))
    half = (-0.25, 0.25)
    parts = np.array([(i, j, k) for i in half for j in half for k in (-0.3, 0, 0.3)])
    near = cKDTree(cells).query(place[:, None] + parts * c.spacing, k=2)[0]
    wall = soft((near[..., 1] - near[..., 0]) / 2 - c.size(name, s) / 2, 0.6)
    cover = np.zeros_like(c.hu)
    cover[there] = wall.mean(1)
    some = soft(c.depth - band, 5) * np.clip(0.7 + 0.5 * c.noise(40), 0, 1)
    c.put(cover * some, c.value(name))
    return said(lobes) | {"lobe": ""}


def nodes(c: Canvas, s: float) -> dict[str, Any]:
    """Large nodes beside the windpipe, below its fork and at the hila."""
    size, trachea = c.size("Lymphadenopathy", s), c.f["trachea"]
    low = c.place(c.marks["trachea"][-1])[2] - 25
    zone = c.only("mediastinum", "fat", "oesophagus") & (c.depth > -30)
    zone &= (trachea > 9) & (trachea < 32) & (c.z > low) & (c.z < low + 85)
    room = ~c.only("bone", "aorta", "heart", "airway")
    for n in range(1 + int(c.rng.integers(0, 2) + 3 * s)):
        r = size / 2 * (1 if n == 0 else c.rng.uniform(0.6, 1))
        radii = r * np.array([1, 1.15, 1.4])
        c.blob(c.spot(zone), radii, c.value("Lymphadenopathy"), room)
    return said("", size)


def hernia(c: Canvas, s: float) -> dict[str, Any]:
    """Stomach in the chest behind the heart, with gas above fluid."""
    size = c.size("Hiatal hernia", s)
    r = size / 2
    centre = c.place(c.marks["hiatus"])
    centre += np.array([c.rng.normal(0, 4) - 2, 2, 0.45 * r])
    room, radii = ~c.only("bone", "aorta", "heart"), r * c.rng.uniform(0.85, 1.05, 3)
    c.blob(centre, radii, c.value("Hiatal hernia"), room, 0.08)
    if c.rng.random() < 0.75:
        gas = room & (c.y > centre[1] + r * c.rng.uniform(-0.2, 0.25))
        c.blob(centre + np.array([0, 0.15 * r, 0]), 0.7 * r, -800.0, gas)
    return said("", size)


def _plaques(c: Canvas, name: str, wall: np.ndarray, s: float, n: int) -> dict:
    size, near = c.size(name, s), wall
    for _ in range(n):
        spot = c.spot(near, wall)
        radii = size / 2 * c.rng.uniform(0.6, 1.0) * np.array([1.0, 0.75, 1.1])
        c.blob(spot, radii, c.value(name), c.labels > 6)
        near = wall
        if c.rng.random() < 0.6:  # they come in rows
            off = (c.x - spot[0]) ** 2 + (c.y - spot[1]) ** 2 + (c.z - spot[2]) ** 2
            near = wall & (off < 22**2)
    return said("", size, detail=n)


def arterial(c: Canvas, s: float) -> dict[str, Any]:
    """Plaques in the wall of the aorta."""
    wall = (np.abs(c.f["aorta"]) < 2.2) & ~c.only("bone") & (c.labels > 0)
    return _plaques(c, "Arterial wall calcification", wall, s, 2 + int(16 * s**1.3))


def coronary(c: Canvas, s: float) -> dict[str, Any]:
    """Plaques along the coronary arteries."""
    wall = (c.f["coronary"] < 3.2) & (c.f["heart"] < 6) & (c.labels > 6)
    name = "Coronary artery wall calcification"
    return _plaques(c, name, wall, s, 1 + int(9 * s**1.2))


def device(c: Canvas, s: float) -> dict[str, Any]:
    """A catheter, a pacemaker with its lead, or wires in the sternum, with streaks."""
    kind = str(c.rng.choice(["catheter", "pacemaker", "sternal wires"]))
    fork, metal = np.array(c.marks["trachea"][-1]), []
    value = c.value("Medical material")
    steps = np.array([[45, 45, 85], [22, 26, 40], [22, 24, 0], [18, 26, -30]])
    above, *atrium = [c.place(fork + step) for step in steps]
    if kind == "catheter":
        c.line([above, *atrium], c.rng.uniform(1.4, 2.4), value)
    elif kind == "pacemaker":
        chest = (c.labels > 11) & (c.x < -40)
        skin = (c.f["skin"] < -6) & (c.f["skin"] > -16)
        zone = skin & (c.x < -45) & (c.x > -90) & (c.z > 25) & (c.z < 85) & (c.y > 25)
        metal = [c.spot(chest & zone, chest & (c.y > 30) & (c.z > 10))]
        for d in (-8, 0, 8):
            c.blob(metal[0] + np.array([d, 0, 0]), 10, value)
        c.line([metal[0], *atrium], 1.2, value)
    else:
        bone = c.only("bone") & (np.abs(c.x - fork[0]) < 14) & (c.y > fork[1] + 30)
        for z in np.arange(fork[2] - 60, fork[2] + 45, c.rng.uniform(18, 26)):
            if (spot := c.spot(bone & (np.abs(c.z - z) < 8))) is not None:
                radii = c.rng.uniform(2.0, 3.2, 3)
                c.blob(spot + np.array([0, 3, 0]), radii, value)
                metal.append(spot)
    mask = c.hu > 300
    for x, y, z in metal:  # rays in the slices of the metal
        away = np.hypot(c.x - x, c.y - y)
        rays = np.cos(7 * np.arctan2(c.y - y, c.x - x) + c.rng.uniform(0, 6))
        level = np.exp(-(((c.z - z) / 8) ** 2)) * (c.labels > 0)
        c.hu += 140 * rays * np.exp(-away / 35) * level
    return said("left" if kind == "pacemaker" else "", detail=kind, mask=mask)


def bronchi(c: Canvas, wide: dict[int, float], thick: dict[int, float]) -> None:
    """Bronchi with their arteries; factors of lumen and mm of wall by lobe."""
    near = (c.f["airway"] < 9) & (c.depth > 0) & (c.hu < -200)
    lumen = np.array([wide.get(k, 1.0) for k in range(16)])[c.labels[near]]
    more = np.array([thick.get(k, 0.0) for k in range(16)])[c.labels[near]]
    covers = np.zeros((3, len(lumen)))
    ends = (-0.25, 0.25)
    for shift in np.array([(i, j, k) for i in ends for j in ends for k in ends]):
        away, radius, beside = c.tubes(c.at[:, near].T + shift * c.spacing)
        r = 0.85 * radius * lumen
        wall = r + 0.35 + 0.15 * radius * np.sqrt(lumen) + more
        tubes = (beside - radius, away - wall, away - r)
        covers += np.stack([soft(d, 0.9) for d in tubes]) / 8
    here = c.hu[near]
    for cover, value in zip(covers, (40.0, 20.0, -950.0), strict=True):
        here = here + cover * (value - here)
    c.hu[near] = here
