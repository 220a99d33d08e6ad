"""CT-RATE on disk: chest CTs, their reports and 18 findings, read strictly.

The layout of the set (Hamamci et al., arXiv:2403.17834), which the drawn chest cohort
of the course has too::

    ROOT/dataset/train/train_1/train_1_a/train_1_a_1.nii.gz     patient, scan, recon
    ROOT/dataset/radiology_text_reports/train_reports.csv       validation_ for valid
    ROOT/dataset/multi_abnormality_labels/train_predicted_labels.csv
    ROOT/dataset/metadata/train_metadata.csv                    validation_ for valid

The second release has ``train_fixed`` and ``valid_fixed`` beside or in place of the two
folders: volumes in Hounsfield units already.

One patient has several scans, one scan several reconstructions. The published code
trains on the first 80 % of the volumes in the order of their folders, which may cut
through a patient; split by patient here:
``medtut.data.splits.split_cases(names, patient_of=patient_of)``.
"""

from __future__ import annotations

import ast
import csv
import re
import warnings
from collections.abc import Sequence, Sized
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from medtut.data.ct_volume import SIZE, SPACING, WINDOW, fault, prepare, read_hu

FINDINGS = (
    "Medical material", "Arterial wall calcification", "Cardiomegaly",
    "Pericardial effusion", "Coronary artery wall calcification", "Hiatal hernia",
    "Lymphadenopathy", "Emphysema", "Atelectasis", "Lung nodule", "Lung opacity",
    "Pulmonary fibrotic sequela", "Pleural effusion", "Mosaic attenuation pattern",
    "Peribronchial thickening", "Consolidation", "Bronchiectasis",
    "Interlobular septal thickening",
)  # fmt: skip
PARTS = {
    "findings": "Findings_EN", "impression": "Impressions_EN",
    "clinical": "ClinicalInformation_EN", "technique": "Technique_EN",
}  # fmt: skip
SPLITS = {"train": "train", "valid": "validation"}  # folder -> how reports name it
RESCALE = ("RescaleSlope", "RescaleIntercept")
EMPTY = ("not given.", "nan")
_NAME = re.compile(r"(?P<patient>[A-Za-z]+_\d+)_(?P<scan>[A-Za-z]+)_\d+\.nii(\.gz)?")
VERSION = 1  # of what `load` stores


@dataclass(frozen=True, eq=False)
class Record:
    """One reconstruction of one scan, with what the tables say of it.

    Attributes
    ----------
    name : the set's VolumeName, ``train_1_a_1.nii.gz``.
    findings, impression, clinical, technique : the report; "" where "Not given.".
    labels : (18,) uint8 in the order of `FINDINGS`, or None.
    slope, intercept : of the metadata, or None: HU as stored.
    spacing : (x, y, z) in mm of the metadata, or None: the file's.
    """

    name: str
    path: Path
    patient: str
    findings: str = ""
    impression: str = ""
    clinical: str = ""
    technique: str = ""
    labels: np.ndarray | None = None
    slope: float | None = None
    intercept: float | None = None
    spacing: tuple[float, float, float] | None = None

    @property
    def key(self) -> str:
        """The name without its suffix."""
        return self.name.split(".")[0]


def patient_of(name: str) -> str:
    """``train_12_b_1.nii.gz`` -> ``train_12``.

    Raises
    ------
    CTError
        Another kind of name.
    """
    match = _NAME.fullmatch(Path(name).name)
    if match is None:
        raise fault("bad_name", name=name)
    return match["patient"]


def text(record: Record, parts: Sequence[str] = ("findings", "impression")) -> str:
    """The text of a report that a model is trained on, in one line.

    Parameters
    ----------
    record : Record
    parts : of "findings", "impression", "clinical", "technique"
        CT-CLIP trains on ``("findings",)``, its successor on findings and impression.

    Returns
    -------
    str
        Without quotation marks and parentheses, as in both published codes.
    """
    if unknown := [p for p in parts if p not in PARTS]:
        raise fault("bad_part", unknown=unknown, parts=list(PARTS))
    words = " ".join(getattr(record, part) for part in parts)
    return " ".join(re.sub(r"[\"'()]", "", words).split())


