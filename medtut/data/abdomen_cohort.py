"""Cohorts of drawn abdomens in TotalSegmentator's layout, by hospital.

`abdomen_folder` draws a cohort once into the cache and returns its folder, which
`medtut.data.organ_records.find_cases` reads as it reads the real set. A source hospital
outlines some structures only: the files of the others are absent, which is not the same
as empty. The target hospital has all of them, for the truth.
"""

from __future__ import annotations

import gzip
import hashlib
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from medtut.data.abdomen_anatomy import DRAWN, load_trunk, recipe
from medtut.data.abdomen_patient import AbdomenPatient, draw_abdomen
from medtut.data.cache import writable_dir
from medtut.data.chest_anatomy import recipe as chest_recipe
from medtut.data.drawing import drawn_cohort
from medtut.errors import MedtutError
from medtut.files import write_text


def source_hospitals() -> tuple[str, ...]:
    """Names of the hospitals with partial labels."""
    return tuple(h for h in recipe()["hospitals"] if h != "target")


def annotated_by(hospital: str) -> tuple[str, ...]:
    """Structures that a hospital outlines, in the order of `DRAWN`."""
    chosen = recipe()["hospitals"][hospital]["annotated"]
    return tuple(n for n in DRAWN if chosen == "all" or n in chosen)


@dataclass(frozen=True)
class AbdomenSpec:
    """What is drawn: patients `first` to `first + count` of one hospital.

    Attributes
    ----------
    hospital : of the recipe: riverside, hillcrest, lakeside (sources) or target.
    count, first : how many patients, and the number of the first.
    seed : of the cohort; with hospital and number it determines a patient. The body is
        that of the number: lung1 and lung2 in turn.
    difficulty : see `medtut.data.abdomen_patient.draw_abdomen`.
    field : what is in every scan (a key of ``fields``), or "" for the hospital's habit.
    annotated : outline these structures, instead of those that the hospital does.
    """

    hospital: str = "target"
    count: int = 12
    first: int = 0
    seed: int = 0
    difficulty: float = 1.0
    field: str = ""
    annotated: tuple[str, ...] = ()


def abdomen_folder(spec: AbdomenSpec, progress: bool = False) -> Path:
    """Draw a cohort into the cache, or find it there.

    A patient's folder is written under a temporary name and renamed: an interrupted
    call goes on where it stopped. ``meta.csv`` and ``passport.json`` come last.

    Returns
    -------
    ROOT with ``s0001/ct.nii.gz``, ``s0001/segmentations/liver.nii.gz`` and so on,
    ``meta.csv`` (";" between columns, as the real one) and ``passport.json`` (facts,
    sha256 and volumes in mL of every patient).

    Raises
    ------
    MedtutError
        An unknown hospital, field or structure, no patient, or a difficulty that is not
        above 0.
    """
    how = recipe()
    if spec.hospital not in how["hospitals"]:
        there = ", ".join(how["hospitals"])
        raise MedtutError(f"abdomen_folder: no hospital {spec.hospital!r}; {there}.")
    lost = set(spec.annotated) - set(DRAWN)
    if lost or spec.count < 1 or spec.first < 0 or not spec.difficulty > 0 or (
        spec.field not in ("", *how["fields"])):  # fmt: skip
        raise MedtutError(
            f"abdomen_folder: cannot draw {spec}: count is at least 1, first at least "
            f"0, difficulty above 0, field one of {', '.join(how['fields'])} or empty; "
            f"structures are {', '.join(DRAWN)}."
        )
    key = {"version": how["version"], "chest": chest_recipe()["anatomy_version"]}
    bodies = list(how["bodies"])
    jobs = {
        f"s{n + 1:04d}": partial(_one, spec, bodies[n % len(bodies)], n)
        for n in range(spec.first, spec.first + spec.count)
    }
    said = {
        "source": "drawn by medtut; chests from two real CTs of pyradiomics "
        "(BSD-3-Clause), everything below the diaphragm by shapes",
        "licence": "CC BY 4.0 (drawing)",
    }
    return drawn_cohort(
        "abdomen_cohort", key | asdict(spec), jobs, said,
        lambda: list(map(load_trunk, bodies)), _table, progress,
    )  # fmt: skip


def _image(values: np.ndarray, spacing: np.ndarray, flips: Sequence[int]) -> bytes:
    """A NIfTI file, the axes as the scanner counts them."""
    import nibabel

    sides = np.array(flips)
    affine = np.diag([*(sides * spacing), 1.0])
    affine[:3, 3] = -sides * (np.array(values.shape) - 1) / 2 * spacing
    stored = values[tuple(slice(None, None, int(f)) for f in flips)]
    image = nibabel.Nifti1Image(stored, affine, dtype=values.dtype)
    image.header.set_xyzt_units("mm")
    return gzip.compress(image.to_bytes(), compresslevel=1, mtime=0)


def write_patient(
    patient: AbdomenPatient, folder: Path, names: Sequence[str], flips: Sequence[int]
) -> str:
    """Write a patient's folder, whole or not at all; returns the sha256 of the CT."""
    writable_dir(folder.parent)
    made = Path(tempfile.mkdtemp(prefix=".making-", dir=folder.parent))
    try:
        (made / "segmentations").mkdir()
        ct = _image(patient.hu.astype(np.int16), patient.spacing, flips)
        (made / "ct.nii.gz").write_bytes(ct)
        for name in names:
            mask = (patient.labels == DRAWN.index(name) + 1).astype(np.uint8)
            path = made / "segmentations" / f"{name}.nii.gz"
            path.write_bytes(_image(mask, patient.spacing, flips))
        shutil.rmtree(folder, ignore_errors=True)  # written, but not noted as done
        made.rename(folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return hashlib.sha256(ct).hexdigest()


def _one(spec: AbdomenSpec, body: str, number: int, folder: Path) -> dict[str, Any]:
    seed = (spec.seed, number)
    patient = draw_abdomen(body, spec.hospital, seed, spec.difficulty, spec.field)
    names = spec.annotated or annotated_by(spec.hospital)
    where, place = folder / f"s{number + 1:04d}", recipe()["hospitals"][spec.hospital]
    code = write_patient(patient, where, names, place["affine"])
    counts = np.bincount(patient.labels.ravel(), minlength=len(DRAWN) + 1)[1:]
    sizes = (counts * patient.spacing.prod() / 1000).round(1).tolist()
    return patient.facts | {
        "body": body, "sha256": code, "shape": list(patient.hu.shape),
        "ml": dict(zip(DRAWN, sizes, strict=True)),
        "quantiles": np.quantile(patient.hu, (0.01, 0.5, 0.99)).tolist(),
    }  # fmt: skip


def _table(folder: Path, patients: dict[str, Any]) -> None:
    """``meta.csv`` with columns of the real one."""
    lines = ["image_id;gender;institute;study_type;split;pathology"]
    for name, facts in patients.items():
        ill = "cyst" if facts["cyst"] else "no_pathology"
        kind = f"ct {facts['field'].replace('_', '-')} {facts['phase']}"
        lines.append(f"{name};{facts['sex'][0]};{facts['hospital']};{kind};train;{ill}")
    write_text(folder / "meta.csv", "\n".join(lines) + "\n")
