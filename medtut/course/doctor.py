"""``medtut doctor``: can this machine run the course, and if not, what helps.

Every check returns one line, and one line of cure when something is wrong. The result
fits in a short code that a workshop host can collect and decode; it holds what the
checks said, device kind, Python and a checksum of versions, and nothing about who or
where.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import Requirement

from medtut.course.doctor_code import CHECK_NAMES, CodeError, Decoded, decode, encode
from medtut.course.doctor_facts import ADDRESS, Facts
from medtut.errors import MedtutError

__all__ = [
    "CHECKS", "Check", "CodeError", "Decoded", "DoctorReport", "Facts", "decode",
    "run_doctor",
]  # fmt: skip

Status = Literal["ok", "warning", "failure"]

PYTHON = (3, 11)
MEMORY_GB = 6.0
DISK_GB = 3.0

_CONTINUE = "run `python -m pip install -e .` in the course folder"


@dataclass(frozen=True)
class Check:
    """Result of one check; `cure` is one line and stands wherever status is not ok."""

    name: str
    status: Status
    message: str
    cure: str = ""


def _check(name: str, case: str, /, **words: Any) -> Check:
    """Return what ``doctor.json`` holds for a case: status, message and perhaps cure.

    JSON, as the doctor has to speak where packages are missing.
    """
    texts = json.loads(Path(__file__).with_suffix(".json").read_text("utf-8"))
    status, *said = texts[name][case]
    return Check(name, status, *(text.format(**words) for text in said))


def check_python(facts: Facts) -> Check:
    """Whether Python is new enough."""
    said, need = (".".join(map(str, v)) for v in (facts.python(), PYTHON))
    case = "new" if facts.python()[:2] >= PYTHON else "old"
    return _check("python", case, said=said, need=need)


def check_packages(facts: Facts) -> Check:
    """Whether every required package is there in a version within its range."""
    every = map(Requirement, facts.requirements())
    needed = [r for r in every if not r.marker or r.marker.evaluate({"extra": ""})]
    faults = {}
    for one in needed:
        wanted, version = f'"{one.name}{one.specifier}"', facts.version(one.name)
        if version is None:
            faults[wanted] = f"{one.name} is missing"
        elif not one.specifier.contains(version, prereleases=True):
            faults[wanted] = f"{one.name} is {version}, needs {one.specifier}"
    said, names = "; ".join(faults.values()), " ".join(faults)
    case = "faults" if faults else "all"
    return _check("packages", case, count=len(needed), said=said, names=names)


def check_torch_pair(facts: Facts) -> Check:
    """Whether torch and torchvision are built for each other."""
    status, _, err = facts.probe()
    last = "".join(err.strip().splitlines()[-1:]).strip() or f"exit status {status}"
    if status == 0 and (pair := _told(facts, "medtut-pair")):
        here = facts.version("torch") or "0"
        asked = map(Requirement, facts.requires("torchvision"))
        asked = [r.specifier for r in asked if r.name == "torch" and not r.marker]
        fits = all(one.contains(here, prereleases=True) for one in asked)
        case = "fits" if fits else "other"
        return _check("torch_pair", case, pair=pair, here=here, asked=asked)
    if "torchvision::nms does not exist" in err:
        return _check("torch_pair", "mismatch")
    if missing := re.search(r"No module named '(torch|torchvision)'", err):
        return _check("torch_pair", "missing", name=missing[1])
    return _check("torch_pair", "slow" if status == 124 else "broken", last=last)


def device_kind(facts: Facts) -> str:
    """Return "cuda", "mps", "cpu", or "none" when torch cannot say."""
    return (_told(facts, "medtut-device") or ["none"])[0]


def _told(facts: Facts, mark: str) -> list[str]:
    """Return the words the probe printed after a mark, none if it did not get there."""
    match = re.search(rf"{mark} (.*)", facts.probe()[1])
    return match[1].split() if match else []


def check_device(facts: Facts) -> Check:
    """Which device torch would use; a CPU is enough for the quick profile."""
    name = " ".join(_told(facts, "medtut-device")[1:])
    return _check("device", device_kind(facts), name=name)


def check_memory(facts: Facts) -> Check:
    """Whether enough memory is free for the quick profile."""
    free = facts.memory_gb()
    case = "enough" if free >= MEMORY_GB else "short"
    return _check("memory", case, free=free, need=MEMORY_GB)


def check_disk(facts: Facts) -> Check:
    """Whether cache and working folder have room."""
    places = {"cache": facts.cache_folder(), "working folder": Path.cwd()}
    free = {name: facts.free_gb(folder) for name, folder in places.items()}
    said = ", ".join(f"{gb:.1f} GB free at the {name}" for name, gb in free.items())
    # The cache comes first: its cure holds for the working folder too.
    short = [name for name, gb in free.items() if gb < DISK_GB] or ["none"]
    return _check("disk", short[0], said=said, need=DISK_GB)


def check_network(facts: Facts) -> Check:
    """Whether an official source answers; being offline is only a warning."""
    try:
        facts.reach()
    except OSError as error:
        reason = getattr(error, "reason", None) or error
        return _check("network", "offline", address=ADDRESS, reason=reason)
    return _check("network", "online", address=ADDRESS)


def check_cache(facts: Facts) -> Check:
    """Whether the cache can be written."""
    try:
        facts.prove_cache()
    except (MedtutError, OSError) as error:
        return _check("cache", "refused", reason=str(error).splitlines()[0])
    return _check("cache", "writable")


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
            cure = f"\n{'':8}cure: {one.cure}" if one.cure else ""
            lines.append(f"{one.status:8}{one.name:12}{one.message}{cure}")
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
