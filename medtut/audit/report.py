"""What an audit says: findings with numbers, as text, HTML and dict."""

from __future__ import annotations

import html
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Severity = Literal["error", "warning"]
_COLOURS = {"error": "#D55E00", "warning": "#E69F00"}
_STYLE = {"error": "red", "warning": "yellow"}


@dataclass(frozen=True)
class Finding:
    """One thing a detector found.

    Attributes
    ----------
    detector : str
        Name of the detector.
    severity : {"error", "warning"}
        "error" is wrong whatever was meant; "warning" is wrong nearly always.
    where : str
        The modules or tensors, by name.
    message : str
        What was seen and what it means.
    numbers : dict
        What was measured.
    """

    detector: str
    severity: Severity
    where: str
    message: str
    numbers: dict[str, Any] = field(default_factory=dict)

    @property
    def numbers_text(self) -> str:
        """The numbers on one line."""
        said = []
        for name, value in self.numbers.items():
            number = f"{value:.4g}" if isinstance(value, float) else f"{value}"
            said.append(f"{name.replace('_', ' ')} {number}")
        return ", ".join(said)


@dataclass(frozen=True)
class Report:
    """All findings of an audit.

    Attributes
    ----------
    findings : tuple of Finding
        Empty when nothing was found.
    notes : tuple of str
        What could not be checked, or was assumed; they do not change the exit code.
    checked : tuple of str
        The detectors that ran.
    """

    findings: tuple[Finding, ...] = ()
    notes: tuple[str, ...] = ()
    checked: tuple[str, ...] = ()

    @property
    def exit_code(self) -> int:
        """1 when there is a finding, 0 when there is none."""
        return 1 if self.findings else 0

    def of(self, detector: str) -> list[Finding]:
        """Return the findings of one detector."""
        return [one for one in self.findings if one.detector == detector]

    @property
    def headline(self) -> str:
        """How many findings, from how many detectors."""
        count = len(self.findings)
        plural = "" if count == 1 else "s"
        return (
            f"{count or 'no'} finding{plural} from {len(self.checked)} detectors "
            f"({', '.join(self.checked)})"
        )

    def to_text(self) -> str:
        """Plain text, one block per finding."""
        blocks = [f"Audit: {self.headline}"]
        for one in self.findings:
            block = f"[{one.severity}] {one.detector}: {one.where}\n  {one.message}"
            if one.numbers:
                block += f"\n  {one.numbers_text}"
            blocks.append(block)
        blocks += [f"note: {note}" for note in self.notes]
        return "\n\n".join(blocks)

    __str__ = __repr__ = to_text

    def render(self, console: Any | None = None) -> None:
        """Print with rich."""
        from rich.console import Console
        from rich.text import Text

        text = Text(self.to_text())
        text.highlight_regex("^Audit:.*", "bold red" if self.findings else "bold green")
        for severity, colour in _STYLE.items():
            text.highlight_regex(rf"(?m)^\[{severity}\]", f"bold {colour}")
        (console or Console()).print(text)

    def _repr_html_(self) -> str:
        say = html.escape
        items = "".join(
            f"<li style='border-left:4px solid {_COLOURS[one.severity]};"
            "padding-left:.6em;list-style:none;margin:.4em 0'>"
            f"<strong>{one.severity}: {say(one.detector)}</strong> "
            f"<code>{say(one.where)}</code><br>{say(one.message)}"
            f"<br><small>{say(one.numbers_text)}</small></li>"
            for one in self.findings
        )
        notes = "".join(f"<p><em>note: {say(note)}</em></p>" for note in self.notes)
        return (
            f"<div><p><strong>Audit: {say(self.headline)}</strong></p>"
            f"<ul style='padding-left:0'>{items}</ul>{notes}</div>"
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {
            "exit_code": self.exit_code,
            "checked": list(self.checked),
            "findings": [asdict(one) for one in self.findings],
            "notes": list(self.notes),
        }
