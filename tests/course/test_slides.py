"""Decks: every number and figure comes from the lesson, and the built files say so."""

import html.parser
import json
import re
import shutil
import subprocess
import zlib
from pathlib import Path

import pytest

from medtut.errors import MedtutError
from tools import slides

ROOT = Path(__file__).parents[2]
DECKS = slides.decks(ROOT)
EVERY = pytest.mark.parametrize("deck", DECKS, ids=[deck.stem for deck in DECKS])
MARP = pytest.mark.skipif(shutil.which("marp") is None, reason="marp-cli is missing")
# What a browser would go and get by itself.
FETCHED = {"script": "src", "link": "href", "img": "src", "iframe": "src"}


class Page(html.parser.HTMLParser):
    """Collect what a page fetches, its slides, pictures and description."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.slides = 0
        self.bare_images = 0
        self.description = ""

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if tag in FETCHED:
            self.fetched.append(given.get(FETCHED[tag]) or "")
        self.slides += "data-marpit-svg" in given
        self.bare_images += tag == "img" and not (given.get("alt") or "").strip()
        if tag == "meta" and given.get("name") == "description":
            self.description = given.get("content") or ""


def remote(page: str) -> list[str]:
    """Return what a built page loads from elsewhere."""
    parser = Page()
    parser.feed(page)
    styles = re.findall(r"(?:url\(|@import)\s*['\"]?([^'\")\s;]+)", page)
    outside = re.compile(r"(https?:)?//", re.IGNORECASE)
    return [to for to in (*parser.fetched, *styles) if outside.match(to)]


def pdf_text(data: bytes) -> bytes:
    """Return a PDF with its compressed parts opened, as far as they can be."""
    parts = [data]
    for stream in re.findall(rb"stream\r?\n(.*?)endstream", data, re.DOTALL):
        try:
            parts.append(zlib.decompressobj().decompress(stream))
        except zlib.error:
            continue
    return b"\n".join(parts)


def built(deck: Path, suffix: str) -> Path:
    return deck.parent / "built" / f"{deck.stem}{suffix}"


def test_there_is_a_deck():
    assert DECKS


@EVERY
def test_slides_and_notes(deck):
    shown = slides.slides(deck.read_text(encoding="utf-8"))
    assert 12 <= len(shown) <= 18
    assert [s.title for s in shown if len(s.notes.split()) < 15] == []
    assert all(s.title for s in shown)
    assert len({s.title for s in shown}) == len(shown)


@EVERY
def test_numbers_come_from_the_lesson(deck):
    stored = ROOT / "notebooks" / "metrics" / f"{deck.stem}.json"
    text = deck.read_text(encoding="utf-8")
    metrics = json.loads(stored.read_text(encoding="utf-8"))["metrics"]
    assert len(slides.PLACE.findall(text)) >= 5
    filled = slides.fill_numbers(text, metrics)
    # A number with decimals that is typed, not filled in; arXiv numbers are names.
    typed = slides.PLACE.sub("", text).split("\n---\n", 1)[1]
    typed = re.sub(r"arXiv:\d+\.\d+", "", typed)
    assert re.findall(r"\d+\.\d+", typed) == []
    assert "{{" not in filled


@EVERY
def test_figures_exist_and_say_what_they_show(deck):
    shown = slides.figures(deck.read_text(encoding="utf-8"))
    assert shown
    for alt, to in shown:
        assert len(alt.split()) >= 4, to
        picture = (deck.parent / to).read_bytes()
        assert picture.startswith(b"\x89PNG"), to


@EVERY
def test_built_files_are_in_step(deck):
    prepared = slides.prepare(deck, ROOT)
    page = Page()
    text = built(deck, ".html").read_text(encoding="utf-8")
    page.feed(text)
    mark = slides.fingerprint(prepared)
    assert mark
    assert mark in page.description, "run make slides"
    pdf = built(deck, ".pdf").read_bytes()
    assert pdf.startswith(b"%PDF")
    # pdf-lib, which marp uses, writes text as UTF-16 in hexadecimal.
    assert mark.encode("utf-16-be").hex() in pdf_text(pdf).decode("latin-1").lower()
    assert page.slides == len(slides.slides(prepared))
    assert page.bare_images == 0


@EVERY
def test_built_page_needs_no_network(deck):
    text = built(deck, ".html").read_text(encoding="utf-8")
    assert remote(text) == []
    assert "{{" not in re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
    assert built(deck, ".html").stat().st_size < 3_000_000


def test_the_check_for_the_network_sees_each_kind():
    for planted in (
        '<script src="https://cdn.example/x.js"></script>',
        '<link rel="stylesheet" href="//fonts.example/x.css">',
        '<img src="http://example/x.png" alt="x">',
        "<style>@font-face { src: url('https://example/x.woff2') }</style>",
        '<style>@import "https://example/x.css";</style>',
    ):
        assert len(remote(planted)) == 1, planted
    assert remote('<svg xmlns="http://www.w3.org/2000/svg"></svg>') == []
    assert remote('<img src="data:image/png;base64,AA" alt="x">') == []


@pytest.fixture
def course(tmp_path):
    """Return a deck with one number and one figure, in a clone of its own."""
    from PIL import Image

    (tmp_path / "slides").mkdir()
    (tmp_path / "notebooks" / "metrics").mkdir(parents=True)
    run = tmp_path / "build" / "quick" / "07_x" / "figures"
    run.mkdir(parents=True)
    Image.new("RGB", (40, 20), "white").save(run / "line.png")
    for name in ("theme.css", "marp.config.json"):
        shutil.copy(ROOT / "slides" / name, tmp_path / "slides")
    metrics = {"score": 0.1234, "nested": {"8": 3}, "none": None}
    stored = tmp_path / "notebooks" / "metrics" / "07_x.json"
    stored.write_text(json.dumps({"metrics": metrics}), encoding="utf-8")
    deck = tmp_path / "slides" / "07_x.md"
    deck.write_text(
        "---\nmarp: true\ntheme: medtut\nmath: mathjax\n---\n\n# One {{score:.2f}}\n\n"
        "<!-- _class: title -->\n<!-- Say {{nested.8:d}}. -->\n\n---\n\n"
        "## Two $x^2$\n\n"
        "![w:300 h:20 bg A line goes up](figures/07_line.png)\n",
        encoding="utf-8",
    )
    return tmp_path


def both(deck, root):
    slides.sync_figures(deck, root)
    return slides.prepare(deck, root)


def test_prepare_fills_numbers_and_pictures(course):
    deck = course / "slides" / "07_x.md"
    assert slides.sync_figures(deck, course) == [deck.parent / "figures/07_line.png"]
    text = slides.prepare(deck, course)
    assert "# One 0.12" in text
    assert "Say 3." in text
    assert "(data:image/png;base64,iVBOR" in text
    first, second = slides.slides(deck.read_text(encoding="utf-8"))
    assert first.notes == "Say {{nested.8:d}}."
    assert second.title == "Two $x^2$"
    assert slides.figures(second.text) == [("A line goes up", "figures/07_line.png")]


def test_the_mark_follows_text_numbers_figures_and_theme(course):
    deck = course / "slides" / "07_x.md"
    slides.sync_figures(deck, course)

    def mark():
        return slides.fingerprint(slides.prepare(deck, course))

    seen = [mark()]
    assert mark() == seen[0]
    stored = course / "notebooks" / "metrics" / "07_x.json"
    for path, old, new in [
        (stored, b"0.1234", b"0.2"),
        (deck, b"## Two", b"## Second"),
        (course / "slides" / "theme.css", b"32px", b"33px"),
        (course / "slides" / "figures" / "07_line.png", b"IEND", b"IENE"),
    ]:
        path.write_bytes(path.read_bytes().replace(old, new))
        seen.append(mark())
    assert len(set(seen)) == 5


def test_figures_stay_when_the_lesson_was_not_run(course):
    deck = course / "slides" / "07_x.md"
    slides.sync_figures(deck, course)
    shutil.rmtree(course / "build")
    assert len(slides.sync_figures(deck, course)) == 1
    shutil.rmtree(course / "slides" / "figures")
    with pytest.raises(MedtutError, match="medtut run 07_x"):
        slides.sync_figures(deck, course)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("{{score:.2f}}", "{{scores:.2f}}", "no 'scores'"),
        ("{{score:.2f}}", "{{none:.2f}}", "no 'none'"),
        ("{{score:.2f}}", "{{score:d}}", "score:d"),
        ("{{score:.2f}}", "{{score}}", "is not {{metric:format}}"),
        ("07_line", "08_line", "is not figures/07_<name>.png"),
        ("---\nmarp", "marp", "no front matter"),
    ],
)
def test_mistakes_in_a_deck_are_refused(course, old, new, message):
    deck = course / "slides" / "07_x.md"
    slides.sync_figures(deck, course)
    text = deck.read_text(encoding="utf-8")
    deck.write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(MedtutError, match=re.escape(message)):
        both(deck, course)


def test_without_numbers_there_is_no_deck(course):
    deck = course / "slides" / "07_x.md"
    slides.sync_figures(deck, course)
    (course / "notebooks" / "metrics" / "07_x.json").unlink()
    with pytest.raises(MedtutError, match="no numbers"):
        slides.prepare(deck, course)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.00123, "1.2 × 10⁻³"), (0, "0"), (45678.0, "4.6 × 10⁴"), (1.0, "1.0 × 10⁰")],
)
def test_scientific_numbers(value, text):
    assert slides.fill_numbers("{{x:sci}}", {"x": value}) == text


def test_negative_numbers_have_a_minus_sign():
    assert slides.fill_numbers("{{x:+.2f}} {{x:.0e}}", {"x": -0.5}) == "−0.50 −5e−01"


@MARP
def test_marp_builds_a_page_that_stands_alone(course, monkeypatch):
    (course / "pyproject.toml").write_text('name = "medtut"\n', encoding="utf-8")
    monkeypatch.chdir(course)
    slides.main()
    command = [shutil.which("marp"), "--config-file", "slides/marp.config.json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=course)
    assert done.returncode == 0, done.stderr
    text = (course / "slides" / "built" / "07_x.html").read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    assert page.slides == 2
    assert page.description.startswith("Built from medtut-")
    assert remote(text) == []
    assert "mjx-container" in text
