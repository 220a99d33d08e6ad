"""One drawn patient: real averaged anatomy, individually deformed, with a drawn tumour.

The tissue maps are those of the MNI152 template (Fonov et al., NeuroImage 2011). Only
the deformation, the disease and the scanner are drawn; ``brain_cohort.yml`` holds every
number. Coordinates are millimetres in the template's space (x right, y anterior, z up),
volumes are tensors (Z, Y, X) until they are handed out.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from medtut.data.brain_slices import template
from medtut.errors import MedtutError

CONTRASTS = ("flair", "t1", "t1ce", "t2")
KINDS = ("glioma", "meningioma", "pituitary", "none")
NECROSIS, OEDEMA, ENHANCING = 1, 2, 3
LOW = np.array([-98.0, -134.0, -72.0])  # first voxel of the template, mm
CENTRE = np.array([0.0, -17.0, 6.0])  # middle of the drawn volume, mm
MARGIN = np.array([34, 14, 0])  # voxels at each side where no head ever reaches


@lru_cache(maxsize=1)
def recipe() -> dict[str, Any]:
    """The numbers of ``brain_cohort.yml``."""
    import yaml

    path = Path(__file__).with_name("brain_cohort.yml")
    return yaml.safe_load(path.read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Patient:
    """What was drawn, on the grid of `recipe`: x right, y anterior, z up.

    Attributes
    ----------
    images : contrast to array (X, Y, Z) float32, 0 outside the head, brightest about 1.
    label : (X, Y, Z) uint8, 1 necrosis, 2 oedema, 3 enhancing tumour.
    findings : kind, side, centre (mm) and volumes (ml) of the tumour.
    """

    images: dict[str, np.ndarray]
    label: np.ndarray
    findings: dict[str, Any]


@lru_cache(maxsize=1)
def _maps() -> Tensor:
    """Fluid, grey, white and depth below the surface (mm), (1, 4, Z, Y, X)."""
    from scipy import ndimage

    found = template()
    grey, white = found["gm"], found["wm"]
    brain = ndimage.binary_fill_holes((found["t1"] > 0.1) | (grey + white > 0.5))
    fluid = np.clip(brain - grey - white, 0, 1)
    inside = ndimage.distance_transform_edt(brain, sampling=2.0)
    outside = ndimage.distance_transform_edt(~brain, sampling=2.0)
    depth = ndimage.gaussian_filter(inside - outside, 1.5)
    stack = [fluid, grey, white, depth]
    volume = np.stack(stack).astype(np.float32).transpose(0, 3, 2, 1)
    return torch.from_numpy(np.ascontiguousarray(volume))[None]


def _sample(points: Tensor) -> Tensor:
    """The template's maps (4, ...) at points (..., 3) in mm."""
    span = 2.0 * (np.array(template()["t1"].shape) - 1)
    grid = (points - torch.tensor(LOW, dtype=torch.float32)) / torch.tensor(
        span, dtype=torch.float32
    ) * 2 - 1
    found = F.grid_sample(
        _maps(), grid[None], align_corners=True, padding_mode="border"
    )
    return found[0]


class _Field:
    """Smooth random fields of unit variance on one grid."""

    def __init__(self, shape: tuple[int, ...], spacing: np.ndarray, seed: int) -> None:
        self.shape = shape  # (Z, Y, X)
        self.size = np.array(shape) * spacing[::-1]
        self.random = torch.Generator().manual_seed(seed)

    def __call__(self, period: float, channels: int = 1) -> Tensor:
        from scipy import ndimage

        # Four lattice points a period, a little blur, then linear: no cubic needed.
        lattice = [int(np.ceil(s / period * 4)) + 4 for s in self.size]
        noise = torch.randn(channels, *lattice, generator=self.random).numpy()
        smooth = ndimage.gaussian_filter(noise, (0, 1.2, 1.2, 1.2))
        smooth /= smooth.std() + 1e-9
        grown = F.interpolate(
            torch.from_numpy(smooth)[None],
            self.shape,
            mode="trilinear",
            align_corners=True,
        )
        return grown[0] if channels > 1 else grown[0, 0]

    def white(self) -> Tensor:
        """Independent normal noise of the grid's size."""
        return torch.randn(self.shape, generator=self.random)


