"""Organs of a drawn abdomen, painted one in front of the other.

What is painted later lies in front: loops of bowel, liver, stomach, spleen, kidneys,
pancreas, vessels; and the chambers of the heart.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from medtut.data.abdomen_anatomy import DRAWN, Frame, Painter, blend, recipe, soft
from medtut.data.chest_anatomy import recipe as chest


def _to_size(c: Painter, name: str, far: np.ndarray, room: np.ndarray) -> np.ndarray:
    """Let an organ swell or shrink (mm) to its volume where `room` is less than 0."""
    mean, deviation = recipe()["drawn_volumes"][name]
    wanted = c.size**3 * (mean + np.clip(c.rng.normal(), -1.6, 1.6) * deviation)
    count = int(wanted * 1000 / c.spacing.prod() * c.zoom)
    free = np.sort(far[room < 0])
    if len(free) > count:
        far = far - np.clip(free[count], -9, 20)
    return np.maximum(far, room)


def bowel(c: Painter, cavity: np.ndarray, gap: float, back: float) -> None:
    """Small bowel as packed loops with fat between, mesentery, then the colon."""
    from scipy.spatial import cKDTree

    rng, m, how = c.rng, c.means, recipe()["patient"]
    box = c.frame.box((-140, -40, -372), (140, 120, -96), 0)
    p, room = c.frame.at[:, *box], cavity[box] < -gap / 2
    if not room.any():
        return
    step = np.array([27.0, 27.0, 24.0]) * rng.uniform(0.9, 1.15)
    ends = zip((-140, -60, -380), (150, 130, -80), step, strict=True)
    lattice = np.meshgrid(*(np.arange(*end) for end in ends), indexing="ij")
    seeds = np.stack(lattice, -1).reshape(-1, 3)
    seeds += rng.uniform(-0.42, 0.42, seeds.shape) * step
    # Neighbours along a direction are one loop, seen along its course.
    size = lattice[0].shape
    index = np.indices(size).reshape(3, -1).T
    way = np.eye(3, dtype=int)[rng.integers(0, 3, len(index))]
    tied = np.arange(len(index))
    ahead = np.minimum(index + way, np.array(size) - 1)
    join = rng.random(len(index)) < 0.62
    tied[join] = np.ravel_multi_index(tuple(ahead[join].T), size)
    tied = np.minimum(tied, tied[tied])
    points = p[:, room].T
    wave = rng.uniform(0, 6, 3)
    bent = points + 5 * np.sin(points[:, [1, 2, 0]] / 11 + wave)
    near, number = (a.T for a in cKDTree(seeds).query(bent, k=4))
    # Half the way to the next loop: the first neighbour that is not of the same.
    same = tied[number[1:]] == tied[number[0]]
    near[1:][same] = 99
    first, second = near[0], near[1:].min(0)
    # Around the root of the mesentery there is fat with vessels in it.
    root = np.hypot(seeds[:, 0] / 62, (seeds[:, 1] - 22) / 42)
    odds = np.clip(1.3 * root - 0.3, 0, 0.78) * (seeds[:, 2] < -125 + rng.normal(0, 8))
    loop = (rng.random(len(seeds)) < odds)[tied]
    far = gap / 2 + 0.8 * c.noise(14, box)[room] - np.minimum(second - first, 24) / 2
    far = np.where(loop[number[0]], far, 5.0)
    own = rng.normal(22, 11, len(seeds))
    gas = rng.random(len(seeds)) < 0.25 * how["unopacified"]
    grain = c.noise(8, box)[room]
    content = own[tied][number[0]] + 9 * grain
    height = back * (points[:, 1] - seeds[number[0], 1])
    content = np.where(gas[tied][number[0]] & (height > 1), -820.0, content)
    flat = c.hu[box][room]
    flat += 36 * np.clip(c.noise(11, box)[room] - 1.05, 0, 1)  # vessels of the fat
    flat += soft(far, c.width) * (m["bowel wall"] - flat)
    inner = soft(far + 3.4, c.width)
    collapsed = rng.random(len(seeds)) < 0.35
    inner *= ~collapsed[tied][number[0]]
    flat += inner * (content - flat)
    c.hu[box][room] = flat

    box, far = c.shape("colon")
    far = far + 2.4 * c.noise(24, box) * (1 + 0.5 * rng.random())
    far = np.maximum(far, cavity[box] + 2)
    c.put(box, far - gap, m["fat"] + 8 * c.noise(9, box))
    c.put(box, far, m["bowel wall"])
    p, speck = c.frame.at[:, *box], c.noise(8, box)
    stool = 10 + 55 * speck - 330 * np.clip(speck - 0.7, 0, 1.2)
    full = c.noise(55, box) + 0.4
    gassy = np.clip(0.03 * back * (p[1] - 45) + 0.7 * c.noise(60, box), -1, 2) > 0.75
    inside = np.where(gassy, -880.0, np.where(full > 0, stool, m["bowel wall"]))
    c.put(box, far + 3.2, inside)


def upper(c: Painter, cavity: np.ndarray, facts: dict[str, Any]) -> None:
    """Liver, gallbladder, spleen, stomach, kidneys, adrenals, pancreas, duodenum."""
    rng, m = c.rng, c.means
    back = -1.0 if facts["prone"] else 1.0
    other = {}
    for name in ("stomach", "kidney_right", "kidney_left", "gallbladder", "spleen"):
        box, far = c.shape(name)
        whole = np.full(c.hu.shape, 60.0, np.float32)
        whole[box] = far
        other[name] = whole
    # Liver: against the wall and the diaphragm, hollow underneath.
    box, far = c.shape("liver")
    _, hollow = c.shape("visceral", "liver", box)
    far = -blend(-far, hollow + 2 * c.noise(40, box), 14)
    for name, room in (("kidney_right", 5), ("stomach", 1.5), ("gallbladder", -1.5)):
        far = -blend(-far, other[name][box] - room, 6)
    far = far + 1.6 * c.noise(45, box)
    near = np.maximum(3 - other["kidney_right"], -5 - other["stomach"])[box]
    room = np.maximum(cavity[box] + 1.5, near)
    room = np.maximum(room, 1.0 - other["gallbladder"][box])
    far = _to_size(c, "liver", far, np.maximum(room, -14 - hollow))
    c.put(box, far, m["liver"] + 4.5 * c.noise(8, box), "liver")
    inside = np.clip(-far / 4, 0, 1)
    for k in ("", " 2", " 3"):
        part, vessel = c.shape("liver vessels" + k, "liver", box)
        blood = m["liver vein"] if k == "" else m["portal"]
        c.put(part, vessel + 0.8 * c.noise(20, box), blood, only=inside, keep=True)
    part, far = c.shape("fissure", "liver")
    c.put(part, far + 1.5 * c.noise(20, part), m["fat"] + 45)
    if facts["cyst"] == "liver":
        place = c.frame.at[:, *box][:, inside == 1].T
        if len(place):
            _cyst(c, place[rng.integers(len(place))], -4 * inside, box, facts)
    # Spleen and stomach: neighbours under the left dome.
    box, far = c.shape("spleen")
    room = np.maximum(cavity[box] + 1, 5 - other["kidney_left"][box])
    far = _to_size(c, "spleen", far + 1.5 * c.noise(40, box), room)
    spots = 22 * c.noise(16, box) if facts["phase"] == "arterial" else 0
    c.put(box, far, m["spleen"] + spots + 4.5 * c.noise(8, box), "spleen")
    other["spleen"][box] = far
    box, far = c.shape("stomach")
    filled = facts["filling"]
    far = far + 11 * (1 - filled) + 2.2 * c.noise(34, box)
    far = -blend(-far, other["spleen"][box] - 3, 5)
    far = np.maximum(far, cavity[box] + 2)
    c.put(box, far, m["stomach wall"] + 5 * c.noise(8, box), "stomach")
    p, thick = c.frame.at[:, *box], rng.uniform(4, 6.5)
    level = back * (p[1] - rng.normal(62, 9)) + 2 * c.noise(20, box)
    food = m["food"] + rng.uniform(5, 22) * c.noise(11, box)
    food = food - rng.uniform(0, 200) * np.clip(c.noise(9, box) - 1.2, 0, 1)
    c.put(box, far + thick + 1.2 * c.noise(14, box), food, keep=True)
    gas = np.maximum(far + thick + 0.5, -level)
    c.put(box, gas, -930.0, keep=True)
    if not facts["resected"]:
        box, far = c.shape("gallbladder")
        c.put(box, far - 1.2, 0.6 * m["liver"] + 12, keep=True)
        far = _to_size(c, "gallbladder", far, cavity[box] + 1)
        c.put(box, far, m["gallbladder"] + 3 * c.noise(9, box), "gallbladder")
    spared = [DRAWN.index(k) + 1 for k in ("spleen", "liver", "stomach")]
    for side in ("right", "left"):
        name = f"kidney_{side}"
        box, far = c.shape(name)
        _, sinus = c.shape(f"sinus_{side}", name, box)
        room = np.maximum(cavity[box] + 3, 1.0 - sinus)
        far = _to_size(c, name, far + 1.3 * c.noise(20, box), room)
        loose = (cavity[box] < 0) & ~np.isin(c.labels[box], spared)
        c.put(box, far - 7, m["fat"] + 6 * c.noise(9, box), only=loose)
        uneven = 3.2 * c.noise(17, box)
        c.put(box, far, m["cortex"] + 5 * c.noise(8, box), name)
        c.put(box, np.maximum(far + 7 + uneven, -8 - sinus), m["medulla"], keep=True)
        c.put(box, sinus + 1.2 * c.noise(12, box), m["fat"] + 40)
        c.put(box, sinus + 5, m["pelvis"], keep=True)
        if facts["cyst"] == name:
            rim = c.frame.at[:, *box][:, np.abs(far) < 3].T
            if len(rim):
                _cyst(c, rim[rng.integers(len(rim))], None, box, facts, name)
        tag = f"adrenal_gland_{side}"
        box, far = c.shape(tag)
        c.put(box, far, m["adrenal"] + 4.5 * c.noise(8, box), tag)
    box, far = c.shape("pancreas")
    fatty = facts["lobulation"]
    far = far + 2.0 * c.noise(12, box) * fatty + 0.6 * c.noise(20, box)
    room = np.maximum(2 - other["stomach"], cavity)[box]
    far = _to_size(c, "pancreas", far, room)
    tissue = m["pancreas"] + 5 * c.noise(8, box)
    tissue = tissue - 60 * fatty * np.clip(c.noise(9, box) - 1.0, 0, 1)
    c.put(box, far, tissue, "pancreas")
    box, far = c.shape("duodenum")
    far = far + 1.4 * c.noise(18, box)
    free = other["gallbladder"][box] > -1
    c.put(box, far, m["bowel wall"], "duodenum", only=free)
    inner = m["food"] + 10 * c.noise(10, box)
    p, some = c.frame.at[:, *box], c.noise(40, box) > 1.1
    inner = np.where(some & (back * (p[1] - 40) > 0), -780.0, inner)
    c.put(box, far + 3.6 + 1.5 * c.noise(25, box), inner, keep=True)


def _cyst(
    c: Painter, centre: np.ndarray, within: Any, box: Any, facts: dict, name: str = ""
) -> None:
    """Water, round, in an organ of which it counts as a part (as outlined by most)."""
    radius = c.rng.uniform(4, 15)
    _, far = c.frame.balls([[*centre, radius, radius, radius]], box)
    far = far if within is None else np.maximum(far, within + 2)
    c.put(box, far, c.rng.uniform(0, 14), name or None, keep=not name)
    facts["cyst_mm"] = round(2 * radius, 1)


def vessels(c: Painter, trunk: Any, maps: dict[str, np.ndarray], body: str) -> None:
    """Veins, arteries, the aorta from arch to pelvis, and the gullet beside it."""
    m, how = c.means, chest()["bodies"][body]
    scale = np.array([*trunk.stretch, 1.0])

    def here(rows: Any) -> np.ndarray:
        return (np.array(rows, float) - trunk.origin) / scale

    for name, key in recipe()["vessels"].items():
        box, far = c.shape(name, "vessels")
        far = far + 0.6 * c.noise(20, box)
        if name == "inferior_vena_cava":  # ends at the heart
            far = np.maximum(far, 1 - maps["heart"][box])
        c.put(box, far, m[key] + 3 * c.noise(9, box), name if name in DRAWN else None)
    # The aorta comes from the chest, where the template knows its course.
    low = np.array(recipe()["shapes"]["aorta"]["tube"], float)
    step, grown = c.moved["vessels"]
    low = np.c_[low[:, :3] + step, low[:, 3:] * grown]
    above = np.array([w for w in here(how["aorta"]) if w[2] > -28])[-1]
    box, far = c.frame.tube(np.r_[[[*above, 13.0]], low])
    far = np.where(c.frame.at[2][box] > -26, 9, far)
    c.put(box, far, m["artery"] + 3 * c.noise(9, box), "aorta")
    box = c.frame.box((-200, -200, -26), (200, 200, 400), 6)
    far = np.maximum(maps["aorta"][box], -30 - c.frame.at[2][box])
    tube = c.hu[box] > -60
    c.put(box, far, m["artery"] + 3 * c.noise(9, box), "aorta", only=tube)
    # The gullet, down to the stomach.
    gullet = here(how["oesophagus"])
    gullet = gullet[gullet[:, 2] > -22]
    cardia = np.array(recipe()["shapes"]["stomach"]["tube"][1][:3], float)
    end = np.array([cardia[0] * 0.72, cardia[1] * 0.8, cardia[2]])
    mid = (gullet[-1] + end) / 2 + [4, 0, 0]
    line = np.r_[gullet, mid[None], end[None]]
    box, far = c.frame.tube(np.c_[line, np.full(len(line), c.rng.uniform(7.5, 9))])
    free = ~np.isin(c.labels[box], [DRAWN.index(k) + 1 for k in ("aorta", "stomach")])
    value = m["esophagus"] + 4 * c.noise(8, box)
    c.put(box, far, value, "esophagus", only=free)
    lumen = np.where(c.noise(50, box) > 0.9, -600.0, value)
    c.put(box, far + 5.5, lumen, only=free, keep=True)


def heart(c: Painter, maps: dict[str, Any], body: str, at: Any) -> None:
    """Chambers and muscle of the left ventricle within the template's heart."""
    ball, how, m = chest()["bodies"][body]["heart"], recipe()["heart"], c.means
    centre, radii = np.array(ball["centre"], float), np.array(ball["radii"], float)
    off = (at - centre[:, None, None, None]) / radii[:, None, None, None]
    heart = np.minimum(maps["heart"], (np.sqrt((off * off).sum(0)) - 1.1) * 46)
    found = np.argwhere(heart < 4)
    if not len(found):
        return
    box = tuple(
        slice(a, b + 1) for a, b in zip(found.min(0), found.max(0), strict=True)
    )
    whole, p = heart[box], at[:, *box]
    inner = Frame(p, [np.arange(n) for n in p.shape[1:]])
    free = c.labels[box] == 0
    grown, shift = np.exp(c.rng.normal(0, 0.05)), c.rng.normal(0, 3, 3)
    far = {}
    for name in (n for n in how if n != "wall"):
        rows = np.array(how[name], float)
        rows[:, :3] = centre + rows[:, :3] * radii * 0.92 + shift
        rows[:, 3] *= grown * radii.mean() / 50
        far[name] = inner.tube(rows, (slice(None),) * 3)[1] + 2 * c.noise(26, box)
    left = "heart_ventricle_left"
    wall = how["wall"] * grown
    rest = [n for n in far if n != left]
    others = np.stack([far[n] for n in rest])
    base = far["heart_atrium_left"]
    muscle = np.maximum(far[left] - wall, 4 - base)
    pick, near = others.argmin(0), others.min(0)
    own = c.hu[box].copy()
    given = m["given"]

    def put(distance: Any, value: float, name: str) -> None:
        distance = np.maximum(distance, whole + 2)
        solid = free * np.clip((own + 40) / 60, 0, 1)  # fat around the vessels stays
        wanted = value + 6 * c.noise(9, box) if given else 0.55 * own + 0.45 * value
        c.put(box, distance, wanted, name, only=solid)

    rim = np.minimum(near, 99) - 6
    for k, name in enumerate(rest):
        blood = m["left blood" if name.endswith("left") else "right blood"]
        mine = np.where(pick == k, rim, 9.0)
        put(np.maximum(mine, wall - far[left] - 0.5), blood, name)
    put(muscle, m["myocardium"], "heart_myocardium")
    put(far[left], m["left blood"], left)
