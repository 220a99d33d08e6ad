"""Prepared volumes and reports in tar files, in the way of webdataset, and safely.

A shard is a plain tar: for each volume ``KEY.npy`` (D, H, W float16), ``KEY.txt`` (the
report) and ``KEY.json`` (name, patient, labels), one after the other, so that training
reads the disk in one go. A tar file that was cut at a lucky place looks like a shorter
one, and its reader stops without a word. So each shard has an index beside it,
``shard-000000.tar.json``: keys, where each ends, size and sha256. What does not agree
with it is refused by name.
"""

from __future__ import annotations

import glob
import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medtut.data.ct_rate import Record, load, text
from medtut.data.ct_volume import CTError, fault
from medtut.data.download import sha256_of
from medtut.files import renamed, write_json

SUFFIXES = (".npy", ".txt", ".json")


def _sound(volume: np.ndarray, shape: Sequence[int], where: str) -> np.ndarray:
    if list(volume.shape) != list(shape) or volume.dtype != np.float16:
        is_ = {"dtype": volume.dtype, "shape": volume.shape, "wanted": tuple(shape)}
        raise fault("shape", where=where, **is_)
    if bad := volume.size - np.count_nonzero(np.isfinite(volume)):
        raise fault("nan_in_shard", where=where, bad=bad, size=volume.size)
    return volume


def write_shards(
    records: Sequence[Record], folder: Path | str, per_shard: int = 64,
    volumes: np.ndarray | None = None, parts: Sequence[str] = ("findings", "impression")
) -> list[Path]:  # fmt: skip
    """Write records as shards ``shard-000000.tar`` and so on, each by rename.

    Parameters
    ----------
    records : sequence of Record
    folder : path
    per_shard : int
        Volumes in a shard. At the published size (110.6 MB each) 8 or so.
    volumes : (N, D, H, W) float16, optional
        Of the records; by default `medtut.data.ct_rate.load` makes them.
    parts : of the report; see `medtut.data.ct_rate.text`.

    Returns
    -------
    list of Path

    Raises
    ------
    CTError
        NaN, another number of volumes than records, or the folder has shards.
    """
    folder, shards = Path(folder), []
    volumes = load(records) if volumes is None else volumes
    if len(volumes) != len(records) or per_shard < 1 or not records:
        sizes = {"volumes": len(volumes), "records": len(records)}
        raise fault("write", per_shard=per_shard, **sizes)
    key, count = Counter(r.key for r in records).most_common(1)[0]
    if count > 1:
        raise fault("same_key", key=key)
    if there := sorted(folder.glob("*.tar")):
        raise fault("there", folder=folder, first=there[0].name)
    for start in range(0, len(records), per_shard):
        path, ends = folder / f"shard-{len(shards):06d}.tar", {}
        with renamed(path, CTError) as partial, tarfile.open(partial, "w") as tar:
            for i, r in enumerate(records[start : start + per_shard], start):
                one, array = np.asarray(volumes[i], np.float16), io.BytesIO()
                np.save(array, _sound(one, volumes.shape[1:], f"{path}, key {r.key}"))
                label = None if r.labels is None else r.labels.tolist()
                facts = {"name": r.name, "patient": r.patient, "labels": label}
                words = text(r, parts).encode(), json.dumps(facts).encode()
                members = zip(SUFFIXES, (array.getvalue(), *words), strict=True)
                for suffix, content in members:
                    # No time and no owner: the same input is the same file.
                    info = tarfile.TarInfo(r.key + suffix)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
                ends[r.key] = tar.offset
        index = {"bytes": path.stat().st_size, "sha256": sha256_of(path), "ends": ends}
        index["shape"] = list(volumes.shape[1:])
        write_json(path.with_name(path.name + ".json"), index)
        shards.append(path)
    return shards


def _index(path: Path, verify: bool) -> dict[str, Any]:
    """Read the index of a shard, and compare the shard with it."""
    beside = path.with_name(path.name + ".json")
    try:
        index = json.loads(beside.read_text(encoding="utf-8"))
        ends, wanted, size = index["ends"], index["bytes"], path.stat().st_size
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise fault("index", path=path, beside=beside.name, error=error) from error
    if size != wanted:
        lost = [key for key, end in ends.items() if end > size]
        sizes = {"size": size, "wanted": wanted, "count": len(lost), "all": len(ends)}
        sizes["what"] = "cut off" if size < wanted else "too long"
        sizes["first"] = f" from key {lost[0]} on" if lost else ""
        raise fault("truncated", path=path, **sizes)
    if verify and sha256_of(path) != index["sha256"]:
        raise fault("changed", path=path)
    return index


def read_shards(
    pattern: Path | str | Sequence[Path], seed: int | None = None, verify: bool = True
) -> Iterator[dict[str, Any]]:
    """Read the volumes of shards one by one.

    Parameters
    ----------
    pattern : a folder, a path with ``*``, or paths
    seed : int, optional
        Shuffle: the shards, and the volumes within each. The order is the same for the
        same seed, files and version of numpy's generator; give another seed each epoch.
    verify : bool
        Compare the sha256 of every shard before its first volume.

    Yields
    ------
    dict
        ``key``, ``volume`` (D, H, W) float16, ``text``, ``name``, ``patient``,
        ``labels`` (18,) uint8 or None.

    Raises
    ------
    CTError
        No shard, no index, a shard cut off or changed; a missing member, another shape,
        NaN or a broken member, by key.
    """
    found = pattern
    if isinstance(pattern, str | Path):
        one = Path(pattern)
        found = glob.glob(str(one / "*.tar" if one.is_dir() else one))
    if not (shards := sorted(map(Path, found))):
        raise fault("no_shard", pattern=pattern)
    order = list if seed is None else np.random.default_rng(seed).permutation
    for path in map(Path, order(shards)):
        index = _index(path, verify)
        try:
            with tarfile.open(path) as tar:
                for key in map(str, order(list(index["ends"]))):
                    yield _sample(tar, key, index["shape"], path)
        except tarfile.TarError as error:
            raise fault("damaged", where=path, error=error) from error


def _sample(tar: tarfile.TarFile, key: str, shape: list[int], path: Path) -> dict:
    where, names = f"{path}, key {key}", [key + suffix for suffix in SUFFIXES]
    if lost := ", ".join(n for n in names if n not in tar.getnames()):
        raise fault("member", where=where, lost=lost)
    try:
        array, words, facts = (tar.extractfile(n).read() for n in names)
        volume = np.load(io.BytesIO(array), allow_pickle=False)
        said = {"key": key, "text": words.decode("utf-8"), **json.loads(facts)}
        if said["labels"] is not None:
            said["labels"] = np.array(said["labels"], np.uint8)
    except (OSError, ValueError, KeyError, TypeError, tarfile.TarError) as error:
        raise fault("damaged", where=where, error=repr(error)) from error
    return said | {"volume": _sound(volume, shape, where)}
