"""One drawn chest: a real body, individually deformed, with up to 18 findings.

`sample_findings` decides what a patient has, `draw_patient` draws it. The findings are
drawn independently of each other; what couples them is the place: consolidation hides
nodules, fluid pushes no organ, and an enlarged heart takes room from the left lung.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from medtut.data import chest_lesions as draw
from medtut.data.chest_anatomy import LABELS, axes, load_body, recipe
from medtut.data.chest_canvas import Canvas, soft
from medtut.errors import MedtutError

# Lung first, then what covers lung, then the mediastinum, metal last.
PAINTERS = {
    "Emphysema": draw.emphysema, "Mosaic attenuation pattern": draw.mosaic,
    "Interlobular septal thickening": draw.septal, "Lung opacity": draw.opacity,
    "Pulmonary fibrotic sequela": draw.fibrosis, "Atelectasis": draw.atelectasis,
    "Consolidation": draw.consolidation, "Lung nodule": draw.nodule,
    "Pleural effusion": draw.effusion, "Lymphadenopathy": draw.nodes,
    "Pericardial effusion": draw.pericardial, "Hiatal hernia": draw.hernia,
    "Arterial wall calcification": draw.arterial,
    "Coronary artery wall calcification": draw.coronary,
    "Medical material": draw.device,
}  # fmt: skip
TUBES = ("airway", "radius", "artery")
AIRWAYS = ("Bronchiectasis", "Peribronchial thickening")


@dataclass(frozen=True)
class Drawn:
    """What was drawn of a finding: severity 0..1, where, size (0: has none), voxels."""

    severity: float
    side: str = ""
    lobe: str = ""
    size_mm: float = 0.0
    voxels: int = 0
    detail: str | float = ""


@dataclass(frozen=True, eq=False)
class ChestPatient:
    """A drawn CT on the grid of the recipe, RAS+.

    Attributes
    ----------
    hu : (X, Y, Z) float32, whole numbers.
    findings : name to `Drawn`, of those present.
    masks : name to (X, Y, Z) bool, the voxels that the finding changed.
    labels : (X, Y, Z) uint8, `medtut.data.chest_anatomy.LABELS`.
    facts : what else the report may say (contrast agent, ratio of the heart).
    spacing : mm.
    """

    hu: np.ndarray
    findings: dict[str, Drawn]
    masks: dict[str, np.ndarray]
    labels: np.ndarray
    facts: dict[str, Any]
    spacing: np.ndarray


def sample_findings(
    rng: np.random.Generator, difficulty: float = 1.0,
    prevalence: dict[str, float] | None = None,
) -> dict[str, float]:  # fmt: skip
    """Severity (0..1) of every finding a patient has; nothing is drawn.

    Higher `difficulty` makes mild cases more frequent. `prevalence` replaces that of
    the recipe for the findings it names.
    """
    known = recipe()["findings"]
    odds = {k: v["prevalence"] for k, v in known.items()} | (prevalence or {})
    if set(odds) != set(known) or not difficulty > 0:
        raise MedtutError(
            f"sample_findings: unknown finding in {sorted(set(odds) - set(known))} or "
            f"difficulty {difficulty} not above 0; findings are {', '.join(known)}."
        )
    draws = rng.random((len(known), 2))
    return {
        name: float(s**difficulty)
        for name, (u, s) in zip(known, draws, strict=True)
        if u < odds[name]
    }


@lru_cache(maxsize=2)
def _stack(name: str) -> tuple[list[str], Any, Any]:
    """Names and tensors (1, C, X, Y, Z) of a body's HU and fields, and its labels."""
    import torch

    body = load_body(name)
    # What is looked up together stands together: a slice needs no copy.
    names = [*TUBES, *(k for k in body.fields if k not in TUBES), "hu"]
    maps = [body.hu if k == "hu" else body.fields[k] for k in names]
    maps = torch.from_numpy(np.stack(maps))[None]
    return names, maps, torch.from_numpy(body.labels.astype(np.float32))[None, None]


def _width(mask: np.ndarray, step: float) -> float:
    return float(np.ptp(np.flatnonzero(mask.any((1, 2)))) * step)


@lru_cache(maxsize=2)
def _ratio(name: str) -> float:
    """Width of the heart over that of the chest's inside in a template."""
    code, chest = load_body(name).labels, range(1, 6)
    return _width(code == LABELS["heart"], 1) / _width(np.isin(code, chest), 1)


