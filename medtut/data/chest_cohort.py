"""Cohorts of drawn chests in the layout of CT-RATE.

`chest_folder` draws a cohort once into the cache and returns its folder, which the
reader of the real set then reads.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from medtut.data.cache import entry_path, writable_dir, write_by_rename
from medtut.data.chest_anatomy import LABELS, load_body, recipe
from medtut.data.chest_findings import ChestPatient, draw_patient
from medtut.data.chest_reports import report
from medtut.errors import MedtutError

LONG = {"train": "train", "valid": "validation"}  # CT-RATE uses both words


@dataclass(frozen=True)
class ChestSpec:
    """What is drawn: patients `first` to `first + count` of one scanner.

    Attributes
    ----------
    body : lung1, lung2, or both in turn.
    scanner : source or target.
    split : train or valid, the folder they are written to.
    count, first : how many patients, and the number of the first.
    seed : of the cohort; with body, scanner and number it determines a patient.
    difficulty : see `medtut.data.chest_findings.draw_patient`.
    withheld : findings that no report of this cohort names; the labels keep them.
    """

    body: Literal["lung1", "lung2", "both"] = "lung1"
    scanner: Literal["source", "target"] = "source"
    split: Literal["train", "valid"] = "train"
    count: int = 24
    first: int = 0
    seed: int = 0
    difficulty: float = 1.0
    withheld: tuple[str, ...] = ()


def chest_folder(spec: ChestSpec, progress: bool = False) -> Path:
    """Draw a cohort into the cache, or find it there.

    A patient is written under a temporary name and renamed: an interrupted call goes
    on where it stopped. The tables and ``passport.json`` are written last.

    Returns
    -------
    the folder ROOT of CT-RATE: ``dataset/train/train_1/train_1_a/train_1_a_1.nii.gz``,
    the tables beside it, and ``passport.json`` (findings, sha256, sizes, voxels of
    every finding, quantiles of HU).

    Raises
    ------
    MedtutError
        An unknown body, scanner, split or withheld finding, or no patient at all.
    """
    how = recipe()
    bodies = list(how["bodies"]) if spec.body == "both" else [spec.body]
    known = ((*how["bodies"], "both"), how["scanners"], LONG)
    for field, names in zip(("body", "scanner", "split"), known, strict=True):
        if (given := getattr(spec, field)) not in names:
            there = ", ".join(names)
            raise MedtutError(f"chest_folder: no {field} {given!r}; there are {there}.")
    if not set(spec.withheld) <= set(how["findings"]) or spec.count < 1:
        raise MedtutError(
            f"chest_folder: cannot write {spec}: count is at least 1, and withheld are "
            f"some of {', '.join(how['findings'])}."
        )
    key = {"version": how["version"], "anatomy": how["anatomy_version"], **asdict(spec)}
    folder = entry_path("chest_cohort", key)
    passport = folder / "passport.json"
    if passport.is_file():
        return folder
    writable_dir(folder)
    for name in bodies:  # once, before the threads
        load_body(name)

    def one(n: int) -> tuple[str, dict[str, Any]]:
        return _one(spec, bodies[n % len(bodies)], n, folder)

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        found = pool.map(one, range(spec.first, spec.first + spec.count))
        if progress:
            from tqdm.auto import tqdm

            found = tqdm(found, total=spec.count, desc="drawing chests")
        patients = dict(found)
    _tables(folder / "dataset", spec, patients)
    source = "drawn by medtut on two real CTs of pyradiomics (BSD-3-Clause)"
    licence = {"source": source, "licence": "CC BY 4.0 (drawing)"}
    _json(passport, licence | key | {"patients": patients})
    return folder


def _one(spec: ChestSpec, body: str, number: int, folder: Path) -> tuple[str, Any]:
    person = f"{spec.split}_{number + 1}"
    name = f"{person}_a_1.nii.gz"
    note = folder / ".done" / f"{person}.json"
    if note.is_file():
        return name, json.loads(note.read_text("utf-8"))
    patient = draw_patient(body, spec.scanner, (spec.seed, number), spec.difficulty)
    target = folder / "dataset" / spec.split / person / f"{person}_a" / name
    write_by_rename(target, lambda p: _nifti(p, patient, spec.scanner))
    content = target.read_bytes()
    rng = np.random.default_rng([spec.seed, number, recipe()["version"]])
    facts = _facts(patient) | {
        "body": body,
        "file": target.relative_to(folder).as_posix(),
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "report": report(patient, rng, frozenset(spec.withheld)),
    }
    _json(note, facts)
    return name, facts


def _json(path: Path, value: Any) -> None:
    write_by_rename(path, lambda p: p.write_text(json.dumps(value), "utf-8") and None)


def _nifti(path: Path, patient: ChestPatient, scanner: str) -> None:
    """As CT-RATE stores it: HU + 1024, the axes as the scanner counts them."""
    import nibabel

    flips = np.array(recipe()["scanners"][scanner]["affine"])
    stored = patient.hu[tuple(slice(None, None, int(f)) for f in flips)] + 1024
    affine = np.diag([*(flips * patient.spacing), 1.0])
    affine[:3, 3] = -flips * (np.array(stored.shape) - 1) / 2 * patient.spacing
    image = nibabel.Nifti1Image(stored.astype(np.int16), affine, dtype=np.int16)
    image.header.set_xyzt_units("mm")
    path.write_bytes(gzip.compress(image.to_bytes(), compresslevel=1, mtime=0))


def _facts(patient: ChestPatient) -> dict[str, Any]:
    inside = np.quantile(patient.hu[patient.labels > 0], (0.01, 0.5, 0.99))
    names = ("outside", *LABELS)
    counts = np.bincount(patient.labels.ravel(), minlength=len(names)).tolist()
    return {
        "findings": {name: asdict(drawn) for name, drawn in patient.findings.items()},
        **patient.facts,
        "labels": dict(zip(names, counts, strict=False)),
        "quantiles": inside.tolist(),
    }


def _tables(root: Path, spec: ChestSpec, patients: dict[str, Any]) -> None:
    """Reports, labels and metadata, with CT-RATE's names of files and columns."""
    findings, long = list(recipe()["findings"]), LONG[spec.split]
    x, _, z = recipe()["spacing"]
    meta = {
        "Manufacturer": f"medtut drawn {spec.scanner}", "RescaleIntercept": -1024,
        "RescaleSlope": 1, "XYSpacing": f"[{x}, {x}]", "ZSpacing": z,
        "Rows": recipe()["shape"][1], "Columns": recipe()["shape"][0],
        "NumberofSlices": recipe()["shape"][2], "PatientPosition": "FFS",
    }  # fmt: skip
    tables = {
        f"radiology_text_reports/{long}_reports.csv": {
            name: facts["report"] for name, facts in patients.items()},
        f"multi_abnormality_labels/{spec.split}_predicted_labels.csv": {
            name: {f: int(f in facts["findings"]) for f in findings}
            for name, facts in patients.items()},
        f"metadata/{long}_metadata.csv": dict.fromkeys(patients, meta),
    }  # fmt: skip
    for path, rows in tables.items():
        write_by_rename(root / path, lambda p, rows=rows: _csv(p, rows))


def _csv(path: Path, rows: dict[str, dict[str, Any]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, ["VolumeName", *next(iter(rows.values()))])
        table.writeheader()
        table.writerows({"VolumeName": name} | row for name, row in rows.items())
