"""Judged claims, as text, HTML or a dict."""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from medtut.course.claims import Claim

Verdict = Literal[
    "reproduced", "contradicted", "not at this scale", "not testable here"
]

_COLOURS = {
    "reproduced": "#009E73",
    "contradicted": "#D55E00",
    "not at this scale": "#0072B2",
    "not testable here": "#999999",
}


@dataclass(frozen=True)
class Row:
    """One judged claim; `measured` is None when nothing was measured."""

    claim: Claim
    verdict: Verdict
    measured: tuple[tuple[str, float], ...]
    detail: str

    @property
    def measured_text(self) -> str:
        """The numbers, in words."""
        return "; ".join(f"{name} = {value:.4g}" for name, value in self.measured)


@dataclass(frozen=True)
class ClaimTable:
    """All claims of a lesson with their verdicts, as text, HTML or a dict."""

    lesson: str
    profile: str
    rows: tuple[Row, ...]

    def verdicts(self) -> dict[str, str]:
        """Claim id to verdict."""
        return {row.claim.id: row.verdict for row in self.rows}

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {
            "lesson": self.lesson,
            "profile": self.profile,
            "claims": [
                {
                    "id": row.claim.id,
                    "source": row.claim.source.model_dump(),
                    "statement": row.claim.statement,
                    "expectation": row.claim.expectation,
                    "rules": [str(rule) for rule in row.claim.rules],
                    "measured": dict(row.measured),
                    "verdict": row.verdict,
                    "detail": row.detail,
                }
                for row in self.rows
            ],
        }

    def to_text(self) -> str:
        """One short block per claim."""
        blocks = [f"Reality check of {self.lesson}, profile {self.profile}"]
        for row in self.rows:
            source = row.claim.source
            blocks.append(
                f"[{row.verdict}] {row.claim.statement}\n"
                f"  source:   {source.citation}, {source.where}\n"
                f"  expected: {row.claim.expectation}\n"
                f"  measured: {row.measured_text or '–'} ({row.detail})"
            )
        return "\n\n".join(blocks)

    def __str__(self) -> str:
        return self.to_text()

    __repr__ = __str__

    def _repr_html_(self) -> str:
        head = "".join(
            f"<th scope='col' style='text-align:left'>{name}</th>"
            for name in ("Claim", "Expected before the run", "Measured", "Verdict")
        )
        body = "".join(self._html_row(row) for row in self.rows)
        caption = f"Reality check of {self.lesson}, profile {self.profile}"
        return (
            f"<table><caption>{html.escape(caption)}</caption>"
            f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        )

    @staticmethod
    def _html_row(row: Row) -> str:
        claim, say = row.claim, html.escape
        source = f"{claim.source.citation}, {claim.source.where}"
        measured = say(row.measured_text).replace("; ", "<br>") or "–"
        verdict = (
            f"<strong style='border-left:4px solid {_COLOURS[row.verdict]};"
            f"padding-left:.4em'>{row.verdict}</strong>"
        )
        cells = (
            f"{say(claim.statement)}<br><small>{say(source)}</small>",
            say(claim.expectation),
            f"{measured}<br><small>{say(row.detail)}</small>",
            verdict,
        )
        return (
            "<tr>"
            + "".join(f"<td style='text-align:left'>{cell}</td>" for cell in cells)
            + "</tr>"
        )
