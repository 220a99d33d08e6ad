"""Checks on a notebook file; each returns what is wrong as a list of sentences."""

from __future__ import annotations

import html.parser
import io
import re
import token
import tokenize
from pathlib import Path
from typing import Any

MAX_BYTES = 1_000_000
MAX_CELL_LINES = 25
CELLS = (35, 60)
WORDS_PER_LINE = (6.0, 15.0)
LOCAL = re.compile(r"/home/\w|/root/|/Users/\w|[A-Z]:\\+Users|/tmp/\w")
# A base64 picture may spell a path by chance.
BASE64 = re.compile(r"[A-Za-z0-9+/=]{200,}")
MARKDOWN_IMAGE = re.compile(r"!\[(?P<alt>[^\]]*)\]\((?P<to>[^)]*)\)")
PLUMBING = re.compile(r"<!-- medtut:(\w+) -->.*?<!-- /medtut:\1 -->|<[^>]+>", re.DOTALL)


class _Images(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.without = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "img" and not (dict(attrs).get("alt") or "").strip():
            self.without += 1


def executed_in_order(nb: Any) -> list[str]:
    """Execution counts are 1, 2, 3, ... over the code cells that hold code."""
    counts = [
        cell.execution_count
        for cell in nb.cells
        if cell.cell_type == "code" and cell.source.strip()
    ]
    right = list(range(1, len(counts) + 1))
    return [] if counts == right else [f"execution counts are {counts}"]


def no_errors(nb: Any) -> list[str]:
    """No error output, in cells or in saved widgets."""
    from medtut.course.nbfile import find_errors

    return [str(error) for error in find_errors(nb)]


def no_widget_state(nb: Any) -> list[str]:
    """GitHub shows "Invalid Notebook" for widget metadata."""
    return ["metadata.widgets is stored"] if "widgets" in nb.metadata else []


def small(path: Path) -> list[str]:
    """Below one megabyte."""
    size = path.stat().st_size
    return [] if size < MAX_BYTES else [f"{size / 1e6:.2f} MB"]


def short_cells(nb: Any) -> list[str]:
    """No code cell is longer than a screen."""
    return [
        f"cell {number} has {lines} lines"
        for number, cell in enumerate(nb.cells, start=1)
        if cell.cell_type == "code"
        and (lines := len(cell.source.splitlines())) > MAX_CELL_LINES
    ]


def number_of_cells(nb: Any) -> list[str]:
    """Between 35 and 60."""
    count = len(nb.cells)
    return [] if CELLS[0] <= count <= CELLS[1] else [f"{count} cells"]


def words_per_line(nb: Any) -> float:
    """Words of Markdown per line of code that holds more than a comment."""
    words = lines = 0
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            words += len(PLUMBING.sub(" ", cell.source).split())
        elif cell.cell_type == "code":
            lines += code_lines(cell.source)
    return words / max(lines, 1)


def enough_text(nb: Any) -> list[str]:
    """Six to fifteen words of text for a line of code."""
    ratio = words_per_line(nb)
    inside = WORDS_PER_LINE[0] <= ratio <= WORDS_PER_LINE[1]
    return [] if inside else [f"{ratio:.1f} words per line of code"]


def code_lines(source: str) -> int:
    """Count lines that hold code: no blank, comment or docstring-only lines."""
    found: set[int] = set()
    skip = {
        token.INDENT,
        token.DEDENT,
        token.NEWLINE,
        tokenize.NL,
        tokenize.COMMENT,
        token.ENDMARKER,
        tokenize.ENCODING,
    }
    statement_start = True
    # An IPython magic is a line of code that Python cannot read.
    source = re.sub(r"^(\s*)[%!].*$", r"\1pass", source, flags=re.MULTILINE)
    for item in tokenize.generate_tokens(io.StringIO(source).readline):
        if item.type in {token.NEWLINE, token.INDENT, token.DEDENT, tokenize.NL}:
            statement_start = True
            continue
        if item.type in skip:
            continue
        alone = item.type == token.STRING and statement_start
        if not alone:
            found.update(range(item.start[0], item.end[0] + 1))
        statement_start = False
    return len(found)


def alt_text(nb: Any) -> list[str]:
    """Every picture says what it shows, in Markdown, HTML and outputs."""
    found = []
    for number, cell in enumerate(nb.cells, start=1):
        if cell.cell_type == "markdown":
            bare = [
                m["to"]
                for m in MARKDOWN_IMAGE.finditer(cell.source)
                if not m["alt"].strip()
            ]
            found += [f"cell {number}: image {to!r} without alt text" for to in bare]
            if _without_alt(cell.source):
                found.append(f"cell {number}: <img> without alt text")
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if _without_alt("".join(data.get("text/html", ""))):
                found.append(f"cell {number}: output <img> without alt text")
            pictures = [kind for kind in data if kind.startswith("image/")]
            if pictures and "text/html" not in data:
                found.append(f"cell {number}: {pictures[0]} output, use lesson.show")
    return found


def no_local_paths(nb: Any) -> list[str]:
    """Nothing of the machine that ran it."""
    found = []
    for number, cell in enumerate(nb.cells, start=1):
        for text in (cell.source, str(cell.get("outputs", ""))):
            match = LOCAL.search(BASE64.sub("", text))
            if match:
                found.append(f"cell {number} shows {match.group()!r}")
    return found


def stable_ids(nb: Any, slug: str) -> list[str]:
    """Cell ids are those the build makes."""
    import copy

    from tools.percent import set_ids

    again = copy.deepcopy(nb)
    set_ids(again, slug)
    same = [c["id"] for c in again.cells] == [c.get("id") for c in nb.cells]
    return [] if same else ["cell ids are not those of make notebooks"]


def _without_alt(markup: str) -> bool:
    parser = _Images()
    parser.feed(markup)
    return parser.without > 0
