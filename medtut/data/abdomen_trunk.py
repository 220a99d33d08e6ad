"""Wall, spine and pelvis of a drawn abdomen: skin, fat, muscles and bones."""

from __future__ import annotations

from typing import Any

import numpy as np

from medtut.data.abdomen_anatomy import Frame, Painter, recipe, soft, spine_at


def wall(c: Painter, p: np.ndarray, depth: Any, fat: Any, inner: Any, z: slice) -> Any:
    """HU of the wall below the chest: skin, fat, muscles, ribs."""
    rng, m = c.rng, c.means
    box = (slice(None), slice(None), z)
    grain, lines = c.noise(9, box), c.noise(16, box)
    greasy = m["fat"] + 7 * grain + 28 * np.clip(lines - 1.1, 0, 1)
    hu = np.full(depth.shape, -1000.0, np.float32)

    def put(far: Any, value: Any) -> None:
        hu[...] += soft(far, c.width) * (value - hu)

    put(-depth, 15.0)
    put(2.2 - depth, greasy)
    # Muscles with fat between their layers and bundles.
    septa = np.exp(-((c.noise(48, box) / 0.13) ** 2))
    septa *= np.clip((-350 - p[2]) / 25, 0, 1)
    meat = m["muscle"] + 5 * grain - 55 * np.clip(lines - 0.9, 0, 1) - 120 * septa
    core = np.minimum(depth - inner, p[2] + 372 + 8 * lines)
    put(np.maximum(fat - depth, core), meat)
    # Three layers at the sides.
    flank = np.clip(np.abs(p[0]) / 60 - 1, 0, 1) * np.clip((p[1] + 45) / 20, 0, 1)
    layer = (depth - fat) / np.maximum(inner - fat, 1)
    seam = np.minimum(np.abs(layer - 0.36), np.abs(layer - 0.7)) * 16 - 0.7
    hu += soft(seam, c.width) * flank * (-45 - hu) * (p[2] > -230) * 0.8
    put(np.maximum(np.abs(p[0]) - 1, np.maximum(fat - 2 - depth, -p[1])), -25.0)
    _, far = c.shape("erector", box=box)
    put(np.maximum(far - 2.4, 2 - (depth - fat)), m["fat"] + 40 + 30 * lines)
    tissue = m["muscle"] + 6 * grain - 60 * np.clip(lines - 0.5, 0, 1)
    put(np.maximum(far, 4 - (depth - fat)), tissue)
    # Ribs go down on their way to the front; the last ones end at the side.
    arc = 105 * np.arctan2(np.abs(p[0]), 28 - p[1])
    along = p[2] + 0.6 * arc + rng.uniform(-8, 8)
    own = np.rint(along / 27) * 27
    rib = np.hypot((along - own) / 5.2, (depth - inner + 5.5) / 3.6) * 4.2 - 4.2
    end = np.maximum(arc - 100 - 2.4 * (own + 87), -100 - own)
    end = np.maximum(end, 0.9 * np.maximum(arc - 190, 0) - 145 - p[2])  # the arch
    rib = np.maximum(np.maximum(rib, end), 24 - np.abs(p[0]))
    bony = np.clip((205 - arc) / 20, 0, 1)  # then cartilage
    put(rib, 100 + 200 * bony + 60 * grain * bony)
    put(rib + 2.4, 90 + 30 * bony + 40 * grain * bony)
    return hu


def organs_of_pelvis(c: Painter, facts: dict[str, Any]) -> None:
    """Bladder, and uterus or prostate."""
    m = c.means
    other = "uterus" if facts["sex"] == "female" else "prostate"
    box, far = c.shape(other)
    if not c.hu[box].size:
        return
    c.put(box, far - 3, m["fat"] + 6 * c.noise(9, box))
    c.put(box, far, m["uterus"] + 6 * c.noise(9, box))
    box, far = c.shape("urinary_bladder")
    far = far + 1.5 * c.noise(40, box)
    c.put(box, far - 4, m["fat"] + 6 * c.noise(9, box))
    c.put(box, far, m["bowel wall"], "urinary_bladder")
    c.put(box, far + 3.4, m["bladder"] + 2 * c.noise(9, box), keep=True)


