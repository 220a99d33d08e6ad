"""What an exercise shows: one object, three forms (text, HTML, data)."""

from __future__ import annotations

import html
from dataclasses import dataclass, field
from typing import Any

OUTCOME_MIME = "application/vnd.medtut.outcome+json"

# Okabe-Ito colours; the words carry the meaning, the colour only repeats it.
_COLOURS = {
    "correct": "#009E73",
    "incorrect": "#D55E00",
    "misconception": "#CC79A7",
    "not attempted": "#999999",
    "card": "#0072B2",
    "hint": "#E69F00",
    "solution": "#56B4E9",
}
_MARKS = {
    "correct": "✓",
    "incorrect": "✗",
    "misconception": "≠",
    "not attempted": "…",
}


def _shell() -> Any | None:
    """Return the running IPython shell, or None in plain Python."""
    try:
        from IPython import get_ipython
    except ImportError:  # IPython is there wherever a notebook is
        return None
    return get_ipython()


@dataclass
class Card:
    """Something to show once: in a notebook as HTML, elsewhere as text.

    Attributes
    ----------
    kind : str
        "card", "hint", "solution" or one of the four outcomes; picks the colour.
    title : str
        First line.
    body : str
        Plain text; blank lines separate paragraphs.
    code : str
        Source to show below the body, or "".
    """

    kind: str
    title: str
    body: str = ""
    code: str = ""
    _shown_in: int | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def text(self) -> str:
        """The plain form."""
        return "\n\n".join(part for part in (self.title, self.body, self.code) if part)

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        colour = _COLOURS.get(self.kind, _COLOURS["card"])
        parts = [f"<p style='margin:0'><strong>{html.escape(self.title)}</strong></p>"]
        parts += [
            "<p style='margin:.4em 0 0'>"
            + html.escape(paragraph).replace("\n", "<br>")
            + "</p>"
            for paragraph in self.body.split("\n\n")
            if paragraph
        ]
        if self.code:
            parts.append(
                "<pre style='margin:.4em 0 0'><code>"
                + html.escape(self.code)
                + "</code></pre>"
            )
        style = f"border-left:4px solid {colour};padding:.4em .8em;margin:.3em 0"
        return f"<div style='{style}'>{''.join(parts)}</div>"

    def data(self) -> dict[str, Any]:
        """Machine-readable extras for the notebook file, by MIME type."""
        return {}

    def _ipython_display_(self) -> None:
        # `check` shows its outcome itself, so that it is seen on any line of a cell;
        # when it is also the cell's last expression it must not appear twice.
        shell = _shell()
        now = getattr(shell, "execution_count", -1)
        if self._shown_in == now:
            return
        self._shown_in = now
        from IPython.display import display

        bundle = {"text/plain": self.text, "text/html": self._repr_html_()}
        display({**bundle, **self.data()}, raw=True)

    def show(self) -> None:
        """Show the card now, if a notebook is listening."""
        if _shell() is not None:
            self._ipython_display_()


@dataclass(repr=False)
class Outcome(Card):
    """What a check found.

    Attributes
    ----------
    status : str
        "correct", "incorrect", "misconception" or "not attempted".
    exercise : str
        Id of the exercise, such as "01.1".
    misconception : str or None
        Its name, when the answer is a known wrong idea.
    """

    exercise: str = ""
    misconception: str | None = None

    @property
    def status(self) -> str:
        """One of the four outcomes."""
        return self.kind

    @property
    def message(self) -> str:
        """What was seen, without the headline."""
        return self.body

    @classmethod
    def of(
        cls, exercise: str, status: str, message: str, name: str | None = None
    ) -> Outcome:
        """Build an outcome with its headline."""
        named = f" – {name}" if name else ""
        title = f"{_MARKS[status]} Exercise {exercise}: {status}{named}"
        return cls(status, title, message, exercise=exercise, misconception=name)

    def data(self) -> dict[str, Any]:
        return {
            OUTCOME_MIME: {
                "exercise": self.exercise,
                "status": self.status,
                "misconception": self.misconception,
            }
        }
