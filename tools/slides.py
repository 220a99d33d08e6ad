"""``make slides``: decks with the numbers and figures of the executed lesson.

A deck ``slides/01_lora_math.md`` names figures as ``figures/01_<name>.png`` and numbers
as ``{{metric:format}}``. ``python -m tools.slides`` copies the figures from the last
quick run, puts in the numbers of ``notebooks/metrics/01_lora_math.json`` and leaves
``slides/.build/01_lora_math.md`` for marp, pictures inside, nothing to fetch.
"""

from __future__ import annotations

import base64
import hashlib
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medtut.course.files import repository_root
from medtut.course.report import lookup
from medtut.errors import MedtutError
from medtut.files import read_json, write_bytes, write_text

PLACE = re.compile(r"\{\{ *(?P<key>[\w.]+) *: *(?P<form>[^{}\s]+) *\}\}")
IMAGE = re.compile(r"!\[(?P<alt>[^\]]*)\]\((?P<to>[^)\s]+)\)")
FIGURE = re.compile(r"figures/(?P<number>\d\d)_(?P<name>[\w-]+)\.png")
COMMENT = re.compile(r"<!--(.*?)-->", re.DOTALL)
# Words in a picture's alternative text that tell marp its size or place.
SIZES = re.compile(r"\b(?:bg|left|right|fit|contain|cover|[wh]:\S+|\S+%)(?=\s|$)")
FRONT = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)
SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Slide:
    """One slide: what is shown, and what the speaker reads."""

    text: str
    notes: str

    @property
    def title(self) -> str:
        """The first heading, "" if there is none."""
        match = re.search(r"^#+ (.+)$", self.text, re.MULTILINE)
        return match[1].strip() if match else ""


def slides(deck: str) -> list[Slide]:
    """Split a deck at its rulers; comments that are no marp directives are notes."""
    parts = re.split(r"^---$", FRONT.sub("", deck), flags=re.MULTILINE)
    return [
        Slide(COMMENT.sub("", part).strip(), "\n".join(_notes(part))) for part in parts
    ]


def figures(deck: str) -> list[tuple[str, str]]:
    """Return ``(alternative text, path)`` of every picture, size words left out."""
    return [
        (" ".join(SIZES.sub(" ", match["alt"]).split()), match["to"])
        for match in IMAGE.finditer(deck)
    ]


def fill_numbers(deck: str, metrics: dict[str, Any], name: str = "deck") -> str:
    """Put recorded numbers in place of ``{{metric:format}}``.

    A dot goes down into a nested metric. The format is Python's (``.3f``, ``.1%``),
    or ``sci`` for 1.2 × 10⁻³.

    Raises
    ------
    MedtutError
        A metric that was not recorded, a format that does not fit it, or a
        placeholder that cannot be read.
    """

    def number(match: re.Match[str]) -> str:
        value = lookup(metrics, match["key"])
        if value is None:
            raise MedtutError(f"{name}: the lesson has recorded no {match['key']!r}")
        try:
            return _format(value, match["form"])
        except (TypeError, ValueError) as error:
            raise MedtutError(f"{name}: {match.group()}: {error}") from None

    text = PLACE.sub(number, deck)
    left = re.search(r"\{\{[^}\n]*\}?\}?", text)
    if left:
        raise MedtutError(f"{name}: {left.group()!r} is not {{{{metric:format}}}}")
    return text


def sync_figures(deck: Path, root: Path | None = None) -> list[Path]:
    """Copy a deck's figures from the last quick run; without one keep what is there.

    Raises
    ------
    MedtutError
        A figure that neither the run nor ``slides/figures`` has.
    """
    root = root or repository_root()
    run = root / "build" / "quick" / deck.stem / "figures"
    paths = []
    for _, to in figures(deck.read_text(encoding="utf-8")):
        match = FIGURE.fullmatch(to)
        if match is None or match["number"] != deck.stem[:2]:
            raise MedtutError(
                f"{deck.name}: {to} is not figures/{deck.stem[:2]}_<name>.png"
            )
        path, new = deck.parent / to, run / f"{match['name']}.png"
        if new.is_file():
            write_bytes(path, new.read_bytes())
        elif not path.is_file():
            raise MedtutError(
                f"{deck.name}: no figure {match['name']!r}; run the lesson first: "
                f"medtut run {deck.stem} --profile quick"
            )
        paths.append(path)
    return paths


def prepare(deck: Path, root: Path | None = None) -> str:
    """Return the deck as marp gets it: numbers and pictures inside, fingerprint on top.

    Raises
    ------
    MedtutError
        Numbers or figures are missing.
    """
    root = root or repository_root()
    stored = root / "notebooks" / "metrics" / f"{deck.stem}.json"
    result = read_json(stored)
    if not isinstance(result, dict):
        raise MedtutError(f"{deck.name}: no numbers in notebooks/metrics/{stored.name}")

    def inside(match: re.Match[str]) -> str:
        path = deck.parent / match["to"]
        if not path.is_file():
            raise MedtutError(f"{deck.name}: {match['to']} does not exist")
        data = base64.b64encode(path.read_bytes()).decode("ascii")
        return f"![{match['alt']}](data:image/png;base64,{data})"

    text = fill_numbers(
        deck.read_text(encoding="utf-8"), result.get("metrics", {}), deck.name
    )
    text = IMAGE.sub(inside, text)
    if not FRONT.match(text):
        raise MedtutError(f"{deck.name}: no front matter between --- and ---")
    theme = deck.with_name("theme.css").read_bytes()
    mark = hashlib.sha256(text.encode() + theme).hexdigest()[:16]
    # marp writes the description into HTML and PDF: a test reads the mark there.
    return text.replace("---\n", f"---\ndescription: Built from medtut-{mark}\n", 1)


def fingerprint(prepared: str) -> str:
    """Return the mark that a deck built from this text carries."""
    match = re.search(r"^description: .*(medtut-[0-9a-f]{16})$", prepared, re.MULTILINE)
    return match[1] if match else ""


def decks(root: Path | None = None) -> list[Path]:
    """Return the decks, in order."""
    return sorted(((root or repository_root()) / "slides").glob("[0-9]*.md"))


def main() -> None:
    """Prepare every deck for marp."""
    root = repository_root()
    build = root / "slides" / ".build"
    shutil.rmtree(build, ignore_errors=True)
    try:
        for deck in decks(root):
            sync_figures(deck, root)
            write_text(build / deck.name, prepare(deck, root))
            print(f"slides/.build/{deck.name}")
    except MedtutError as error:
        print(f"slides: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _notes(part: str) -> list[str]:
    found = [match[1].strip() for match in COMMENT.finditer(part)]
    return [text for text in found if not re.match(r"_?\w+:\s*\S+$", text)]


def _format(value: Any, form: str) -> str:
    if form != "sci":
        # A hyphen is shorter than a minus sign, and a line may break after it.
        return format(value, form).replace("-", "−")
    if value == 0:
        return "0"
    digits, power = f"{value:.1e}".split("e")
    return f"{digits} × 10{str(int(power)).translate(SUPERSCRIPT)}"


if __name__ == "__main__":
    main()