def pelvis(c: Painter) -> None:
    """Hip bones, sacrum, and the gluteal muscles in their layers."""
    m, how = c.means, recipe()
    box = c.frame.box((-190, -140, -440), (190, 120, -196), 0)
    if not c.hu[box].size:
        return
    p = c.frame.at[:, *box]
    grain, lines = c.noise(8, box), c.noise(13, box)
    side = np.abs(p[0])
    right = p[0] > 0
    q = np.stack([side, p[1], p[2]])
    mirrored = Frame(q, [g[b] for g, b in zip(c.frame.grid, box, strict=True)])
    everywhere = (slice(None),) * 3
    rows = np.array(how["blade"], float)[::-1]
    ends = [np.interp(p[2], rows[:, 0], rows[:, k]).astype("f4") for k in (1, 2, 3, 4)]
    wx, wy = ends[2] - ends[0], ends[3] - ends[1]
    length = np.hypot(wx, wy)
    t = ((side - ends[0]) * wx + (p[1] - ends[1]) * wy) / length**2
    out = ((side - ends[0]) * wy - (p[1] - ends[1]) * wx) / length
    bow = 9 * (1 - (2 * np.clip(t, 0, 1) - 1) ** 2)
    out = out - bow + 4
    past = np.maximum(np.maximum(-t, t - 1) * length, 0)
    tall = np.maximum(p[2] + 203 + 16 * (2 * np.clip(t, 0, 1) - 1.1) ** 2, -352 - p[2])
    thick = 4.2 + 3.5 * np.clip((-270 - p[2]) / 60, 0, 1) + 3 * np.clip(0.3 - t, 0, 1)
    blade = np.maximum(np.hypot(np.abs(out), past) - thick, tall)
    muscle = m["muscle"] + 5 * grain - 70 * np.clip(lines - 0.9, 0, 1)
    # The iliac muscle lines the blade inside.
    inner = np.maximum(np.abs(out + thick + 6) - 6.5, np.maximum(past - 4, tall + 6))
    c.put(box, np.maximum(inner, p[2] + 212), muscle)
    layers = how["gluteus"]
    skin = c.means["depth"][box]
    fat = c.means["under skin"] * 1.1
    sheet = layers["maximus"]
    a, b = np.array(sheet["behind"], float), np.array(sheet["front"], float)
    way = b - a
    s = ((side - a[0]) * way[0] + (p[1] - a[1]) * way[1]) / (way @ way)
    off = ((side - a[0]) * way[1] - (p[1] - a[1]) * way[0]) / np.hypot(*way)
    off = off - 10 * (1 - (2 * np.clip(s, 0, 1) - 1) ** 2)
    ending = np.maximum(np.maximum(-s, s - 1) * np.hypot(*way), 0)
    half = np.interp(p[2], [-425, -380, -320, -260, -240], [14, 21, 22, 15, 6])
    half = half.astype("f4") * c.size + 1.5 * lines
    top = np.maximum(p[2] - sheet["z"][1] - 26 * np.clip(0.8 - s, 0, 1) + 20,
                     sheet["z"][0] - p[2])  # fmt: skip
    maximus = np.maximum(np.hypot(off, ending) - half, top)
    maximus = np.maximum(maximus, fat - skin)
    found = {"maximus": maximus}
    for name in ("medius", "minimus"):
        kind = layers[name]
        low, high = kind["layer"]
        first, last = kind["along"]
        ends_z = np.maximum(p[2] - kind["z"][1], kind["z"][0] - p[2])
        swell = np.clip(-ends_z / 40, 0.12, 1) ** 0.5
        far = np.maximum(low - (out - thick), (out - thick) - high * swell * c.size)
        far = np.maximum(far, np.maximum(first - t, t - last) * length)
        found[name] = np.maximum(np.maximum(far, ends_z), fat - skin)
    found["medius"] = np.maximum(found["medius"], 1.2 - found["minimus"])
    found["maximus"] = np.maximum(found["maximus"], 2.5 - np.minimum(
        found["medius"], found["minimus"]))  # fmt: skip
    # A layer of fat around, so that the muscles part.
    bed = np.minimum.reduce(list(found.values()))
    c.put(box, np.maximum(bed - 4, fat - skin), m["fat"] + 9 * grain)
    for name, far in found.items():
        bundles = 40 if name == "maximus" else 15
        value = m["muscle"] + 6 * grain - bundles * np.clip(lines - 0.3, 0, 1)
        for which, where in (("right", right), ("left", ~right)):
            c.put(box, far, value, f"gluteus_{name}_{which}", only=where)
    # Muscles around the hip and thigh, then bones.
    for rows in how["hip_muscles"]:
        _, far = mirrored.tube(rows, everywhere)
        free = (c.labels[box] == 0).astype("f4")
        c.put(box, np.maximum(far, fat + 4 - skin), muscle, only=free, keep=True)
    head = np.array(how["hip"]["head"][:3], "f4")[:, None, None, None]
    ball = np.sqrt(((q - head) ** 2).sum(0)) - how["hip"]["head"][3]
    cup = np.maximum(np.abs(ball - 6.5) - 3.6, (side - head[0]) * 0.8 - 6)
    cup = np.maximum(cup, 0.3 * (p[2] + 345) * -1 - 9)
    bones = [blade, cup, ball]
    bones += [mirrored.tube(rows, everywhere)[1] for rows in how["bones"]]
    bones.append(mirrored.tube(how["ala"], everywhere)[1])
    _, sacral = c.frame.tube(how["sacrum"], box)
    bones.append(np.maximum(sacral, np.abs(p[0]) * 0.35 - 20))
    for far in bones:
        _bone(c, box, far + 0.8 * lines, grain)
    c.put(box, np.hypot(p[0], p[1] + 66 + 0.25 * (p[2] + 300)) - 5 + 99 * (
        p[2] < -318), m["fat"] + 90)  # fmt: skip


