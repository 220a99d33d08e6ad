"""Writing whole files or none, and finding the repository."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from medtut.errors import MedtutError


def write_bytes(path: Path, content: bytes) -> Path:
    """Write a file under a temporary name in the same folder, then rename it.

    Raises
    ------
    MedtutError
        When the folder cannot be written.
    """
    path = Path(path)
    handle, name = -1, ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(
            prefix=f".{path.name}.", suffix=".partial", dir=path.parent
        )
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        # mkstemp makes files only their owner can read.
        os.chmod(name, 0o644)
        os.replace(name, path)
    except OSError as error:
        raise MedtutError(
            f"cannot write {path}: {error.strerror or error}; choose another folder "
            "with --out, or make this one writable"
        ) from None
    finally:
        if name and os.path.exists(name):
            os.unlink(name)
    return path


def write_text(path: Path, text: str) -> Path:
    """Write UTF-8 text by rename, with ``\\n`` line ends everywhere."""
    return write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> Path:
    """Write JSON by rename; NaN is refused."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    return write_text(path, text + "\n")


def read_json(path: Path, default: Any = None) -> Any:
    """Read JSON, or return `default` when the file is missing or broken."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return default


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
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".partial"):
            pass
    except OSError as error:
        raise MedtutError(
            f"cannot write to the output folder {folder}: {error.strerror or error}; "
            "choose another one with --out"
        ) from None
    return folder


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
        if project.is_file() and 'name = "medtut"' in project.read_text(
            encoding="utf-8", errors="replace"
        ):
            return folder
    return here