def _turn(angles: np.ndarray) -> Tensor:
    from scipy.spatial.transform import Rotation

    return torch.from_numpy(
        Rotation.from_euler("xyz", angles).as_matrix().astype(np.float32)
    )


def _centre(kind: str, head: Tensor, points: Tensor, rng: np.random.Generator) -> Any:
    """Where the tumour sits: an index into the flattened points."""
    white, depth = head[2].flatten(), head[3].flatten()
    x, _, z = points.reshape(-1, 3).T
    if kind == "glioma":
        ok = (white > 0.7) & (depth > recipe()["tumours"][kind]["depth"]) & (z > -14)
        ok &= x.abs() > 12
    else:  # meningioma: on the convexity or beside the falx
        ok = (depth.abs() < 2.5) & (z > 8)
    places = torch.nonzero(ok)[:, 0].numpy()
    return points.reshape(-1, 3)[int(rng.choice(places))]


@dataclass
class _Tumour:
    """Soft maps (Z, Y, X) in 0..1 of what the disease puts in the place of tissue."""

    core: Tensor
    necrosis: Tensor
    oedema: Tensor
    enhances: bool = True

    def label(self) -> Tensor:
        """Hard labels; the core covers the oedema."""
        out = torch.where(self.oedema > 0.5, OEDEMA, 0)
        inner = (self.necrosis > 0.5) | (not self.enhances)
        return torch.where(
            self.core > 0.5, torch.where(inner, NECROSIS, ENHANCING), out
        )


def _reached(oedema: Tensor, core: Tensor) -> Tensor:
    """Oedema without the islands that do not touch the tumour."""
    from scipy import ndimage

    near = ((oedema > 0.5) | (core > 0.5)).numpy()
    parts, _ = ndimage.label(near)
    touching = np.unique(parts[(core > 0.5).numpy()])
    kept = torch.from_numpy(np.isin(parts, touching[touching > 0]))
    soft = F.max_pool3d(kept[None].float(), 3, 1, 1)[0]  # keeps the soft border
    return oedema * soft


def _grow(
    kind: str,
    maps: Tensor,
    offset: Tensor,
    radius: float,
    field: _Field,
    rng: np.random.Generator,
) -> _Tumour:
    """Draw the tumour into the deformed maps; `offset` is the way from its centre."""
    numbers = recipe()["tumours"][kind]
    fluid, grey, white, depth = maps
    shape = torch.tensor(rng.uniform(0.85, 1.2, 3), dtype=torch.float32)
    turned = (offset @ _turn(rng.uniform(-1.5, 1.5, 3))) * shape
    rough = 0.22 if kind == "glioma" else 0.08
    border = torch.exp(rough * field(16) + 0.4 * rough * field(6))
    rho = turned.norm(dim=-1) / radius * border
    if kind == "meningioma":
        # Flat on the dura with a tail along it, and nothing outside the skull's inside.
        tail = (depth.abs() < 2.5) & (offset.norm(dim=-1) < numbers["tail"] * radius)
        rho = torch.where(tail, rho * 0.62, rho)
        rho = torch.where(depth < -3.0, rho + 9, rho)
    core = torch.sigmoid((1 - rho) * radius / 0.7)
    necrosis, enhances = torch.zeros_like(core), True
    if kind == "glioma":
        inner = float(rng.uniform(*numbers["necrosis"]))
        ragged = rho * torch.exp(0.12 * field(8))
        necrosis = torch.sigmoid((inner - ragged) * radius / 0.7)
        enhances = rng.random() >= numbers["no_enhancement"]
    oedema = torch.zeros_like(core)
    if "oedema" in numbers:
        extent = float(rng.uniform(*numbers["oedema"])) * torch.exp(0.3 * field(24))
        # Fast along white matter, slow through grey, stopped by fluid.
        travel = (rho - 1).clamp_min(0) * radius / (0.35 + 1.2 * white + 0.25 * grey)
        oedema = torch.sigmoid((extent - travel) / 1.0)
        oedema = oedema * (1 - fluid) ** 0.5 * torch.sigmoid((depth - 2.0) / 0.7)
        oedema = torch.where(fluid > 0.55, 0.0, oedema)
        oedema = _reached(oedema, core) * (1 - core)
    return _Tumour(core, necrosis, oedema, enhances)