def read_table(path: Path, columns: Sequence[str]) -> dict[str, dict[str, str]]:
    """Read a table of CT-RATE by VolumeName.

    Raises
    ------
    CTError
        No file, not UTF-8, a column missing, a row with too few or too many cells, a
        name twice.
    """
    columns = ("VolumeName", *columns)
    try:
        # newline="": a report may hold line ends between its quotation marks.
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader, rows = csv.DictReader(file, restkey="too many"), {}
            has = list(reader.fieldnames or ())
            if lost := ", ".join(c for c in columns if c not in has):
                raise fault("column", path=path, lost=lost, has=", ".join(has))
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                if "too many" in row or None in row.values():
                    raise fault("cells", where=where, count=len(has))
                if (name := row["VolumeName"].strip()) in rows:
                    raise fault("row_twice", where=where, name=name)
                rows[name] = {c: row[c].strip() for c in columns}
            return rows
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise fault("table", path=path, error=error) from error


def _cell(path: Path, name: str, column: str, row: dict[str, str], wanted: str) -> Any:
    """Read a number, or a list of them; "0 or 1" is checked too."""
    facts = {"column": column, "value": row[column], "wanted": wanted}
    try:
        value = np.asarray(ast.literal_eval(row[column]), float)
    except (ValueError, SyntaxError, TypeError):
        raise fault("cell", path=path, name=name, **facts) from None
    shape = (2,) if wanted[0] == "[" else ()
    bad = value.shape != shape or not np.isfinite(value).all()
    if bad or (wanted == "0 or 1" and value not in (0, 1)):
        raise fault("cell", path=path, name=name, **facts)
    return value.tolist()


def find_volumes(
    root: Path | str, split: str = "train", *,
    labels: bool = True, rescale: bool = True, missing: str = "error",
) -> list[Record]:  # fmt: skip
    """List the volumes of one split with their reports, labels and metadata.

    Parameters
    ----------
    root : path
        The folder that holds ``dataset``, or ``dataset`` itself.
    split : {"train", "valid"}
        Or the second release's ``train_fixed``, ``valid_fixed``.
    labels : bool
        Read the 18 findings.
    rescale : bool
        Volumes are as stored by the scanner, slope and intercept are in the metadata
        (first release). False: they are in HU and have their spacing (second release,
        which is what a name with ``_fixed`` means).
    missing : {"error", "skip", "keep"}
        Of volumes without a report: no row, or findings and impression both empty.

    Returns
    -------
    list of Record
        By patient, scan and reconstruction, numbers in the order of numbers.

    Raises
    ------
    CTError
        See `read_table`; also no volume, one twice, one without a row of labels or
        metadata, a label that is not 0 or 1.

    Warns
    -----
    UserWarning
        Rows without a volume (a part of the set was downloaded), skipped volumes.
    """
    root = Path(root)
    root = root / "dataset" if (root / "dataset").is_dir() else root
    base, folder = split.removesuffix("_fixed"), root / split
    if base not in SPLITS or missing not in ("error", "skip", "keep"):
        raise fault("split", split=split, missing=missing)
    rescale = rescale and split == base
    paths: dict[str, Path] = {}
    for path in sorted(folder.rglob("[!.]*.nii*")):  # not macOS's ._name
        if (one := paths.setdefault(path.name, path)) != path:
            raise fault("file_twice", name=path.name, one=one, other=path)
    if not paths:
        raise fault("no_volume", folder=folder, split=split)
    report = root / "radiology_text_reports" / f"{SPLITS[base]}_reports.csv"
    label = root / "multi_abnormality_labels" / f"{base}_predicted_labels.csv"
    meta = root / "metadata" / f"{SPLITS[base]}_metadata.csv"
    wanted = {report: tuple(PARTS.values())}
    wanted |= {label: FINDINGS} if labels else {}
    wanted |= {meta: (*RESCALE, "XYSpacing", "ZSpacing")} if rescale else {}
    tables = {file: read_table(file, columns) for file, columns in wanted.items()}
    for file, rows in tables.items():
        if (lost := [n for n in paths if n not in rows]) and file != report:
            raise fault("no_row", **_count(lost, paths), file=file)
        if extra := [n for n in rows if n not in paths]:
            said = fault("no_file", **_count(extra, rows), file=file, folder=folder)
            warnings.warn(str(said), stacklevel=2)
    records, bare = [], []
    for name, path in paths.items():
        row = tables[report].get(name, {})
        words = {k: row.get(column, "") for k, column in PARTS.items()}
        words = {k: "" if v.lower() in EMPTY else v for k, v in words.items()}
        values: dict[str, Any] = {}
        if rescale:
            cell = partial(_cell, meta, name, row=tables[meta][name])
            number = [cell(c, wanted="a number") for c in (*RESCALE, "ZSpacing")]
            values["slope"], values["intercept"], z = number
            values["spacing"] = (*cell("XYSpacing", wanted="[0.7, 0.7]"), z)
        if labels:
            cell = partial(_cell, label, name, row=tables[label][name], wanted="0 or 1")
            values["labels"] = np.array([cell(f) for f in FINDINGS], np.uint8)
        if not (words["findings"] or words["impression"]):
            bare.append(name)
        records.append(Record(name, path, patient_of(name), **words, **values))
    if bare and missing != "keep":
        error = fault("no_report", **_count(bare, paths), file=report)
        if missing == "error":
            raise error
        warnings.warn(f"{error} Left out.", stacklevel=2)
        records = [r for r in records if r.name not in bare]
    return sorted(records, key=_order)


