"""The doctor's result code: eight characters of facts and two that catch typing errors.

``MT1-OK-AAAABCD2-XY``: five bytes in base32 – two bits for each of eight checks, device
and Python in one byte, two bytes that are equal where package versions are equal.
"""

from __future__ import annotations

import base64
import json
import re
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from medtut.errors import MedtutError

# The order is part of the result code: append, never reorder.
CHECK_NAMES = (
    "python", "packages", "torch_pair", "device", "memory", "disk", "network", "cache",
)  # fmt: skip
STATUSES = ("ok", "warning", "failure", "not run")
DEVICES = ("none", "cpu", "cuda", "mps")
_ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"
# Digits that base32 does not have, read as the letters they look like.
_LOOK_ALIKE = str.maketrans("018", "OIB")


class CodeError(MedtutError):
    """A result code that cannot be read."""


@dataclass(frozen=True)
class Decoded:
    """What a result code says.

    Attributes
    ----------
    checks : dict
        Check name to "ok", "warning", "failure" or "not run".
    device : str
        "cuda", "mps", "cpu" or "none".
    python : str
        "3.11".
    versions : str
        Four hexadecimal digits, equal where the package versions are equal.
    """

    checks: dict[str, str]
    device: str
    python: str
    versions: str

    @property
    def ok(self) -> bool:
        """Whether no check failed."""
        return "failure" not in self.checks.values()

    def to_text(self) -> str:
        """Plain text, for a host."""
        head = f"{'OK' if self.ok else 'FAIL'}: Python {self.python}, {self.device}"
        unlike = [f"{n}: {s}" for n, s in self.checks.items() if s != "ok"]
        said = ", ".join(unlike) or "all checks ok"
        return f"{head}, versions {self.versions}; {said}"

    __str__ = to_text


def _statuses(payload: bytes) -> list[str]:
    bits, places = int.from_bytes(payload[:2], "big"), range(len(CHECK_NAMES))
    return [STATUSES[bits >> 2 * k & 3] for k in reversed(places)]


def _write(payload: bytes) -> str:
    """Return the code of five bytes; word and last letters follow from them."""
    word = "FAIL" if "failure" in _statuses(payload) else "OK"
    body, sum_ = base64.b32encode(payload).decode("ascii"), zlib.crc32(payload)
    return f"MT1-{word}-{body}-{_ALPHABET[sum_ >> 5 & 31]}{_ALPHABET[sum_ & 31]}"


def encode(
    statuses: Mapping[str, str],
    device: str,
    python_minor: int,
    versions: Mapping[str, str | None],
) -> str:
    """Return the code of a result; see `Decoded` for what goes in."""
    bits = 0
    for name in CHECK_NAMES:
        bits = bits << 2 | STATUSES.index(statuses.get(name, "not run"))
    machine = DEVICES.index(device) << 6 | min(python_minor, 63)
    listed = json.dumps(dict(versions), sort_keys=True).encode("utf-8")
    return _write(struct.pack(">HBH", bits, machine, zlib.crc32(listed) & 0xFFFF))


def decode(code: str) -> Decoded:
    """Read a result code; case, spaces and 0/O, 1/I, 8/B do not matter.

    Raises
    ------
    CodeError
        If it is no such code, or was mistyped.
    """
    plain = "".join(code.split()).upper()
    match = re.fullmatch(r"(MT1-(?:OK|FAIL)-)([A-Z0-8]{8})-([A-Z0-8]{2})", plain)
    if match is None:
        raise CodeError(
            f"{code!r} is no result code; one looks like MT1-OK-AAAAFC3K-QF."
        )
    body, letters = (text.translate(_LOOK_ALIKE) for text in match.group(2, 3))
    payload = base64.b32decode(body)
    if _write(payload) != f"{match[1]}{body}-{letters}":
        raise CodeError(f"{code!r} was mistyped: its parts do not fit each other.")
    checks, machine = (
        dict(zip(CHECK_NAMES, _statuses(payload), strict=True)),
        payload[2],
    )
    device, python = DEVICES[machine >> 6], f"3.{machine & 63}"
    return Decoded(checks, device, python, payload[3:].hex())