def _look(volume: Any, points: Any, mode: str = "bilinear") -> np.ndarray:
    """A template's maps (1, C, ...) at points (3, ...) in mm."""
    import torch
    from torch.nn.functional import grid_sample

    how = recipe()
    half = np.array(how["shape"]) * how["spacing"] / 2
    flat = torch.from_numpy(np.ascontiguousarray(points, np.float32)).reshape(3, -1)
    grid = torch.stack([flat[a] / float(half[a]) for a in (2, 1, 0)], -1)
    found = grid_sample(volume, grid[None, None, None], mode=mode,
                        padding_mode="border", align_corners=False)  # fmt: skip
    return found[0].reshape(-1, *points.shape[1:]).numpy()


def _noise(rng: np.random.Generator) -> Callable[[float], np.ndarray]:
    """Make smooth random fields of unit variance on the grid."""
    import torch
    from scipy import ndimage
    from torch.nn.functional import interpolate

    shape = recipe()["shape"]
    size = np.array(shape) * recipe()["spacing"]

    def field(period: float) -> np.ndarray:
        lattice = np.ceil(size / period * 3).astype(int) + 3
        rough = ndimage.gaussian_filter(rng.standard_normal(lattice), 1.0, mode="wrap")
        coarse = torch.from_numpy((rough / rough.std()).astype(np.float32))[None, None]
        fine = interpolate(coarse, shape, mode="trilinear", align_corners=True)
        return fine[0, 0].numpy()

    return field


def _deform(
    name: str, rng: np.random.Generator, noise: Any, wide: float
) -> tuple[np.ndarray, float]:
    """Points of the template (3, X, Y, Z) that the patient's voxels show, and the
    ratio of heart to chest; `wide` is the severity of cardiomegaly, or less than 0.
    """
    how = recipe()
    number = how["anatomy"]
    coarse, fine = number["coarse"], number["fine"]
    grow = 1 + rng.uniform(-1, 1, 3) * number["scale"]
    turn = rng.uniform(-1, 1) * number["rotation"]
    grid = axes(tuple(how["shape"]), np.array(how["spacing"]))
    x, y, z = (g / s for g, s in zip(grid, grow, strict=True))
    x, y = x * np.cos(turn) - y * np.sin(turn), x * np.sin(turn) + y * np.cos(turn)
    at = np.stack(np.broadcast_arrays(x, y, z)).astype(np.float32)
    at += np.stack([noise(coarse["period"]) for _ in at]) * coarse["size"]
    # Each dome of the diaphragm has its own height; the lungs stretch with it.
    domes = rng.normal(0, number["breath"], 2)
    domes = domes.mean() + 0.5 * (domes - domes.mean())
    right = 1 / (1 + np.exp(-at[0] / 20))
    lift = right * domes[0] + (1 - right) * domes[1]
    at[2] += np.clip((50 - at[2]) / 130, 0, 1) * lift
    names, maps, _ = _stack(name)
    lung = names.index("lung")
    inside = np.clip(-_look(maps[:, lung : lung + 1], at)[0] / 12, 0, 1)
    for a in range(3):
        at[a] += noise(fine["period"]) * fine["size"] * inside
    # The heart: moved, and as wide as the ratio wants.
    low, high = number["ratio"]["healthy" if wide < 0 else "cardiomegaly"]
    ratio = low + (high - low) * (rng.random() if wide < 0 else wide)
    shift, ball = rng.normal(0, number["heart_shift"], 3), how["bodies"][name]["heart"]
    centre, radii, moved = (
        np.array(v, np.float32)[:, None, None, None]
        for v in (ball["centre"], ball["radii"], shift)
    )
    off = at - (centre + moved)
    rho = np.sqrt(((off / radii) ** 2).sum(0))
    fade = np.clip((2.0 - rho) / 0.85, 0, 1)
    fade = fade * fade * (3 - 2 * fade)
    factor = ratio / _ratio(name)
    for a, part in enumerate((1.0, 0.35, 0.6)):
        at[a] -= fade * (off[a] * (1 - 1 / factor**part) + shift[a])
    return at, float(ratio)