def _count(some: list[str], of: Sized) -> dict[str, Any]:
    more = f" and {len(some) - 5} more" if len(some) > 5 else ""
    return {"count": len(some), "all": len(of), "names": ", ".join(some[:5]) + more}


def _order(record: Record) -> list:
    return [int(p) if p.isdecimal() else p for p in re.split(r"(\d+)", record.key)]


def _content(path: Path) -> list:
    """Identify a file without reading all of it: a real set has terabytes.

    A gzip file ends in the CRC-32 and the length of what it holds.
    """
    from medtut.data.download import sha256_of

    if path.suffix != ".gz":
        return [sha256_of(path)]
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - 8))
        return [size, file.read().hex()]


def load(
    records: Sequence[Record], size: tuple[int, int, int] = SIZE,
    spacing: tuple[float, float, float] = SPACING,
    window: tuple[float, float] = WINDOW, progress: bool = True,
) -> np.ndarray:  # fmt: skip
    """Read and prepare all volumes once; afterwards they are mapped from the cache.

    Parameters
    ----------
    records : sequence of Record
    size, spacing, window
        See `medtut.data.ct_volume.prepare`.
    progress : bool

    Returns
    -------
    (N, D, H, W) float16 in [-1, 1], memory-mapped, read-only
        Rounded by 0.25 HU at most. 200 volumes of 48 × 96 × 96 are 177 MB.

    Raises
    ------
    CTError
        A volume that is not what its record says; names the file.
    """
    from tqdm.auto import tqdm

    from medtut.data.cache import cached_file

    if not records:
        raise fault("no_records")
    shape = (len(records), *size)
    grid = [list(size), list(map(float, spacing)), list(map(float, window))]
    volumes = [
        [r.name, *_content(r.path), r.slope, r.intercept, r.spacing] for r in records
    ]
    key = {"version": VERSION, "grid": grid, "volumes": volumes}

    def make(path: Path) -> None:
        array = np.lib.format.open_memmap(path, "w+", np.float16, shape)
        for i, r in enumerate(tqdm(records, "reading CT", disable=not progress)):
            ct = read_hu(r.path, r.slope, r.intercept, r.spacing)
            array[i] = prepare(ct, size, spacing, window)[0]
        array.flush()
        array._mmap.close()  # Windows renames no file that is mapped

    return np.load(cached_file("ct_rate", key, make, ".npy"), mmap_mode="r")
