"""``medtut doctor``: can this machine run the course, and if not, what helps.

Every check returns one line, and one line of cure when something is wrong. The result
fits in a short code that a workshop host can collect and decode; it holds what the
checks said, device kind, Python and a checksum of versions, and nothing about who or
where.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from medtut.course.doctor_code import CHECK_NAMES, CodeError, Decoded, decode, encode
from medtut.course.doctor_facts import ADDRESS, Facts

__all__ = [
    "CHECKS", "Check", "CodeError", "Decoded", "DoctorReport", "Facts", "decode",
    "run_doctor",
]  # fmt: skip

Status = Literal["ok", "warning", "failure"]

PYTHON = (3, 11)
MEMORY_GB = 6.0
DISK_GB = 3.0

_REINSTALL = (
    "install a matching pair from one source: "
    "python -m pip install --force-reinstall --no-cache-dir torch torchvision"
)
_CONTINUE = "run `python -m pip install -e .` in the course folder"


@dataclass(frozen=True)
class Check:
    """Result of one check; `cure` is one line and stands wherever status is not ok."""

    name: str
    status: Status
    message: str
    cure: str = ""


def check_python(facts: Facts) -> Check:
    """Whether Python is new enough."""
    said, need = (".".join(map(str, v)) for v in (facts.python(), PYTHON))
    if facts.python()[:2] >= PYTHON:
        return Check("python", "ok", said)
    cure = f"install Python {need} or newer and make the environment again: make env"
    return Check("python", "failure", f"{said}, needs {need} or newer", cure)


def check_packages(facts: Facts) -> Check:
    """Whether every required package is there in a version within its range."""
    from packaging.requirements import Requirement

    every = map(Requirement, facts.requirements())
    needed = [r for r in every if not r.marker or r.marker.evaluate({"extra": ""})]
    faults = {}
    for one in needed:
        wanted, version = f'"{one.name}{one.specifier}"', facts.version(one.name)
        if version is None:
            faults[wanted] = f"{one.name} is missing"
        elif not one.specifier.contains(version, prereleases=True):
            faults[wanted] = f"{one.name} is {version}, needs {one.specifier}"
    if not faults:
        return Check("packages", "ok", f"all {len(needed)} within their ranges")
    cure = f"python -m pip install {' '.join(faults)}"
    return Check("packages", "failure", "; ".join(faults.values()), cure)


def check_torch_pair(facts: Facts) -> Check:
    """Whether torch and torchvision are built for each other."""
    from packaging.requirements import Requirement

    status, _, err = facts.probe()
    last = "".join(err.strip().splitlines()[-1:]).strip()
    said, cure = f"importing them failed: {last or f'exit status {status}'}", _REINSTALL
    if status == 0 and (pair := _told(facts, "medtut-pair")):
        here = facts.version("torch") or "0"
        asked = map(Requirement, facts.requires("torchvision"))
        asked = [r.specifier for r in asked if r.name == "torch" and not r.marker]
        if all(one.contains(here, prereleases=True) for one in asked):
            return Check("torch_pair", "ok", f"torch {pair[0]}, torchvision {pair[1]}")
        said = f"torchvision asks for torch {asked[0]}, not {here}"
    elif "torchvision::nms does not exist" in err:
        said = "torch and torchvision do not match (torchvision::nms does not exist)"
    elif missing := re.search(r"No module named '(torch|torchvision)'", err):
        cure = "python -m pip install torch torchvision"
        said = f"{missing[1]} is missing"
    elif status == 124:
        cure = "run `medtut doctor` once more: a first import reads many files"
        said = last
    return Check("torch_pair", "failure", said, cure)


def device_kind(facts: Facts) -> str:
    """Return "cuda", "mps", "cpu", or "none" when torch cannot say."""
    return (_told(facts, "medtut-device") or ["none"])[0]


def _told(facts: Facts, mark: str) -> list[str]:
    """Return the words the probe printed after a mark, none if it did not get there."""
    match = re.search(rf"{mark} (.*)", facts.probe()[1])
    return match[1].split() if match else []


def check_device(facts: Facts) -> Check:
    """Which device torch would use; a CPU is enough for the quick profile."""
    kind, *name = _told(facts, "medtut-device") or ["none"]
    cure = "first mend torch, named above; then run `medtut doctor` again"
    if kind == "none":
        return Check("device", "failure", "torch does not say", cure)
    more = " (enough for the quick profile)" if kind == "cpu" else ""
    return Check("device", "ok", f"{kind}: {' '.join(name)}{more}")


def check_memory(facts: Facts) -> Check:
    """Whether enough memory is free for the quick profile."""
    free = facts.memory_gb()
    if free >= MEMORY_GB:
        return Check("memory", "ok", f"{free:.1f} GB free")
    said = f"{free:.1f} GB free, the quick profile needs up to {MEMORY_GB:g} GB"
    cure = "close other programs and kernels, or run with --profile smoke"
    return Check("memory", "failure", said, cure)


def check_disk(facts: Facts) -> Check:
    """Whether cache and working folder have room."""
    places = {"cache": facts.cache_folder(), "working folder": Path.cwd()}
    free = {name: facts.free_gb(folder) for name, folder in places.items()}
    said = ", ".join(f"{gb:.1f} GB free at the {name}" for name, gb in free.items())
    short = [name for name, gb in free.items() if gb < DISK_GB]
    if not short:
        return Check("disk", "ok", said)
    cure = f"free {DISK_GB:g} GB there"
    if "cache" in short:
        cure += ", or set MEDTUT_CACHE to a folder on a larger disk"
    return Check("disk", "failure", said, cure)


def check_network(facts: Facts) -> Check:
    """Whether an official source answers; being offline is only a warning."""
    try:
        facts.reach()
    except OSError as error:
        reason = getattr(error, "reason", None) or error
        cure = (
            "the lessons run without it; for real images and weights connect once "
            "and run `medtut assets fetch all`"
        )
        return Check("network", "warning", f"{ADDRESS} not reached: {reason}", cure)
    return Check("network", "ok", f"{ADDRESS} answers")


def check_cache(facts: Facts) -> Check:
    """Whether the cache can be written."""
    from medtut.errors import MedtutError

    try:
        facts.prove_cache()
    except (MedtutError, OSError) as error:
        cure = "set MEDTUT_CACHE to a folder that you can write to"
        return Check("cache", "failure", str(error).splitlines()[0], cure)
    return Check("cache", "ok", "writable")


CHECKS: dict[str, Callable[[Facts], Check]] = {
    name: globals()[f"check_{name}"] for name in CHECK_NAMES
}
_STYLE = {"ok": "green", "warning": "yellow", "failure": "red"}


@dataclass(frozen=True)
class DoctorReport:
    """What the checks said.

    Attributes
    ----------
    checks : tuple of Check
        In the order of `CHECKS`.
    code : str
        Short result code, see `decode`.
    """

    checks: tuple[Check, ...]
    code: str

    @property
    def exit_code(self) -> int:
        """1 when a check failed; a warning alone is 0."""
        return int(any(one.status == "failure" for one in self.checks))

    def to_text(self) -> str:
        """Plain text: one line per check, the cure below it."""
        lines = []
        for one in self.checks:
            lines.append(f"{one.status:8}{one.name:12}{one.message}")
            if one.cure:
                lines.append(f"{'':8}cure: {one.cure}")
        return "\n".join([*lines, f"Result code: {self.code}"])

    __str__ = __repr__ = to_text

    def render(self, console: Any | None = None) -> None:
        """Print with rich."""
        from rich.console import Console
        from rich.text import Text

        text = Text(self.to_text())
        for status, colour in _STYLE.items():
            text.highlight_regex(rf"(?m)^{status}\b", f"bold {colour}")
        (console or Console()).print(text, soft_wrap=True)


def run_doctor(
    facts: Facts | None = None, checks: Mapping[str, Callable[[Facts], Check]] = CHECKS
) -> DoctorReport:
    """Run all checks; a check that itself fails is reported, not raised."""
    from packaging.requirements import Requirement

    facts = facts or Facts()
    done = [_safely(name, check, facts) for name, check in checks.items()]
    try:
        device, python = device_kind(facts), facts.python()[1]
        needed = (Requirement(line) for line in facts.requirements())
        versions = {r.name: facts.version(r.name) for r in needed if not r.marker}
    except Exception:  # the checks above have said what is wrong
        device, versions, python = "none", {}, sys.version_info[1]
    code = encode({one.name: one.status for one in done}, device, python, versions)
    return DoctorReport(tuple(done), code)


def _safely(name: str, check: Callable[[Facts], Check], facts: Facts) -> Check:
    try:
        return check(facts)
    except Exception as error:
        said = f"the check itself failed: {type(error).__name__}: {error}"
        return Check(name, "failure", said.splitlines()[0], _CONTINUE)
