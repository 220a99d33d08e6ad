"""The doctor's result code: eight characters of facts and two that catch typing errors.

``MT1-OK-AAAABCD2-XY``: five bytes in base32 – two bits for each of eight checks, device
and Python in one byte, two bytes that are equal where package versions are equal.
"""

from __future__ import annotations

import base64
import json
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from medtut.errors import MedtutError

# The order is part of the result code: append, never reorder.
CHECK_NAMES = (
    "python",
    "packages",
    "torch_pair",
    "device",
    "memory",
    "disk",
    "network",
    "cache",
)
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


def _check_letters(payload: bytes) -> str:
    value = zlib.crc32(payload) & 0x3FF
    return _ALPHABET[value >> 5] + _ALPHABET[value & 31]


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
    payload = bits.to_bytes(2, "big") + bytes([machine])
    payload += (zlib.crc32(listed) & 0xFFFF).to_bytes(2, "big")
    word = "FAIL" if "failure" in statuses.values() else "OK"
    body = base64.b32encode(payload).decode("ascii")
    return f"MT1-{word}-{body}-{_check_letters(payload)}"


def decode(code: str) -> Decoded:
    """Read a result code; case, spaces and 0/O, 1/I, 8/B do not matter.

    Raises
    ------
    CodeError
        If it is no such code, or was mistyped.
    """
    match = re.fullmatch(
        r"MT1-(OK|FAIL)-(.{8})-(..)", "".join(code.split()).upper(), re.DOTALL
    )
    if match is None:
        raise CodeError(
            f"{code!r} is no result code; one looks like MT1-OK-AAAAFC3K-QF."
        )
    word, body, letters = (text.translate(_LOOK_ALIKE) for text in match.groups())
    try:
        payload = base64.b32decode(body)
    except ValueError:
        payload = b""
    if len(payload) != 5 or _check_letters(payload) != letters:
        raise CodeError(f"{code!r} was mistyped: its last two letters do not fit.")
    bits, machine = int.from_bytes(payload[:2], "big"), payload[2]
    values = [bits >> 2 * k & 3 for k in reversed(range(len(CHECK_NAMES)))]
    decoded = Decoded(
        dict(zip(CHECK_NAMES, (STATUSES[v] for v in values), strict=True)),
        DEVICES[machine >> 6],
        f"3.{machine & 63}",
        payload[3:].hex(),
    )
    if decoded.ok != (word == "OK"):
        raise CodeError(f"{code!r} was mistyped: {word} does not fit the rest.")
    return decoded
