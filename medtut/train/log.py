"""The log of a run: one JSON object per line, readable while the run goes on."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path
from typing import Any

from medtut.files import write_text


class Log:
    """Keeps the history in memory and, if there is a file, on disk.

    Parameters
    ----------
    path : Path or None
        ``log.jsonl`` of the run.
    keep_to : int
        Lines of later steps are dropped, and so is a line that was cut off: the run
        goes on after this step, and no step may stand in the log twice.
    """

    def __init__(self, path: Path | None, keep_to: int) -> None:
        self.path = path
        self.history: list[dict[str, Any]] = []
        if path is None:
            return
        with contextlib.suppress(ValueError, FileNotFoundError):
            for line in path.read_text(encoding="utf-8").splitlines():
                if (entry := json.loads(line))["step"] > keep_to:
                    break
                self.history.append(entry)
        write_text(path, "".join(map(_line, self.history)))

    def add(self, event: str, step: int, **values: Any) -> None:
        """Add one line and bring it to the file at once."""
        entry = {"event": event, "step": step, **values}
        for name, value in values.items():
            if isinstance(value, float) and not math.isfinite(value):
                entry[name] = None  # JSON has no NaN
        self.history.append(entry)
        if self.path:
            with open(self.path, "a", encoding="utf-8", newline="\n") as file:
                file.write(_line(entry))


def _line(entry: dict[str, Any]) -> str:
    return json.dumps(entry, ensure_ascii=False) + "\n"