def _tissue(c: Canvas, rng: np.random.Generator, scanner: str) -> dict[str, Any]:
    """Densities of one healthy person, with or without contrast agent."""
    number, how = recipe()["anatomy"], recipe()["scanners"][scanner]
    lung = soft(c.f["lung"], 2)
    inner = c.f["lung"] < -3
    own = np.median(c.hu[inner])
    base = rng.normal(*number["lung"])
    calibre = rng.uniform(*number["vessels"])
    back = -(c.y - np.median(np.broadcast_to(c.y, c.hu.shape)[inner])) / 160
    new = base + (c.hu - own) * calibre + rng.uniform(*number["dependent"]) * back
    new = new + 14 * c.noise(9) + 12 * c.noise(45)
    solid = np.clip((c.hu + 400) / 300, 0, 1)  # the edge keeps its tissue
    c.hu += lung * (1 - solid) * (np.maximum(new, -985) - c.hu)
    tissue = (c.hu > -200) & (c.labels > 6)
    c.hu += tissue * (5 * c.noise(8) + 5 * c.noise(30) + rng.normal(0, 4))
    c.hu = np.where(c.hu > 160, 160 + (c.hu - 160) * rng.uniform(0.75, 1.15), c.hu)
    given = bool(rng.random() < how["contrast"])
    blood = rng.uniform(*how["enhancement"]) if given else rng.uniform(-6, 8)
    chambers = soft(c.f["heart"] + 5 + 3 * c.noise(18), 4)
    chambers *= 1 - 0.25 * (c.noise(40) > 0.5)
    vessel = np.maximum(chambers, soft(c.f["aorta"] + 1.5, 2)) * (c.hu > -50)
    # Vessels of hilum and lung, by their density.
    small = np.clip((c.hu + 150) / 180, 0, 1) * (c.f["lung"] < 0)
    c.hu += blood * np.maximum(vessel, 0.7 * small)
    if given:
        c.hu += 0.35 * blood * c.only("below diaphragm") * (c.hu > 0)
    return {"contrast": given, "lung_hu": round(float(base))}


def _innocent(c: Canvas, rng: np.random.Generator) -> None:
    """What healthy people have too: small nodes, calcified ones, fissures, gas."""
    zone = c.only("mediastinum", "fat") & (c.f["trachea"] < 35) & (c.f["trachea"] > 9)
    room = ~c.only("aorta", "heart", "airway")
    for _ in range(int(rng.integers(2, 9))):
        c.blob(c.spot(zone), rng.uniform(2, 4.2), rng.uniform(20, 45), room)
    cartilage = (c.labels > 11) & (c.y > 35) & (np.abs(c.x) < 75) & (c.depth > -16)
    # Healed tuberculosis and rings of the airways; ageing cartilage of the ribs.
    for where, most, mm, hu in ((zone, 4, (1.0, 2.8), (300, 1100)),
                                (cartilage, 10, (1.5, 4.5), (250, 900))):  # fmt: skip
        for _ in range(int(rng.integers(0, most))):
            c.blob(c.spot(where), rng.uniform(*mm), rng.uniform(*hu))
    for codes in ((1, 2, 3), (4, 5)):  # fissures, seen here and there
        lower = np.isin(c.labels, codes[-1:])
        edge = lower & ~np.roll(lower, -1, 1) & np.isin(np.roll(c.labels, -1, 1), codes)
        seen = np.clip(c.noise(40) + rng.normal(0, 0.7), 0, 1.5)
        c.hu += edge * seen * rng.uniform(20, 90)
    gullet = (c.f["gullet"] < 2) & (c.labels > 5)
    if rng.random() < 0.3 and gullet.any():
        c.blob(c.spot(gullet), [3, 3, 7], -700.0)
    if rng.random() < 0.6:  # fluid in the recesses of the pericardium
        heart = c.f["heart"]
        shell = soft(heart - rng.uniform(0.5, 3), 2) * soft(-heart, 1)
        c.put(shell * (c.noise(45) > 0) * (c.labels > 6) * ~c.only("bone"), 10.0)


def _scan(c: Canvas, rng: np.random.Generator, scanner: str) -> np.ndarray:
    """The scanner's sharpness, motion, noise and calibration."""
    from scipy import ndimage

    how, hu = recipe()["scanners"][scanner], c.hu
    blur = np.array(how["blur"])[[0, 0, 1]] / c.spacing
    hu = ndimage.gaussian_filter(hu, blur * rng.uniform(0.85, 1.15))
    if rng.random() < how["motion"]:
        near = soft(c.f["heart"] - 8, 10) * 0.5
        step = int(rng.integers(1, 3))
        hu = hu + near * ((np.roll(hu, step, 1) + np.roll(hu, -step, 1)) / 2 - hu)
    grain = np.array(how["grain"])[[0, 0, 1]]
    noise = ndimage.gaussian_filter(rng.standard_normal(hu.shape, np.float32), grain)
    noise *= rng.uniform(*how["noise"]) / noise.std()
    hu = hu + noise * (0.7 + 0.6 * soft(c.f["skin"] + 70, 60))  # more in the middle
    gain, offset = rng.normal(0, how["gain"]), rng.normal(0, how["offset"])
    hu = (hu + 1000) * (1 + gain) - 1000 + offset
    return np.rint(np.clip(hu, -1024, 3071)).astype(np.float32)