def _bone(c: Painter, box: Any, far: Any, grain: Any, marrow: float = 0.0) -> None:
    c.put(box, far, 370 + 80 * grain)
    c.put(box, far + 3.6, marrow or c.means["marrow"] + 35 * grain)


def back(c: Painter, top: float) -> None:
    """Psoas, quadratus and the spine below `top`."""
    m = c.means
    for name in ("quadratus", "psoas"):
        box, far = c.shape(name)
        free, far = c.labels[box] == 0, far + 1.2 * c.noise(20, box)
        c.put(box, far, m["muscle"] + 5 * c.noise(8, box), only=free)
    box = c.frame.box((-75, -110, -262), (75, 30, top), 0)
    if not c.hu[box].size:
        return
    p = c.frame.at[:, *box]
    back, level = spine_at(p)
    how = recipe()["vertebra"]
    grain, x = c.noise(7, box), np.abs(p[0])
    wide, deep = (h * (1 + 0.12 * (p[2] < -120)) for h in how["half"])
    gone = np.maximum(p[2] - top, -264 - p[2])
    waist = 1 - 0.1 * (1 - level**2)
    middle = back + deep
    body = (x / (wide * waist)) ** 2.6 + (np.abs(middle) / (deep * waist)) ** 2.6
    body = np.maximum((body ** (1 / 2.6) - 1) * deep, gone)
    # The column with its canal: muscles and fat first, then bone.
    c.put(box, np.maximum(np.hypot(x / 1.25, back + 46) - 17, gone), m["muscle"] - 8)
    disc = (1 - np.abs(level)) * how["height"] / 2 < how["disc"] / 2
    c.put(box, body, np.where(disc, 82 + 8 * grain, 400 + 60 * grain))
    c.put(box, np.where(disc, 5, body + 3.4), m["marrow"] + 32 * grain)
    canal = np.hypot(x, back + 2 * deep + 8)
    arch = np.maximum(np.abs(canal - 12.5) - 3.2, gone)
    arch = np.maximum(arch, np.abs(level + 0.15) * 17 - 13)
    _bone(c, box, arch, grain, 230)
    spinous = np.hypot(x / 1.0, np.maximum(np.abs(back + 2 * deep + 25) - 9, 0)) - 2.8
    spinous = np.maximum(np.maximum(spinous, gone), np.abs(level + 0.45) * 17 - 10)
    _bone(c, box, spinous, grain, 200)
    facet = np.hypot(x - 16, back + 2 * deep + 11) - 5
    facet = np.maximum(np.maximum(facet, gone), np.abs(level - 0.9) % 2 * 17 - 12)
    _bone(c, box, facet, grain, 240)
    wing = np.hypot(np.maximum(np.abs(x - 24) - 8, 0), back + 2 * deep + 5) - 2.8
    wing = np.maximum(np.maximum(wing, gone), np.abs(level) * 17 - 4.5)
    _bone(c, box, wing, grain, 180)
    c.put(box, np.maximum(canal - 9.5, gone), m["fat"] + 95)
    c.put(box, np.maximum(canal - 7, gone), 28.0)
