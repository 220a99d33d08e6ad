"""Cohorts of drawn chests in the layout of CT-RATE.

`chest_folder` draws a cohort once into the cache and returns its folder, which the
reader of the real set then reads.
"""

from __future__ import annotations

import gzip
import hashlib
from dataclasses import asdict, dataclass
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

import numpy as np

from medtut.data.cache import write_by_rename
from medtut.data.chest_anatomy import LABELS, load_body, recipe
from medtut.data.chest_findings import ChestPatient, draw_patient
from medtut.data.chest_reports import report
from medtut.data.drawing import drawn_cohort, write_table
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
    outlines : also write the voxels of every finding; see `outlines_of`.
    """

    body: Literal["lung1", "lung2", "both"] = "lung1"
    scanner: Literal["source", "target"] = "source"
    split: Literal["train", "valid"] = "train"
    count: int = 24
    first: int = 0
    seed: int = 0
    difficulty: float = 1.0
    withheld: tuple[str, ...] = ()
    outlines: bool = False


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
    if not spec.outlines:
        del key["outlines"]  # a cohort without is the one it was before they came
    jobs = {
        f"{spec.split}_{n + 1}_a_1.nii.gz": partial(
            _one, spec, bodies[n % len(bodies)], n
        )
        for n in range(spec.first, spec.first + spec.count)
    }
    source = "drawn by medtut on two real CTs of pyradiomics (BSD-3-Clause)"
    said = {"source": source, "licence": "CC BY 4.0 (drawing)"}
    templates, tables = lambda: list(map(load_body, bodies)), partial(_tables, spec)
    return drawn_cohort("chest_cohort", key, jobs, said, templates, tables, progress)


def _one(spec: ChestSpec, body: str, number: int, folder: Path) -> dict[str, Any]:
    patient = draw_patient(body, spec.scanner, (spec.seed, number), spec.difficulty)
    scan = f"{spec.split}_{number + 1}_a"
    file = f"dataset/{spec.split}/{scan[:-2]}/{scan}/{scan}_1.nii.gz"
    write_by_rename(folder / file, lambda p: _nifti(p, patient.hu + 1024, spec.scanner))
    if spec.outlines:
        bits = sum(patient.masks[f].astype(np.int32) << i for f, i in _bits().items()
                   if f in patient.masks)  # fmt: skip
        bits = bits + np.zeros(patient.hu.shape, np.int32)  # nothing found: all 0
        outline = folder / "dataset" / "outlines" / spec.split / f"{scan}_1.nii.gz"
        write_by_rename(outline, lambda p: _nifti(p, bits, spec.scanner, np.int32))
    content = (folder / file).read_bytes()
    rng = np.random.default_rng([spec.seed, number, recipe()["version"]])
    return _facts(patient) | {
        "body": body, "file": file, "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "report": report(patient, rng, frozenset(spec.withheld)),
    }  # fmt: skip


def _bits() -> dict[str, int]:
    """The bit of every finding in an outline, in the order of the labels."""
    return {name: i for i, name in enumerate(recipe()["findings"])}


def outlines_of(volume: Path | str) -> np.ndarray:
    """Where each finding of a drawn patient is, on the grid that the tower sees.

    CT-RATE has no outlines; ReXGroundingCT (Baharoon et al. 2025, arXiv:2507.22030)
    adds some to it. The drawn ones are known, and stand beside the volumes where
    `ChestSpec.outlines` asked for them, one bit for each finding.

    Returns
    -------
    (18, D, H, W) bool, in the order of `medtut.data.ct_rate.FINDINGS`.

    Raises
    ------
    MedtutError
        If the cohort was drawn without outlines.
    """
    import nibabel

    volume = Path(volume)
    root, split = volume.parents[4], volume.parents[2].name
    path = root / "dataset" / "outlines" / split / volume.name
    if not path.is_file():
        raise MedtutError(
            f"{path} is missing: draw the cohort with ChestSpec(outlines=True); sets "
            "of real patients have no outlines here."
        )
    bits = np.asarray(nibabel.as_closest_canonical(nibabel.load(path)).dataobj)
    # As `medtut.data.ct_volume.prepare` lays a volume.
    bits = bits.transpose(2, 1, 0)[:, ::-1, ::-1].astype(np.int32)
    return np.stack([(bits >> i & 1).astype(bool) for i in _bits().values()])


def _nifti(path: Path, values: np.ndarray, scanner: str, dtype: Any = np.int16) -> None:
    """As CT-RATE stores it: HU + 1024, the axes as the scanner counts them."""
    import nibabel

    flips = np.array(recipe()["scanners"][scanner]["affine"])
    spacing = np.array(recipe()["spacing"])
    stored = values[tuple(slice(None, None, int(f)) for f in flips)]
    affine = np.diag([*(flips * spacing), 1.0])
    affine[:3, 3] = -flips * (np.array(stored.shape) - 1) / 2 * spacing
    image = nibabel.Nifti1Image(stored.astype(dtype), affine, dtype=dtype)
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


def _tables(spec: ChestSpec, folder: Path, patients: dict[str, Any]) -> None:
    """Reports, labels and metadata, with CT-RATE's names of files and columns."""
    long, (x, _, z) = LONG[spec.split], recipe()["spacing"]
    columns, rows, slices = recipe()["shape"]
    meta = {
        "Manufacturer": f"medtut drawn {spec.scanner}", "RescaleIntercept": -1024,
        "RescaleSlope": 1, "XYSpacing": f"[{x}, {x}]", "ZSpacing": z, "Rows": rows,
        "Columns": columns, "NumberofSlices": slices, "PatientPosition": "FFS",
    }  # fmt: skip

    def labels(facts: dict[str, Any]) -> dict[str, int]:
        return {f: int(f in facts["findings"]) for f in recipe()["findings"]}

    for path, row in {
        f"radiology_text_reports/{long}_reports.csv": itemgetter("report"),
        f"multi_abnormality_labels/{spec.split}_predicted_labels.csv": labels,
        f"metadata/{long}_metadata.csv": lambda facts: meta,
    }.items():
        table = {name: row(facts) for name, facts in patients.items()}
        header = ["VolumeName", *next(iter(table.values()))]
        lines = [(name, *cells.values()) for name, cells in table.items()]
        write_table(folder / "dataset" / path, header, lines)
