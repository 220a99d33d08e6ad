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


def _checks(payload: bytes) -> dict[str, str]:
    bits, last = int.from_bytes(payload[:2], "big"), len(CHECK_NAMES) - 1
    return {n: STATUSES[bits >> 2 * (last - k) & 3] for k, n in enumerate(CHECK_NAMES)}


def _write(payload: bytes) -> str:
    """Return the code of five bytes; word and last letters follow from them."""
    word = "FAIL" if "failure" in _checks(payload).values() else "OK"
    ten_bits = struct.pack(">H", (zlib.crc32(payload) & 0x3FF) << 6)
    letters = base64.b32encode(payload + ten_bits).decode("ascii")
    return f"MT1-{word}-{letters[:8]}-{letters[8:10]}"


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
        raise CodeError(f"{code!r} is no result code, as MT1-OK-AAAAFC3K-QF is one.")
    body, letters = (text.translate(_LOOK_ALIKE) for text in match.group(2, 3))
    payload = base64.b32decode(body)
    if _write(payload) != f"{match[1]}{body}-{letters}":
        raise CodeError(f"{code!r} was mistyped: its parts do not fit each other.")
    device, python = DEVICES[payload[2] >> 6], f"3.{payload[2] & 63}"
    return Decoded(_checks(payload), device, python, payload[3:].hex())
