"""Put downloaded volumes and labels into the layout of the published lists."""

from __future__ import annotations

import gzip
import os
import re
import shutil
from pathlib import Path

from medtut.data.totalseg import Record
from medtut.errors import MedtutError
from medtut.files import renamed


def link(source: Path, target: Path) -> None:
    """Link a file, or copy it (another disk), compressed if the target is.

    Raises
    ------
    MedtutError
        If the target is there already: nothing is overwritten.
    """
    if target.exists():
        raise MedtutError(f"{target} is there already: nothing more is placed.")
    target.parent.mkdir(parents=True, exist_ok=True)
    same = source.suffix == target.suffix
    try:
        if not same:
            raise OSError
        os.link(source, target)
    except OSError:
        write = open if same else gzip.open
        with (
            renamed(target) as part,
            open(source, "rb") as old,
            write(part, "wb") as new,
        ):
            shutil.copyfileobj(old, new)


def pairs(source: Path, one: dict) -> dict[str, list[Path | None]]:
    """Number of a case -> its image and its labels in a download; None if one lacks."""
    found: dict[str, list[Path | None]] = {}
    for path in sorted(source.rglob("*.nii*")):
        for i, ending in enumerate(one["native"]):
            match = re.search(rf"(?:^|/){ending}(?:\.gz)?$", path.as_posix())
            if match and not path.name.startswith("."):
                found.setdefault(match[1], [None, None])[i] = path
    return found


def place(source: Path, root: Path, one: dict) -> int:
    """Place every case of a set that has both files; return how many.

    Raises
    ------
    MedtutError
        No case at all, or a file that is there already.
    """
    whole = {key: both for key, both in pairs(source, one).items() if all(both)}
    if not whole:
        said = " and ".join(one["native"])
        raise MedtutError(
            f"{source} has no pair of files that end in {said}: nothing placed. "
            f"{one['note']}"
        )
    for key, both in whole.items():
        for path, name in zip(both, one["layout"], strict=True):
            link(path, root / one["folder"] / name.format(key))
    return len(whole)


def cases_of(root: Path, one: dict) -> tuple[list[Record], list[Path]]:
    """The cases of a set below a root, and the files without their partner."""
    folder = root / one["folder"]
    found: dict[str, list[Path | None]] = {}
    for i, name in enumerate(one["layout"]):
        before, after = name.split("{}")
        for path in folder.glob(f"{before}*{after}"):
            key = path.relative_to(folder).as_posix()[len(before) : -len(after)]
            if key.isdigit():
                found.setdefault(key, [None, None])[i] = path
    ids = one["ids"]
    highest = max(i if isinstance(i, int) else i[0] for i in ids.values())
    both = {k: found[k] for k in sorted(found)}
    records = [
        Record(k, image, labels, ids, highest, {"dataset": one["folder"]})
        for k, (image, labels) in both.items()
        if image and labels
    ]
    alone = [p for pair in both.values() if not all(pair) for p in pair if p]
    return records, alone
