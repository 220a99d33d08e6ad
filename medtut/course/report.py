"""``index.html``: a picture and the key numbers of every lesson that was run."""

from __future__ import annotations

import html
from pathlib import Path
from string import Template
from typing import Any

from medtut.course.profiles import SettingsError, lesson_module, profile_table
from medtut.files import read_json, write_text


def write_index(folder: Path, profile: str) -> Path:
    """Write ``index.html`` for every lesson found under ``build/<profile>``.

    Parameters
    ----------
    folder : Path
        ``build/<profile>``.
    profile : str
    """
    done = sorted(folder.glob("[0-9]*/metrics.json"))
    done += sorted(folder.glob("bonus/[0-9]*/metrics.json"))
    folders = [
        path.parent for path in done if not path.parent.name.endswith(".partial")
    ]
    cards = [_card(folder, one) for one in folders]
    return write_text(folder / "index.html", _page(profile, cards))


def key_numbers(slug: str, metrics: dict[str, Any]) -> list[tuple[str, str]]:
    """Return ``(label, formatted value)`` for a lesson's ``KEY_NUMBERS``.

    Numbers the run did not record are left out.
    """
    try:
        chosen = getattr(lesson_module(slug), "KEY_NUMBERS", [])
    except SettingsError:
        chosen = []
    rows = []
    for key, label, form in chosen:
        if (value := lookup(metrics, key)) is not None:
            shown = form.format(value) if "{" in form else format(value, form)
            rows.append((label, shown))
    return rows


def lookup(metrics: dict[str, Any], key: str) -> Any:
    """Return a recorded number, None if there is none; a dot goes down a level."""
    value: Any = metrics
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def minutes(seconds: float) -> str:
    """Write a duration for people: "40 s", "3.5 min", "2.1 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


def memory(mb: float) -> str:
    """Write an amount of memory for people: "640 MB", "2.3 GB"."""
    return f"{mb:.0f} MB" if mb < 1000 else f"{mb / 1024:.1f} GB"


def _card(base: Path, folder: Path) -> str:
    name, text = folder.relative_to(base).as_posix(), html.escape
    slug = text(name)
    result = read_json(folder / "metrics.json", {})
    cost = read_json(folder / "cost.json", {})
    title = text(str(cost.get("title") or name))
    parts = [
        f'<img src="{slug}/{text(first["file"])}" alt="{text(first["alt"])}" '
        'loading="lazy">'
        for first in read_json(folder / "figures.json", [])[:1]
    ]
    pages = sorted(folder.glob("*.html"))
    link = f'<a href="{slug}/{pages[0].name}">{title}</a>' if pages else title
    parts.append(f'<div class="text"><h2>{link}</h2>')
    notes = []
    if result.get("status") != "complete":
        notes.append("This run did not reach its end.")
    if result.get("evidence") is False:
        notes.append("Smoke run: not evidence.")
    for fall in result.get("fell_back", []):
        notes.append(f"Not available: {fall['what']}; used {fall['to']}.")
    parts += [f'<p class="note small">{text(note)}</p>' for note in notes]
    rows = [
        f'<tr><th scope="row">{text(label)}</th><td>{text(value)}</td></tr>'
        for label, value in key_numbers(name, result.get("metrics", {}))
    ]
    if rows:
        parts += ["<table>", *rows, "</table>"]
    if cost:
        parts.append(
            f'<p class="small">{minutes(cost["seconds"])}, '
            f"{memory(cost['peak_memory_mb'])}, {text(str(cost['device']))} "
            f"({text(str(cost['cpu']))}, {cost['cores']} cores)</p>"
        )
    links = [("numbers", "metrics.json"), ("cost", "cost.json")]
    links += [("notebook", path.name) for path in sorted(folder.glob("*.ipynb"))]
    shown = [
        f'<a href="{slug}/{text(file)}">{label} '
        f'<span class="hidden">({title})</span></a>'
        for label, file in links
        if (folder / file).is_file()
    ]
    parts.append(f'<p class="small">{" · ".join(shown)}</p></div>')
    return "<li>" + "\n".join(parts) + "</li>"


def _page(profile: str, cards: list[str]) -> str:
    table = profile_table().get(profile, {})
    meaning = html.escape(str(table.get("meaning", "")))
    warning = ""
    if not table.get("evidence", True):
        warning = '<p class="note">Numbers of this profile are not evidence.</p>'
    page = Path(__file__).with_name("index.html")
    style = page.with_suffix(".css").read_text(encoding="utf-8")
    listing = "\n".join(cards) or "<li class='text'>No lesson has been run yet.</li>"
    return Template(page.read_text(encoding="utf-8")).substitute(
        profile=profile, meaning=meaning, warning=warning, style=style, listing=listing
    )
