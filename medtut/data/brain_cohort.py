"""Cohorts of drawn patients, written in the formats of the real data sets.

``cohort_folder`` draws a cohort once into the cache and returns its folder, which the
readers of the real data then read: BraTS 2020 (`medtut.data.brats`), BraTS-MEN 2023,
or JPEG pictures in folders by class, as the Kaggle brain tumour set has them.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from medtut.data.brain_anatomy import (
    CONTRASTS,
    KINDS,
    Patient,
    _maps,
    draw_patient,
    recipe,
)
from medtut.data.cache import entry_path, writable_dir, write_by_rename
from medtut.errors import MedtutError

Layout = Literal["brats", "brats-men", "jpeg"]
# BraTS volumes run from the patient's left to right and from anterior to posterior.
AFFINE = np.array([[-1.0, 0, 0, 0], [0, -1, 0, 239], [0, 0, 1, 0], [0, 0, 0, 1]])
MEN_NAMES = {"flair": "t2f", "t1": "t1n", "t1ce": "t1c", "t2": "t2w"}
JPEG_FOLDERS = {k: f"{k}_tumor" for k in KINDS[:3]} | {"none": "no_tumor"}


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
    the folder, with one folder per patient (pictures by class for ``jpeg``) and
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
    folder = entry_path("brain_cohort", key)
    passport = folder / "passport.json"
    if passport.is_file():
        return folder
    writable_dir(folder)
    _maps()  # once, before the threads
    numbers = range(spec.first, spec.first + spec.count)
    # Threads suffice: the arithmetic and the compression release the interpreter.
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        found = pool.map(lambda n: _one(spec, n, layout, folder), numbers)
        if progress:
            from tqdm.auto import tqdm

            found = tqdm(found, total=spec.count, desc="drawing patients")
        patients = dict(found)
    text = {
        "source": "drawn by medtut on the MNI152 template",
        "licence": "CC BY 4.0 (drawing); MNI terms (template)",
        **key,
        "patients": patients,
    }
    write_by_rename(
        passport, lambda p: p.write_text(json.dumps(text, indent=1), "utf-8") and None
    )
    if layout == "jpeg":
        _patient_table(folder, patients)
    return folder


def _one(
    spec: CohortSpec, number: int, layout: Layout, folder: Path
) -> tuple[str, dict[str, Any]]:
    name = f"{spec.scanner}_{number:03d}"
    note = folder / ".done" / f"{name}.json"
    if note.is_file():
        return name, json.loads(note.read_text("utf-8"))
    kind = spec.tumours[number % len(spec.tumours)]
    patient = draw_patient(kind, spec.scanner, (spec.seed, number), spec.difficulty)
    work = Path(tempfile.mkdtemp(prefix=".drawing-", dir=folder))
    try:
        files = _WRITERS[layout](patient, name, number, work)
        facts = _facts(patient) | {"files": {}}
        for path in files:
            target = folder / path.relative_to(work)
            facts["files"][target.relative_to(folder).as_posix()] = {
                "bytes": path.stat().st_size,
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            }
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    write_by_rename(note, lambda p: p.write_text(json.dumps(facts), "utf-8") and None)
    return name, facts


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


def _brats(patient: Patient, name: str, number: int, work: Path) -> list[Path]:
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


def _brats_men(patient: Patient, name: str, number: int, work: Path) -> list[Path]:
    """BraTS-MEN 2023: labels 0 to 3, other names."""
    case = f"BraTS-MEN-{number:05d}-000"
    files = [_nifti(work / case / f"{case}-seg.nii.gz", patient.label, np.uint8)]
    for contrast, image in patient.images.items():
        path = work / case / f"{case}-{MEN_NAMES[contrast]}.nii.gz"
        files.append(_nifti(path, np.rint(image * 500), np.int16))
    return files


def _jpeg(patient: Patient, name: str, number: int, work: Path) -> list[Path]:
    """Three T1ce pictures a patient; every fifth patient goes to Testing."""
    from PIL import Image

    part = "Testing" if number % 5 == 4 else "Training"
    kind = patient.findings["kind"]
    folder = work / part / JPEG_FOLDERS[kind]
    folder.mkdir(parents=True)
    amount = (patient.label > 0).sum((0, 1)) if kind != "none" else None
    if amount is None:
        amount = (patient.images["t1ce"] > 0).sum((0, 1))
    levels = np.flatnonzero(amount > 0.6 * amount.max())
    chosen = levels[np.linspace(0, len(levels) - 1, 3).round().astype(int)]
    volume = patient.images["t1ce"]
    top = np.quantile(volume[volume > 0], 0.998)
    files = []
    for view, z in enumerate(sorted(set(chosen.tolist()))):
        grey = (np.rot90(volume[:, :, z]) / top).clip(0, 1) * 255
        picture = Image.fromarray(grey.astype(np.uint8)).resize((512, 512))
        files.append(folder / f"{name}_{view}.jpg")
        picture.convert("RGB").save(files[-1], quality=92)
    return files


def _patient_table(folder: Path, patients: dict[str, Any]) -> None:
    """``patients.csv``: which picture shows whom; the public set does not tell."""

    def write(path: Path) -> None:
        with open(path, "w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow(["file", "patient", "kind"])
            for name, facts in patients.items():
                table.writerows([f, name, facts["kind"]] for f in facts["files"])

    write_by_rename(folder / "patients.csv", write)


_WRITERS: dict[str, Callable[[Patient, str, int, Path], list[Path]]] = {
    "brats": _brats,
    "brats-men": _brats_men,
    "jpeg": _jpeg,
}
__all__ = ["CONTRASTS", "CohortSpec", "cohort_folder", "version"]
