"""Find abdominal CT with organ labels: TotalSegmentator, FLARE22, one labelled file.

What was found is a list of `Record`; `medtut.data.totalseg` reads them.
"""

from __future__ import annotations

import csv
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medtut.data.ct_volume import load_image
from medtut.data.organs import FLARE22, HIGHEST, LABEL_MAPS, UNIONS, fault
from medtut.data.partial import set_of

_LABELS = re.compile("seg|label|mask", re.IGNORECASE)
_SUFFIX = re.compile(r"(_0000)?\.(nii(\.gz)?|nrrd)$")


@dataclass(frozen=True)
class Record:
    """Where one case lies.

    Attributes
    ----------
    id : str
    image : path
    labels : path, or None where there are none
        A folder of one file per structure, or one file with many ids.
    ids : structure -> id in that one file, or (id, "left" or "right") where both sides
        have one id and are told apart by the middle of the volume. None for a folder.
    highest : the highest id that may stand in the file.
    facts : a row of the set's table, its ``dataset``, or nothing.
    """

    id: str
    image: Path
    labels: Path | None = None
    ids: Mapping[str, Any] | None = None
    highest: int = 1
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """Structures with an id or a file of their own."""
        if self.labels is None or self.ids is not None:
            return tuple(self.ids or ()) if self.labels else ()
        files = sorted(self.labels.glob("*.nii.gz"))
        return tuple(p.name.removesuffix(".nii.gz") for p in files)

    @property
    def annotated(self) -> tuple[str, ...]:
        """Structures that the labels speak about, also where they are empty."""
        have = self.names
        whole = [u for u, parts in UNIONS.items() if set(parts) <= set(have)]
        return have + tuple(u for u in whole if u not in have)


def find_cases(folder: Path | str, label_map: str = "totalseg_v2") -> list[Record]:
    """Return the cases of a folder, sorted by id.

    Known are TotalSegmentator's ``s0001/ct.nii.gz`` with ``segmentations/`` (a file per
    structure) or ``segmentations.nii.gz`` (many ids), the folder or one of its cases,
    with or without ``meta.csv``; FLARE22's ``images`` and ``labels``; and two files,
    of which one has "seg", "label" or "mask" in its name.

    Parameters
    ----------
    folder : path
    label_map : key of `medtut.data.organs.LABEL_MAPS`
        For files with many ids, where they carry no table of names (TotalSegmentator
        writes one into its own).

    Raises
    ------
    OrganError
        No such folder, none of these layouts, an unknown label map.
    """
    folder = Path(folder)
    if label_map not in LABEL_MAPS:
        raise fault("label_map", given=label_map, known=", ".join(LABEL_MAPS))
    records = []
    for image in sorted((folder / "images").glob("*.nii.gz")):
        key = _SUFFIX.sub("", image.name)
        labels = folder / "labels" / f"{key}.nii.gz"
        there = labels if labels.is_file() else None
        records.append(Record(key, image, there, FLARE22, HIGHEST["flare22"]))
    rows = {}
    if (folder / "meta.csv").is_file():
        with open(folder / "meta.csv", encoding="utf-8-sig", newline="") as file:
            table = csv.DictReader(file, delimiter=";")
            rows = {row.get("image_id"): row for row in table}
    for way in (
        "ct.nii.gz",
        "*/ct.nii.gz",
        "data/*/ct.nii.gz",
    ):  # the last is upstream's
        for image in folder.glob(way):
            key, one = image.parent.name, image.with_name("segmentations.nii.gz")
            parts = image.with_name("segmentations")
            labels = (parts if parts.is_dir() else None, None, 1)
            if one.is_file() and not parts.is_dir():
                labels = _many(one, label_map)
            records.append(Record(key, image, *labels, rows.get(key, {})))
    files = sorted(p for p in folder.glob("*.*") if _SUFFIX.search(p.name))
    marked = [p for p in files if _LABELS.search(p.name)]
    if not records and len(files) == 2 and len(marked) == 1:
        image = next(p for p in files if p not in marked)
        key = _SUFFIX.sub("", image.name)
        records.append(Record(key, image, *_many(marked[0], label_map)))
    if not records:
        raise fault("no_case", folder=folder)
    return sorted(records, key=lambda r: r.id)


def _many(path: Path, label_map: str) -> tuple[Path, Mapping[str, int], int]:
    """A file of many ids with its map: the one within the file, or what was asked."""
    more = getattr(load_image(path).header, "extensions", ())
    text = " ".join(str(e.get_content()) for e in more)
    found = re.findall(r'Key="(\d+)"[^>]*><!\[CDATA\[(\w+)', text)
    table = {name: int(i) for i, name in found}
    highest = max(table.values(), default=HIGHEST[label_map])
    return path, table or LABEL_MAPS[label_map], highest


def read_partition(path: Path | str, root: Path | str) -> list[Record]:
    """Read a partition list of upstream: an image and its labels in every line.

    Parameters
    ----------
    path : the text file, for example ``totalseg_selected/spleen_train.txt``.
    root : the folder that the paths in it start from.

    Returns
    -------
    list of Record, in the order of the list. ``facts`` names the data set (the first
    part of the path) and, for TotalSegmentator, the structure of the list.

    Raises
    ------
    OrganError
        A line that is no pair, or of a set that nobody knows the ids of.

    Warns
    -----
    UserWarning
        An image that stands twice is kept once (upstream's ``pancreas_train.txt``
        names s0930 two times, so that its 30 lines are 29 volumes).
    """
    records: dict[str, Record] = {}
    for number, line in enumerate(Path(path).read_text("utf-8").splitlines(), 1):
        parts, where = line.split(), f"{path}, line {number}"
        if len(parts) not in (0, 2):
            raise fault("line", where=where, words=len(parts))
        if not parts:
            continue
        image, labels = (Path(root) / part for part in parts)
        facts = {"dataset": parts[0].split("/")[0]}
        if labels.parent.name == "segmentations":
            facts["structure"] = labels.name.removesuffix(".nii.gz")
            new = Record(image.parent.name, image, labels.parent, facts=facts)
        else:
            known = {"ids": FLARE22} if "FLARE" in parts[0] else set_of(parts[0], where)
            ids = known["ids"]
            highest = max(i if isinstance(i, int) else i[0] for i in ids.values())
            key = _SUFFIX.sub("", image.name)
            new = Record(key, image, labels, ids, highest, facts)
        if parts[0] in records:
            warnings.warn(f"{where}: {new.id} stands twice, kept once.", stacklevel=2)
        records.setdefault(parts[0], new)
    return list(records.values())