def draw_patient(
    kind: str, scanner: str, seed: tuple[int, ...], difficulty: float = 1.0
) -> Patient:
    """Draw one patient.

    Parameters
    ----------
    kind : glioma, meningioma, pituitary or none.
    scanner : source or target.
    seed : integers that name the patient; the same ones give the same patient.
    difficulty : 1 as in the recipe; at 2 the lesion's contrast with healthy tissue is
        halved and healthy white-matter lesions are twice as bright.

    Raises
    ------
    MedtutError
        Unknown kind or scanner, or a difficulty that is not positive.
    """
    numbers = recipe()
    if kind not in KINDS or scanner not in numbers["scanners"]:
        raise MedtutError(
            f"draw_patient: no {kind!r} from scanner {scanner!r}; kinds are "
            f"{', '.join(KINDS)}, scanners {', '.join(numbers['scanners'])}."
        )
    if not difficulty > 0:
        raise MedtutError(f"draw_patient: difficulty {difficulty} must be positive.")
    place = list(numbers["scanners"]).index(scanner)  # nobody is scanned twice
    rng = np.random.default_rng(np.random.SeedSequence([*seed, place]))
    spacing = np.array(numbers["spacing"])
    full = np.array(numbers["shape"])
    size = full - 2 * MARGIN
    field = _Field(tuple(size[::-1].tolist()), spacing, int(rng.integers(2**62)))
    axes = [
        torch.from_numpy(((np.arange(n) - (n - 1) / 2) * s + c).astype(np.float32))
        for n, s, c in zip(size, spacing, CENTRE, strict=True)
    ]
    z, y, x = torch.meshgrid(axes[2], axes[1], axes[0], indexing="ij")
    points = torch.stack([x, y, z], dim=-1)

    body = numbers["anatomy"]
    middle = torch.tensor(CENTRE, dtype=torch.float32)
    turn = _turn(rng.uniform(-1, 1, 3) * body["rotation"])
    grow = 1 + rng.uniform(-1, 1, 3) * body["scale"]
    at = (points - middle) @ turn / torch.tensor(grow, dtype=torch.float32) + middle
    for name in ("coarse", "fine"):
        shift = field(body[name]["period"], 3).permute(1, 2, 3, 0) * body[name]["size"]
        if name == "fine":  # fades at the surface: the outline stays smooth
            shift *= (_sample(at)[3] / 15).clamp(0, 1)[..., None]
        at = at + shift

    tumour = None
    findings: dict[str, Any] = {"kind": kind}
    if kind != "none":
        low, high = numbers["tumours"][kind]["radius"]
        radius = float(rng.uniform(low, high))
        few = at[::2, ::4, ::4], points[::2, ::4, ::4]
        if kind == "pituitary":
            goal = torch.tensor(numbers["tumours"][kind]["centre"]).float()
            near = (few[0] - goal).norm(dim=-1).flatten().argmin()
            centre = few[1].reshape(-1, 3)[near]
        else:
            centre = _centre(kind, _sample(few[0]), few[1], rng)
        offset = points - centre
        length = offset.norm(dim=-1, keepdim=True).clamp_min(0.1)
        push = 0.35 * radius * torch.exp(-((length / (1.9 * radius)) ** 2))
        at = at - offset / length * torch.minimum(push, 0.6 * length)
        maps = _sample(at)
        tumour = _grow(kind, maps, offset, radius, field, rng)
        findings |= {
            "side": "midline" if abs(float(centre[0])) < 8 else
            ("right" if centre[0] > 0 else "left"),
            "centre_mm": [round(float(v), 1) for v in centre],
            "enhances": bool(tumour.enhances),
        }  # fmt: skip
    else:
        maps = _sample(at)
    images, head = _scan(maps, tumour, findings, scanner, field, rng, difficulty)
    label = torch.zeros(field.shape) if tumour is None else tumour.label() * head
    pad = [(int(m), int(m)) for m in MARGIN]

    def hand_out(volume: Tensor, dtype: type) -> np.ndarray:
        return np.pad(volume.numpy().transpose(2, 1, 0).astype(dtype), pad)

    volume_ml = float(np.prod(spacing)) / 1000
    findings["ml"] = {
        name: round(float((label == k).sum()) * volume_ml, 2)
        for name, k in (("necrosis", 1), ("oedema", 2), ("enhancing", 3))
    }
    return Patient(
        {name: hand_out(image, np.float32) for name, image in images.items()},
        hand_out(label, np.uint8),
        findings,
    )


