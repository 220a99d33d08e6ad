"""What the doctor looks at: the machine, the packages, the network."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata as metadata
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

from medtut.data.cache import cache_dir, writable_dir
from medtut.machine import version_of

# The official address of most assets; any answer at all means "online".
ADDRESS = "https://raw.githubusercontent.com"
TIMEOUT_S = 3.0
PROBE_TIMEOUT_S = 180.0

# Runs in a process of its own: a broken pair can take the interpreter down with it.
_PROBE = """
import torch
kind, name = "cpu", "CPU only"
if torch.cuda.is_available():
    kind, name = "cuda", torch.cuda.get_device_name(0)
elif torch.backends.mps.is_available():
    kind, name = "mps", "Apple GPU"
print("medtut-device", kind, name, flush=True)
import torchvision
boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
torchvision.ops.nms(boxes, torch.ones(1), 0.5)
print("medtut-pair", torch.__version__, torchvision.__version__, flush=True)
"""


class Facts:
    """What the checks look at; tests replace it."""

    def python(self) -> tuple[int, ...]:
        """Version of the running Python."""
        return tuple(sys.version_info[:3])

    @functools.cache  # noqa: B019  there is one for a run
    def probe(self) -> tuple[int, str, str]:
        """Import torch and torchvision elsewhere: exit status, output, errors."""
        command = [sys.executable, "-c", _PROBE]
        try:
            done = subprocess.run(command, capture_output=True, timeout=PROBE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return 124, "", f"importing took longer than {PROBE_TIMEOUT_S:.0f} s"
        out, err = (t.decode(errors="replace") for t in (done.stdout, done.stderr))
        return done.returncode, out, err

    def requirements(self) -> list[str]:
        """What the package asks for, from its metadata or from pyproject.toml."""
        if listed := self.requires("medtut"):
            return listed
        import tomllib

        text = Path(__file__).resolve().parents[2].joinpath("pyproject.toml")
        return tomllib.loads(text.read_text("utf-8"))["project"]["dependencies"]

    def version(self, package: str) -> str | None:
        """Installed version of a package, None when it is not there."""
        return version_of(package)

    def requires(self, package: str) -> list[str]:
        """What an installed package asks for."""
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.requires(package) or []
        return []

    def memory_gb(self) -> float:
        """Memory that is free for us, a container's limit included."""
        import psutil

        free, group = psutil.virtual_memory().available, Path("/sys/fs/cgroup")
        with contextlib.suppress(OSError, ValueError):  # no container, or no limit
            most = int((group / "memory.max").read_text("ascii"))
            free = min(free, most - int((group / "memory.current").read_text("ascii")))
        return free / 1e9

    def cache_folder(self) -> Path:
        """The course's cache."""
        return cache_dir()

    def prove_cache(self) -> None:
        """Write to the cache; raises `MedtutError` when that fails."""
        writable_dir(self.cache_folder())

    def free_gb(self, folder: Path) -> float:
        """Free space where a folder is, or will be."""
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        return shutil.disk_usage(folder).free / 1e9

    def reach(self) -> None:
        """Ask `ADDRESS` for its headers; raises OSError when nothing answers."""
        request = urllib.request.Request(ADDRESS, method="HEAD")
        with contextlib.suppress(urllib.error.HTTPError):  # refused: somebody is there
            urllib.request.urlopen(request, timeout=TIMEOUT_S).close()