def draw_patient(
    body: str, scanner: str, seed: tuple[int, ...], difficulty: float = 1.0,
    prevalence: dict[str, float] | None = None,
) -> ChestPatient:  # fmt: skip
    """Draw one patient.

    Parameters
    ----------
    body : lung1 or lung2, the template.
    scanner : source or target.
    seed : numbers that name the patient; the same ones give the same patient.
    difficulty : at more than 1 mild cases are more frequent and faint findings fainter.
    prevalence : replaces that of the recipe for the findings it names.

    Raises
    ------
    MedtutError
        Unknown body, scanner or finding, or a difficulty that is not positive.
    """
    how, spacing = recipe(), np.array(recipe()["spacing"])
    bodies, scanners = list(how["bodies"]), list(how["scanners"])
    if body not in bodies or scanner not in scanners:
        raise MedtutError(
            f"draw_patient: no body {body!r} on scanner {scanner!r}; bodies are "
            f"{', '.join(bodies)}, scanners {', '.join(scanners)}."
        )
    who = (*seed, bodies.index(body), scanners.index(scanner))

    def start(step: int) -> tuple[np.random.Generator, Any]:
        # A stream for every step: the same person with and without a finding.
        rng = np.random.default_rng(np.random.SeedSequence([*who, step]))
        return rng, _noise(rng)

    wanted = sample_findings(start(0)[0], difficulty, prevalence)
    rng, noise = start(1)
    at, ratio = _deform(body, rng, noise, wanted.get("Cardiomegaly", -1.0))
    names, maps, labels = _stack(body)
    f = dict(zip(names, _look(maps, at), strict=True))
    here = _look(labels, at, "nearest")[0].astype(np.uint8)
    marks = how["bodies"][body]

    def tubes(points: np.ndarray) -> np.ndarray:
        return _look(maps[:, : len(TUBES)], points.T)

    c = Canvas(f["hu"].copy(), here, f, at, rng, noise, tubes, marks, difficulty)
    facts = _tissue(c, rng, scanner) | {"ratio": round(ratio, 2)}
    _innocent(c, rng)
    c.rng, c.noise = start(3)
    masks, told = _airways(c, wanted)
    for step, (name, paint) in enumerate(PAINTERS.items()):
        if name in wanted:
            c.rng, c.noise = start(10 + step)
            before = c.hu.copy()
            told[name] = paint(c, wanted[name])
            changed = np.abs(c.hu - before) > 25
            masks[name] = changed & told[name].pop("mask", changed)
    if "Cardiomegaly" in wanted:
        masks["Cardiomegaly"] = heart = c.only("heart")
        wide = _width(heart, spacing[0])
        told["Cardiomegaly"] = draw.said("", wide, detail=facts["ratio"])
    found = {
        n: Drawn(round(s, 4), voxels=int(masks[n].sum()), **told[n])
        for n, s in wanted.items()
    }
    hu = _scan(c, start(2)[0], scanner)
    return ChestPatient(hu, found, {n: masks[n] for n in found}, here, facts, spacing)


def _airways(c: Canvas, wanted: dict[str, float]) -> tuple[dict, dict]:
    """Everybody's bronchi, wider or thicker where they belong: masks and words."""
    sizes = [c.size(n, wanted[n]) if n in wanted else 0.0 for n in AIRWAYS]
    count = 1 + int(c.rng.integers(0, 3))
    lobes = c.lobes(AIRWAYS[0], count) if sizes[0] else []
    wide = dict.fromkeys(lobes, sizes[0])
    thick = dict.fromkeys(range(1, 6), sizes[1] - 0.8) if sizes[1] else {}
    plain = replace(c, hu=c.hu.copy())
    if wide or thick:
        draw.bronchi(plain, {}, {})
    draw.bronchi(c, wide, thick)
    mask, own = np.abs(c.hu - plain.hu) > 25, np.isin(c.labels, lobes)
    masks, told = {}, {}
    if wide:
        masks[AIRWAYS[0]], told[AIRWAYS[0]] = mask & own, draw.said(lobes)
    if thick:
        masks[AIRWAYS[1]] = mask & ~own if len(wide) < 5 else mask
        told[AIRWAYS[1]] = draw.said("bilateral", sizes[1])
    return masks, told
