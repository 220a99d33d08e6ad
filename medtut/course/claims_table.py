"""Judged claims, as text, HTML or a dict."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from medtut.course.render import fill

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

_STORED = {"id", "source", "statement", "expectation"}


@dataclass(frozen=True)
class Row:
    """One judged claim; `measured` is None when nothing was measured."""

    claim: Claim
    verdict: Verdict
    measured: tuple[tuple[str, float], ...]
    detail: str

    @property
    def source(self) -> str:
        """Who said it, and where."""
        return f"{self.claim.source.citation}, {self.claim.source.where}"

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
                    **row.claim.model_dump(include=_STORED),
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
            blocks.append(
                f"[{row.verdict}] {row.claim.statement}\n"
                f"  source:   {row.source}\n"
                f"  expected: {row.claim.expectation}\n"
                f"  measured: {row.measured_text or '–'} ({row.detail})"
            )
        return "\n\n".join(blocks)

    def __str__(self) -> str:
        return self.to_text()

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return fill("claims.html", colours=_COLOURS, **vars(self))
