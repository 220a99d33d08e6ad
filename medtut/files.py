"""Writing whole files or none."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from medtut.errors import MedtutError


@contextlib.contextmanager
def renamed(path: Path | str, error: type[MedtutError] = MedtutError) -> Iterator[Path]:
    """Give a temporary name beside `path`; what is written there becomes `path`.

    Raises
    ------
    MedtutError
        Or another `error`, when the file cannot be written; an earlier one stays.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        os.replace(partial, path)
    except (OSError, RuntimeError) as failed:  # the latter is torch.save's full disk
        why = getattr(failed, "strerror", None) or failed
        raise error(
            f"cannot write {path}: {why}; choose another folder, or make room in this "
            "one and make it writable (what was there before is untouched)"
        ) from failed
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def write_bytes(path: Path, content: bytes) -> Path:
    """Write a file under a temporary name in the same folder, then rename it.

    Raises
    ------
    MedtutError
        When the folder cannot be written.
    """
    with renamed(path) as partial:
        partial.write_bytes(content)
    return Path(path)


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
