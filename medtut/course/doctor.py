"""``medtut doctor``: can this machine run the course, and if not, what helps.

Every check returns one line, and one line of cure when something is wrong. The result
fits in a short code that a workshop host can collect and decode; it holds what the
checks said, device kind, Python and a checksum of versions, and nothing about who or
where.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from medtut.course.doctor_code import CodeError, Decoded, decode, encode
from medtut.course.doctor_facts import ADDRESS, Facts

__all__ = [
    "CHECKS",
    "Check",
    "CodeError",
    "Decoded",
    "DoctorReport",
    "Facts",
    "decode",
    "run_doctor",
]

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
    version = facts.python()
    said = ".".join(map(str, version))
    if version[:2] >= PYTHON:
        return Check("python", "ok", said)
    need = ".".join(map(str, PYTHON))
    cure = f"install Python {need} or newer and make the environment again: make env"
    return Check("python", "failure", f"{said}, needs {need} or newer", cure)


def check_packages(facts: Facts) -> Check:
    """Whether every required package is there in a version within its range."""
    from packaging.requirements import Requirement

    wanted, faults, count = [], [], 0
    for line in facts.requirements():
        one = Requirement(line)
        if one.marker and not one.marker.evaluate({"extra": ""}):
            continue
        count += 1
        version = facts.version(one.name)
        if version is None:
            faults.append(f"{one.name} is missing")
        elif not one.specifier.contains(version, prereleases=True):
            faults.append(f"{one.name} is {version}, needs {one.specifier}")
        else:
            continue
        wanted.append(f'"{one.name}{one.specifier}"')
    if not faults:
        return Check("packages", "ok", f"all {count} within their ranges")
    cure = f"python -m pip install {' '.join(wanted)}"
    return Check("packages", "failure", "; ".join(faults), cure)


def check_torch_pair(facts: Facts) -> Check:
    """Whether torch and torchvision are built for each other."""
    from packaging.requirements import Requirement

    status, out, err = facts.probe()
    if status == 0 and "medtut-pair" in out:
        torch_version = facts.version("torch") or "0"
        for line in facts.requires("torchvision"):
            one = Requirement(line)
            fits = one.specifier.contains(torch_version, prereleases=True)
            if one.name == "torch" and not one.marker and not fits:
                said = (
                    f"torchvision asks for torch {one.specifier}, not {torch_version}"
                )
                return Check("torch_pair", "failure", said, _REINSTALL)
        pair = out.split("medtut-pair", 1)[1].split()
        return Check("torch_pair", "ok", f"torch {pair[0]}, torchvision {pair[1]}")
    last = next((line for line in reversed(err.splitlines()) if line.strip()), "")
    if "torchvision::nms does not exist" in err:
        said = "torch and torchvision do not match (torchvision::nms does not exist)"
        return Check("torch_pair", "failure", said, _REINSTALL)
    for name in ("torch", "torchvision"):
        if f"No module named '{name}'" in err:
            cure = "python -m pip install torch torchvision"
            return Check("torch_pair", "failure", f"{name} is missing", cure)
    if status == 124:
        cure = "run `medtut doctor` once more: a first import reads many files"
        return Check("torch_pair", "failure", last, cure)
    said = f"importing them failed: {last.strip() or f'exit status {status}'}"
    return Check("torch_pair", "failure", said, _REINSTALL)


def device_kind(facts: Facts) -> str:
    """Return "cuda", "mps", "cpu", or "none" when torch cannot say."""
    out = facts.probe()[1]
    return (
        out.split("medtut-device", 1)[1].split()[0]
        if "medtut-device" in out
        else "none"
    )


def check_device(facts: Facts) -> Check:
    """Which device torch would use; a CPU is enough for the quick profile."""
    kind = device_kind(facts)
    if kind == "none":
        cure = "first mend torch, named above; then run `medtut doctor` again"
        return Check("device", "failure", "torch does not say", cure)
    line = facts.probe()[1].split("medtut-device", 1)[1].splitlines()[0]
    name = line.split(None, 1)[1]
    more = " (enough for the quick profile)" if kind == "cpu" else ""
    return Check("device", "ok", f"{kind}: {name}{more}")


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


# The order is part of the result code: append, never reorder.
CHECKS: dict[str, Callable[[Facts], Check]] = {
    "python": check_python,
    "packages": check_packages,
    "torch_pair": check_torch_pair,
    "device": check_device,
    "memory": check_memory,
    "disk": check_disk,
    "network": check_network,
    "cache": check_cache,
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

        console = console or Console()
        for one in self.checks:
            line = Text(f"{one.status:8}", style=f"bold {_STYLE[one.status]}")
            line.append(f"{one.name:12}", style="bold").append(one.message, "default")
            console.print(line, soft_wrap=True)
            if one.cure:
                console.print(Text(f"{'':8}cure: {one.cure}"), soft_wrap=True)
        console.print(Text(f"Result code: {self.code}", style="bold"), soft_wrap=True)

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        checks = [vars(one) for one in self.checks]
        return {"exit_code": self.exit_code, "code": self.code, "checks": checks}


def run_doctor(
    facts: Facts | None = None,
    checks: Mapping[str, Callable[[Facts], Check]] = CHECKS,
) -> DoctorReport:
    """Run all checks; a check that itself fails is reported, not raised."""
    facts = facts or Facts()
    done = [_safely(name, check, facts) for name, check in checks.items()]
    try:
        device = device_kind(facts)
        versions = _versions(facts)
        python = facts.python()[1]
    except Exception:  # the checks above have said what is wrong
        device, versions, python = "none", {}, sys.version_info[1]
    code = encode({one.name: one.status for one in done}, device, python, versions)
    return DoctorReport(tuple(done), code)


def _versions(facts: Facts) -> dict[str, str | None]:
    from packaging.requirements import Requirement

    needed = (Requirement(line) for line in facts.requirements())
    return {one.name: facts.version(one.name) for one in needed if not one.marker}


def _safely(name: str, check: Callable[[Facts], Check], facts: Facts) -> Check:
    try:
        return check(facts)
    except Exception as error:
        said = f"the check itself failed: {type(error).__name__}: {error}"
        return Check(name, "failure", said.splitlines()[0], _CONTINUE)