def _scan(
    maps: Tensor,
    tumour: _Tumour | None,
    findings: dict[str, Any],
    scanner: str,
    field: _Field,
    rng: np.random.Generator,
    difficulty: float,
) -> tuple[dict[str, Tensor], Tensor]:
    """Turn tissue and disease into four images; also the mask of the head."""
    from scipy import ndimage

    numbers = recipe()
    how, body = numbers["scanners"][scanner], numbers["anatomy"]
    depth = maps[3]
    # Averaging 152 heads blurred the maps: sharpen them, and fold them individually.
    weights = maps[:3] + 1e-3
    fold = body["folding"]["size"] * field(body["folding"]["period"], 2)
    surface = torch.exp(-((depth - 6) / 10).clamp_min(0))  # sulci, not ventricles
    weights = weights * torch.stack(
        [torch.exp(fold[0] * surface + how["atrophy"] * (0.4 + 0.6 * surface)),
         torch.exp(fold[1] * 0.5), torch.ones_like(depth)]
    )  # fmt: skip
    weights = weights ** body["sharpness"]
    fluid, grey, white = weights / weights.sum(0)
    head = (depth > 0.5).float()
    if tumour is not None:
        head = torch.maximum(head, (tumour.core > 0.5).float())
    deep = torch.from_numpy(ndimage.gaussian_filter(
        (fluid * (depth > 24)).numpy(), (2.5, 5, 5)))  # fmt: skip
    spots = torch.sigmoid((field(11) - 1.9) * 6) * (depth > 12)
    aged = how["lesions"] * difficulty * white * (1.2 * deep + 0.8 * spots)
    vessel = torch.exp(-((field(18) / 0.07) ** 2)) * fluid * torch.exp(-depth / 12)
    texture = 1 + 0.03 * field(5)
    kind = numbers["tumours"].get(findings["kind"], {})
    patchy = 1 + kind.get("texture", 0.0) * field(4)
    sensitivity = torch.exp(how["bias"] * field(100))
    images = {}
    for name in CONTRASTS:
        means = np.array(how[name]) + rng.normal(0, how["jitter"], 6)
        means[4] = kind.get("signal", {}).get(name, means[4])
        healthy = (means[1] + means[2]) / 2
        means[3:] = healthy + (means[3:] - healthy) / difficulty
        csf, gm, wm, oed, rim, nec = (float(v) for v in means)
        image = csf * fluid + gm * grey + wm * white
        if name in ("flair", "t2"):
            image = image + aged * (oed - wm) * 0.9
        if name == "t1ce":
            image = image + 0.45 * vessel
        if tumour is not None:
            shine = rim if tumour.enhances else 0.5 * (oed + nec)
            swollen = oed + 0.25 * (gm - wm) * (grey - white)
            image = torch.lerp(image, swollen * torch.ones_like(image), tumour.oedema)
            solid = shine + (nec - shine) * tumour.necrosis
            image = torch.lerp(image, solid * patchy, tumour.core)
        image = image * head * texture * sensitivity
        blur = np.array(how["blur"])[::-1] / np.array(numbers["spacing"])[::-1]
        image = torch.from_numpy(ndimage.gaussian_filter(image.numpy(), blur))
        real = image + how["noise"] * field.white()
        imaginary = how["noise"] * field.white()
        images[name] = torch.sqrt(real**2 + imaginary**2) * head
    return images, head
