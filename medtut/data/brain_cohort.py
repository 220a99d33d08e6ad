"""Cohorts of drawn patients, written in the formats of the real data sets.

``cohort_folder`` draws a cohort once into the cache and returns its folder, which the
readers of the real data then read: BraTS 2020 (`medtut.data.brats`) or BraTS-MEN 2023.
`mri_folder` writes pictures in folders by class, as the Kaggle brain tumour set has
them (`medtut.data.brain_mri`).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from medtut.data.brain_anatomy import (
    CONTRASTS,
    KINDS,
    Patient,
    _maps,
    draw_patient,
    recipe,
)
from medtut.data.drawing import drawn_cohort, write_table
from medtut.errors import MedtutError

Layout = Literal["brats", "brats-men"]
# BraTS volumes run from the patient's left to right and from anterior to posterior.
AFFINE = np.array([[-1.0, 0, 0, 0], [0, -1, 0, 239], [0, 0, 1, 0], [0, 0, 0, 1]])
MEN_NAMES = {"flair": "t2f", "t1": "t1n", "t1ce": "t1c", "t2": "t2w"}
FOLDERS = {k: f"{k}_tumor" for k in KINDS[:3]} | {"none": "no_tumor"}
PLANES = ("sagittal", "coronal", "axial")  # by the axis of a volume they cut


@dataclass(frozen=True)
class CohortSpec:
    """What is drawn: patients `first` to `first + count` of one scanner.

    Attributes
    ----------
    scanner : source or target.
    tumours : kinds taken in turn: glioma, meningioma, pituitary, none.
    count, first : how many patients, and the number of the first.
    seed : of the cohort; with scanner and number it determines a patient.
    difficulty : see `medtut.data.brain_anatomy.draw_patient`.
    """

    scanner: Literal["source", "target"] = "target"
    tumours: tuple[str, ...] = ("glioma",)
    count: int = 24
    first: int = 0
    seed: int = 0
    difficulty: float = 1.0


def version() -> int:
    """Version of the recipe; a change makes every cohort anew."""
    return int(recipe()["version"])


def cohort_folder(
    spec: CohortSpec, layout: Layout = "brats", progress: bool = False
) -> Path:
    """Draw a cohort into the cache, or find it there.

    A patient is written under a temporary name and renamed: an interrupted call goes
    on where it stopped. ``passport.json`` is written last.

    Returns
    -------
    the folder, with one folder per patient and
    ``passport.json``: findings, sha256, sizes, label histogram, intensity quantiles.

    Raises
    ------
    MedtutError
        An unknown layout or kind of tumour, or no patient at all.
    """
    if layout not in _WRITERS or not set(spec.tumours) <= set(KINDS) or spec.count < 1:
        raise MedtutError(
            f"cohort_folder: cannot write {spec} as {layout!r}. Layouts are "
            f"{', '.join(_WRITERS)}; tumours {', '.join(KINDS)}; count at least 1."
        )
    key = {"version": version(), "layout": layout, **asdict(spec)}
    jobs = [
        _Job(
            f"{spec.scanner}_{n:03d}",
            (spec.tumours[n % len(spec.tumours)], spec.scanner, (spec.seed, n)),
            partial(_WRITERS[layout], number=n),
        )
        for n in range(spec.first, spec.first + spec.count)
    ]
    return _cohort(key, jobs, spec.difficulty, progress)


class _Job(NamedTuple):
    """One patient: name, arguments of `draw_patient`, and who writes the files."""

    name: str
    drawn: tuple[str, str, tuple[int, ...]]
    write: Callable[[Patient, str, Path], list[Path]]


def _cohort(
    key: dict[str, Any], jobs: list[_Job], difficulty: float, progress: bool
) -> Path:
    said = {
        "source": "drawn by medtut on the MNI152 template",
        "licence": "CC BY 4.0 (drawing); MNI terms (template)",
    }
    each = {job.name: partial(_one, job, difficulty) for job in jobs}
    finish = _patient_table if "pictures" in key else lambda *_: None
    return drawn_cohort("brain_cohort", key, each, said, _maps, finish, progress)


def _one(job: _Job, difficulty: float, folder: Path) -> dict[str, Any]:
    patient = draw_patient(*job.drawn, difficulty)
    work = Path(tempfile.mkdtemp(prefix=".drawing-", dir=folder))
    try:
        files = job.write(patient, job.name, work)
        facts = _facts(patient) | {"files": {}}
        for path in files:
            target = folder / path.relative_to(work)
            facts["files"][target.relative_to(folder).as_posix()] = {
                "bytes": path.stat().st_size,
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            }
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
        return facts
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _facts(patient: Patient) -> dict[str, Any]:
    values, counts = np.unique(patient.label, return_counts=True)
    return patient.findings | {
        "labels": {int(v): int(n) for v, n in zip(values, counts, strict=True)},
        "quantiles": {
            name: [
                round(float(q), 3)
                for q in np.quantile(image[image > 0], (0.01, 0.5, 0.99))
            ]
            for name, image in patient.images.items()
        },
    }


def _nifti(path: Path, volume: np.ndarray, dtype: type) -> Path:
    import nibabel

    spacing = np.array(recipe()["spacing"])
    affine = AFFINE @ np.diag([*spacing, 1.0])
    image = nibabel.Nifti1Image(volume[::-1, ::-1].astype(dtype), affine, dtype=dtype)
    image.header.set_xyzt_units("mm")
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(image, path)
    return path


def _brats(patient: Patient, name: str, work: Path, number: int) -> list[Path]:
    """Four contrasts and a mask with labels 0, 1, 2, 4."""
    folder = work / name
    on_disk = np.array([0, 1, 2, 4], np.uint8)[patient.label]
    files = [_nifti(folder / f"{name}_seg.nii.gz", on_disk, np.uint8)]
    # The scanners of a real cohort have arbitrary units.
    gain = 400 + 100 * (number % 8)
    for contrast, image in patient.images.items():
        path = folder / f"{name}_{contrast}.nii.gz"
        files.append(_nifti(path, np.rint(image * gain), np.int16))
    return files


def _brats_men(patient: Patient, name: str, work: Path, number: int) -> list[Path]:
    """BraTS-MEN 2023: labels 0 to 3, other names."""
    case = f"BraTS-MEN-{number:05d}-000"
    files = [_nifti(work / case / f"{case}-seg.nii.gz", patient.label, np.uint8)]
    for contrast, image in patient.images.items():
        path = work / case / f"{case}-{MEN_NAMES[contrast]}.nii.gz"
        files.append(_nifti(path, np.rint(image * 500), np.int16))
    return files


_WRITERS = {"brats": _brats, "brats-men": _brats_men}


def mri_folder(
    train_patients: int = 48,
    test_patients: int = 24,
    seed: int = 0,
    difficulty: float = 1.0,
    shortcut: float | None = None,
    progress: bool = False,
) -> Path:
    """Draw patients and write pictures of them in the layout of the Kaggle set.

    ``Training`` comes from the source scanner, ``Testing`` from the target; classes
    have the real set's shares in each. A patient gives eight pictures, axial, coronal
    and sagittal, at levels through the lesion; slices of one patient resemble each
    other, and split by picture they stand on both sides. The tumours of ``Training``
    come, but for a few, from a "collection": T1ce at 512 × 512. All other pictures are
    "from the web": any contrast, size, margin, window and JPEG quality. So in
    ``Training`` contrast and size give away whether there is a tumour, and in
    ``Testing`` they do not. The template has no skull, scalp or eyes: these are heads
    after skull stripping, unlike the real set's.

    Parameters
    ----------
    train_patients, test_patients : int, at least 8 each
        Two seconds each; interrupted, it goes on where it stopped.
    seed, difficulty
        As in `CohortSpec`.
    shortcut : float in 0 to 1, optional
        The fraction of the tumours of ``Training`` that come from the collection;
        ``brain_cohort.yml`` has the default.

    Returns
    -------
    the folder, with ``passport.json`` and ``patients.csv`` (file, patient, kind,
    contrast, plane), which the real set does not have.

    Raises
    ------
    MedtutError
        Too few patients for every class, or a shortcut outside 0 to 1.
    """
    how = recipe()["pictures"]
    shortcut = how["shortcut"] if shortcut is None else float(shortcut)
    parts = {"Training": train_patients, "Testing": test_patients}
    if min(parts.values()) < 8 or not 0 <= shortcut <= 1:
        raise MedtutError(
            f"mri_folder: {train_patients} and {test_patients} patients, shortcut "
            f"{shortcut}. Each part needs 8 or more, the shortcut is from 0 to 1."
        )
    key = {"version": version(), "pictures": how["version"], "seed": seed, **parts}
    key |= {"difficulty": difficulty, "shortcut": shortcut}
    jobs = []
    for (part, count), scanner in zip(parts.items(), ("source", "target"), strict=True):
        shares = how["shares"][part]
        wanted = np.array(list(shares.values())) / sum(shares.values())
        given = np.zeros(len(wanted))
        for n in range(count):  # whoever is furthest behind their share is next
            k = int(np.argmax(wanted * (n + 1) - given))
            given[k] += 1
            drawn = (list(shares)[k], scanner, (seed, n))
            from_collection = shortcut if part == "Training" else 0.0
            write = partial(_pictures, part=part, seed=(seed, n), odds=from_collection)
            jobs.append(_Job(f"{scanner}_{n:03d}", drawn, write))
    return _cohort(key, jobs, difficulty, progress)


def _pictures(
    patient: Patient,
    name: str,
    work: Path,
    part: str,
    seed: tuple[int, int],
    odds: float,
) -> list[Path]:
    """Slices through the lesion in three planes, as a viewer would export them."""
    how, kind = recipe()["pictures"], patient.findings["kind"]
    rng = np.random.default_rng([*seed, part == "Testing", how["version"]])
    collected = kind != "none" and rng.random() < odds
    style = how["collection" if collected else "web"]
    folder = work / part / FOLDERS[kind]
    folder.mkdir(parents=True)
    shown = patient.images["t1"] if kind == "none" else patient.label
    files = []
    for axis, plane in enumerate(PLANES):
        area = (shown > 0).sum(tuple({0, 1, 2} - {axis}))
        levels = np.flatnonzero(area > 0.4 * area.max())
        count = len(range(axis, how["each"], 3))
        for level in rng.choice(levels, min(count, len(levels)), replace=False):
            contrast = str(rng.choice(style["contrasts"]))
            path = folder / f"{name}_{contrast}_{plane}_{level:03d}.jpg"
            _export(patient.images[contrast], axis, int(level), style, rng, path)
            files.append(path)
    return files


def _export(
    volume: np.ndarray,
    axis: int,
    level: int,
    style: dict[str, Any],
    rng: np.random.Generator,
    path: Path,
) -> None:
    """One slice, anterior or superior up, through a viewer's window, as JPEG."""
    from PIL import Image, ImageOps

    grey = np.rot90(volume.take(level, axis))
    if axis == 0:
        grey = grey[:, ::-1]  # the face looks left
    top = np.quantile(volume[volume > 0], rng.uniform(*style["window"]))
    grey = (grey / top).clip(0, 1) ** np.exp(rng.uniform(*style["gamma"]))
    picture = Image.fromarray(np.uint8(np.rint(255 * grey)))
    if axis < 2:  # slices are 2 mm apart, pixels 1 mm: make them square
        tall = round(picture.height * recipe()["spacing"][2])
        picture = picture.resize((picture.width, tall), Image.Resampling.BICUBIC)
    head = picture.point(lambda v: 255 * (v > 8)).getbbox() or (0, 0, *picture.size)
    field = [
        end + sign * rng.uniform(*style["margin"])
        for end, sign in zip(head, (-1, -1, 1, 1), strict=True)
    ]
    picture = picture.crop(tuple(round(v) for v in field))
    side = int(rng.integers(*style["side"], endpoint=True))
    if style["square"]:
        picture = ImageOps.pad(picture, (side, side), Image.Resampling.BICUBIC)
    else:
        scale = side / max(picture.size)
        size = [max(1, round(n * scale)) for n in picture.size]
        picture = picture.resize(size, Image.Resampling.BICUBIC)
    quality = int(rng.integers(*style["quality"], endpoint=True))
    picture.convert("RGB").save(path, quality=quality)


def _patient_table(folder: Path, patients: dict[str, Any]) -> None:
    """``patients.csv``: which file shows whom; the public set does not tell."""
    every = [(f, name, p["kind"]) for name, p in patients.items() for f in p["files"]]
    write_table(folder / "patients.csv", ["file", "patient", "kind"], every)


__all__ = ["CONTRASTS", "CohortSpec", "cohort_folder", "mri_folder", "version"]
