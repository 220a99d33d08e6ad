"""The one cache of the course: inputs and code version in, file out.

An entry is named after the sha256 of what it was made from, so nothing is ever stale:
another input or another code version is another file. Entries are written under a
temporary name and renamed, so a reader never sees half a file, whoever else writes.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medtut.errors import MedtutError

if TYPE_CHECKING:
    import numpy as np


class CacheError(MedtutError):
    """The cache cannot be written or an entry cannot be made."""


def cache_dir() -> Path:
    """Return the folder of the cache (made when something is first written).

    ``MEDTUT_CACHE`` if set, else the user's cache folder for ``medtut``.
    """
    chosen = os.environ.get("MEDTUT_CACHE", "").strip()
    if chosen:
        return Path(chosen).expanduser().absolute()
    import platformdirs

    return Path(platformdirs.user_cache_dir("medtut", appauthor=False))


def writable_dir(folder: Path) -> Path:
    """Make ``folder`` and prove that a file can be written there.

    Raises
    ------
    CacheError
        With the reason, and the variable that names another place.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise CacheError(
            f"The cache folder {folder} cannot be written ({error}). Make it "
            "writable, or set the environment variable MEDTUT_CACHE to a folder that "
            "is."
        ) from error
    return folder


def digest(name: str, key: Any) -> str:
    """Return the sha256 (hex) that identifies ``key`` under ``name``.

    The key is written as canonical JSON, so the order in which a dict was filled does
    not matter, while 1 and "1" stay different.

    Raises
    ------
    CacheError
        If the key is not plain JSON (a Path, an array, NaN, a dict with other than text
        keys...).
    """

    def check(value: Any, where: str) -> None:
        # json.dumps would turn the key 1 into "1" and make two keys one.
        if isinstance(value, Mapping):
            for k, v in value.items():
                if not isinstance(k, str):
                    raise CacheError(
                        f"Cache key of '{name}': {where} has the key {k!r}; use text."
                    )
                check(v, f"{where}[{k!r}]")
        elif isinstance(value, list | tuple):
            for i, v in enumerate(value):
                check(v, f"{where}[{i}]")

    check(key, "key")
    try:
        text = json.dumps(
            [name, key], sort_keys=True, ensure_ascii=True, allow_nan=False
        )
    except (TypeError, ValueError) as error:
        raise CacheError(
            f"Cache key of '{name}' is not plain JSON ({error}). Use numbers, text, "
            "lists and dicts; for a file its sha256, for an array its sha256 and shape."
        ) from error
    return hashlib.sha256(text.encode()).hexdigest()


def entry_path(name: str, key: Any, suffix: str = "") -> Path:
    """Return where the entry of ``key`` is, or would be, without making it."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][\w.-]*)*", name):
        raise CacheError(
            f"Cache name {name!r}: use letters, digits, '.', '_', '-', and '/' "
            "between parts."
        )
    return cache_dir() / "made" / name / f"{digest(name, key)[:32]}{suffix}"


def write_by_rename(path: Path, make: Callable[[Path], None]) -> Path:
    """Let ``make`` write a temporary file beside ``path``, then rename it.

    Two processes may do this at once: each has its own temporary name, and both ends
    are whole files. The temporary name ends as ``path`` does, because writers such as
    ``numpy.save`` and ``nibabel.save`` look at the suffix.
    """
    writable_dir(path.parent)
    folder = tempfile.mkdtemp(prefix=".making-", dir=path.parent)
    partial: Path | None = Path(folder) / path.name
    try:
        make(partial)
        if not partial.is_file():
            raise CacheError(
                f"Cache entry {path}: its maker wrote no file at the path it was given."
            )
        try:
            finished, partial = partial, None
            os.replace(finished, path)
        except PermissionError:
            # Windows refuses to replace a file that another process has open. The
            # entry that is there was made from the same key: it is as good as ours.
            if not path.is_file():
                raise
    except OSError as error:
        # A file that the maker cannot read is the maker's story; a full disk is ours.
        if partial is not None and error.errno not in (errno.ENOSPC, errno.EROFS):
            raise
        raise CacheError(
            f"Cache entry {path} could not be written ({error}). Free some space, or "
            "set MEDTUT_CACHE to another folder."
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return path


def cached_file(
    name: str, key: Any, make: Callable[[Path], None], suffix: str = ""
) -> Path:
    """Return the file made from ``key``, making it if it is not there.

    Parameters
    ----------
    name : str
        What kind of thing it is, for example ``"slices/brain"``; a folder of the cache.
    key : JSON-able
        Everything the content depends on: inputs, parameters and a code version.
    make : callable
        ``make(path)`` writes the file at ``path``. If it raises, nothing stays.
    suffix : str
        For example ``".nii.gz"``.

    Raises
    ------
    CacheError
        If the cache cannot be written or the key is not JSON.
    """
    path = entry_path(name, key, suffix)
    return path if path.is_file() else write_by_rename(path, make)


def cached_json(name: str, key: Any, make: Callable[[], Any]) -> Any:
    """Return what ``make()`` gave for ``key``, as read back from its JSON file.

    Parameters
    ----------
    name, key
        As in `cached_file`.
    make : callable
        ``make()`` returns something JSON has words for.
    """

    def write(path: Path) -> None:
        path.write_text(json.dumps(make()), encoding="utf-8")

    return json.loads(cached_file(name, key, write, ".json").read_text("utf-8"))


def cached_arrays(
    name: str, key: Any, make: Callable[[], Mapping[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """Return the arrays made from ``key``, making them if they are not there.

    Parameters
    ----------
    name, key
        As in `cached_file`.
    make : callable
        ``make()`` returns a dict of arrays of numbers, any shapes.

    Returns
    -------
    dict of arrays
        Always as read back from the file, so that the first call and later ones give
        the same thing. An entry that cannot be read is made again.
    """
    import numpy as np

    def write(path: Path) -> None:
        arrays = {k: np.asarray(v) for k, v in make().items()}
        for k, v in arrays.items():
            if v.dtype.hasobject:
                raise CacheError(f"Cache entry '{name}': array '{k}' holds objects.")
        with open(path, "wb") as file:
            np.savez(file, **arrays)

    def read(path: Path) -> dict[str, np.ndarray]:
        with np.load(path, allow_pickle=False) as stored:
            return {k: stored[k] for k in stored.files}

    path = entry_path(name, key, ".npz")
    if path.is_file():
        with contextlib.suppress(ValueError, OSError, EOFError, zipfile.BadZipFile):
            return read(path)
        with contextlib.suppress(OSError):
            path.unlink()
    return read(write_by_rename(path, write))
