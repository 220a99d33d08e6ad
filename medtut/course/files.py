"""Folders of a run, and finding the repository."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from medtut.errors import MedtutError
from medtut.files import read_json  # noqa: F401  (lessons take it from here)


def check_cache() -> None:
    """Refuse a cache folder that is not there and cannot be made.

    One that is there may be read-only: in a workshop it is filled beforehand.
    """
    from medtut.data.cache import cache_dir, writable_dir

    if not cache_dir().is_dir():
        writable_dir(cache_dir())


def check_writable(folder: Path) -> Path:
    """Make `folder` and prove that a file can be written into it.

    Raises
    ------
    MedtutError
        When it cannot; the message names the folder and what to do.
    """
    from medtut.data.cache import CacheError, writable_dir

    try:
        return writable_dir(Path(folder))
    except CacheError as error:
        raise MedtutError(
            f"cannot write to the output folder {folder}: {error.__cause__}; choose "
            "another one with --out"
        ) from None


def replace_folder(new: Path, final: Path) -> None:
    """Put the folder `new` in the place of `final`, whole."""
    old = final.with_name(final.name + ".previous.partial")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.replace(final, old)
    os.replace(new, final)
    shutil.rmtree(old, ignore_errors=True)


def repository_root() -> Path:
    """Return the folder of the clone we are in, else the current folder."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        project = folder / "pyproject.toml"
        text = project.read_bytes() if project.is_file() else b""
        if b'name = "medtut"' in text:
            return folder
    return here
