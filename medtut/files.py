"""Writing whole files or none."""

from __future__ import annotations

import contextlib
import json
import os
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
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        os.replace(partial, path)
    except OSError as error:
        raise MedtutError(
            f"cannot write {path}: {error.strerror or error}; choose another folder "
            "with --out, or make this one writable"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()
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
