"""What a result was made on: machine, versions, memory. Never the host's name."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import sys
import threading
from collections.abc import Callable
from functools import cache
from importlib import metadata
from pathlib import Path

PACKAGES = ("medtut", "torch", "torchvision", "monai", "numpy")


@cache
def cpu_model() -> str:
    """Return the processor's marketing name, or its architecture."""
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        if match := re.search(r"(?m)^model name\s*:\s*(.+)$", text):
            return " ".join(match[1].split())
    return platform.processor() or platform.machine() or "unknown"


def cores() -> int:
    """Return the number of cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def device_name() -> str:
    """Name the accelerator if torch is loaded already and sees one, else "cpu"."""
    torch = sys.modules.get("torch")
    if torch is None:
        return "cpu"
    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    return "mps" if torch.backends.mps.is_available() else "cpu"


def describe_machine() -> dict[str, object]:
    """Return processor, cores, memory, system and device; no host or user name."""
    import psutil

    return {
        "cpu": cpu_model(),
        "cores": cores(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.system(),
        "device": device_name(),
    }


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages a number depends on."""
    found = {name: version for name in PACKAGES if (version := version_of(name))}
    return {"python": platform.python_version(), **found}


def version_of(package: str) -> str | None:
    """Return the installed version of a package, None when it is not there."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return None


def peak_memory() -> int:
    """Return this process's peak resident memory so far, in bytes."""
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    try:
        # Not ru_maxrss, which on Linux a child takes over from its parent.
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


class MemorySampler:
    """Follow the resident memory of a process in a thread.

    Parameters
    ----------
    pid : callable
        Returns the process to look at, None while there is none.
    children : bool
        Count what it started as well.
    every : float
        Seconds between two looks.

    Attributes
    ----------
    peak : int
        The most that was seen, in bytes.
    """

    def __init__(
        self,
        pid: Callable[[], int | None] = os.getpid,
        children: bool = False,
        every: float = 0.05,
    ) -> None:
        self._pid, self._children, self._every, self.peak = pid, children, every, 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> MemorySampler:
        self.look()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join(timeout=5)

    def look(self) -> None:
        """Look once, now."""
        import psutil

        pid = self._pid()
        if pid is None:
            return
        try:
            process = psutil.Process(pid)
            more = process.children(recursive=True) if self._children else []
            total = sum(one.memory_info().rss for one in [process, *more])
        except psutil.Error:  # one of them ended meanwhile: the next look will do
            return
        self.peak = max(self.peak, total)

    def _follow(self) -> None:
        while not self._stop.wait(self._every):
            self.look()
