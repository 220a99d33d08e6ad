"""``index.html``: a picture and the key numbers of every lesson that was run."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

from medtut.course.files import read_json, write_text
from medtut.course.profiles import SettingsError, lesson_module, profile_table

STYLE = """
:root { color-scheme: light dark; --fg: #1b1b1b; --bg: #fff; --soft: #f3f4f6;
  --line: #c9ccd1; --link: #0b5394; }
@media (prefers-color-scheme: dark) {
  :root { --fg: #e8e8e8; --bg: #16181c; --soft: #23262c; --line: #454a53;
    --link: #8ab4f8; } }
* { box-sizing: border-box; }
body { font: 1rem/1.55 system-ui, sans-serif; color: var(--fg); background: var(--bg);
  margin: 0 auto; max-width: 72rem; padding: 1.5rem; }
a { color: var(--link); }
.lessons { display: grid; gap: 1.25rem;
  grid-template-columns: repeat(auto-fill, minmax(20rem, 1fr)); padding: 0; }
.lessons > li { list-style: none; border: 1px solid var(--line); border-radius: .5rem;
  overflow: hidden; background: var(--soft); display: flex; flex-direction: column; }
.lessons img { display: block; width: 100%; height: 14rem; object-fit: contain;
  background: #fff; }
.text { padding: .75rem 1rem 1rem; }
h2 { font-size: 1.15rem; margin: 0 0 .5rem; }
table { border-collapse: collapse; width: 100%; }
th { text-align: left; font-weight: 400; padding: .15rem .5rem .15rem 0; }
td { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
tr { border-top: 1px solid var(--line); }
.note { border-left: .3rem solid #d55e00; padding: .4rem .8rem;
  background: var(--soft); }
.small { font-size: .875rem; }
"""


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
        value: Any = metrics
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value is not None:
            rows.append((label, _format(value, form)))
    return rows


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


def _format(value: Any, form: str) -> str:
    if "{" in form:
        return form.format(value)
    return format(value, form)


def _card(base: Path, folder: Path) -> str:
    slug = folder.relative_to(base).as_posix()
    result = read_json(folder / "metrics.json", {})
    cost = read_json(folder / "cost.json", {})
    title = html.escape(str(cost.get("title") or slug))
    pages = sorted(folder.glob("*.html"))
    parts = []
    figures = read_json(folder / "figures.json", [])
    if figures:
        first = figures[0]
        parts.append(
            f'<img src="{html.escape(slug)}/{html.escape(first["file"])}" '
            f'alt="{html.escape(first["alt"])}" loading="lazy">'
        )
    link = (
        f'<a href="{html.escape(slug)}/{pages[0].name}">{title}</a>' if pages else title
    )
    parts.append(f'<div class="text"><h2>{link}</h2>')
    if result.get("status") != "complete":
        parts.append('<p class="note">This run did not reach its end.</p>')
    if result.get("evidence") is False:
        parts.append('<p class="note">Smoke run: not evidence.</p>')
    for fall in result.get("fell_back", []):
        note = f"Not available: {fall['what']}; used {fall['to']}."
        parts.append(f'<p class="note small">{html.escape(note)}</p>')
    rows = key_numbers(slug, result.get("metrics", {}))
    if rows:
        parts.append("<table>")
        parts += [
            f'<tr><th scope="row">{html.escape(label)}</th>'
            f"<td>{html.escape(value)}</td></tr>"
            for label, value in rows
        ]
        parts.append("</table>")
    if cost:
        parts.append(
            f'<p class="small">{minutes(cost["seconds"])}, '
            f"{memory(cost['peak_memory_mb'])}, {html.escape(str(cost['device']))} "
            f"({html.escape(str(cost['cpu']))}, {cost['cores']} cores)</p>"
        )
    links = [("numbers", "metrics.json"), ("cost", "cost.json")]
    links += [("notebook", path.name) for path in sorted(folder.glob("*.ipynb"))]
    shown = [
        f'<a href="{html.escape(slug)}/{html.escape(name)}">{label} '
        f'<span class="hidden">({title})</span></a>'
        for label, name in links
        if (folder / name).is_file()
    ]
    parts.append(f'<p class="small">{" · ".join(shown)}</p></div>')
    return "<li>" + "\n".join(parts) + "</li>"


def _page(profile: str, cards: list[str]) -> str:
    table = profile_table().get(profile, {})
    meaning = html.escape(str(table.get("meaning", "")))
    warning = ""
    if not table.get("evidence", True):
        warning = '<p class="note">Numbers of this profile are not evidence.</p>'
    listing = "\n".join(cards) or "<li class='text'>No lesson has been run yet.</li>"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>The course, {profile} profile</title>
<style>{STYLE}
.hidden {{ position: absolute; width: 1px; height: 1px; overflow: hidden;
  clip-path: inset(50%); white-space: nowrap; }}
</style>
</head>
<body>
<header>
<h1>Parameter-efficient fine-tuning for medical imaging</h1>
<p>Profile <strong>{profile}</strong>: {meaning}.</p>
{warning}
</header>
<main>
<ul class="lessons">
{listing}
</ul>
</main>
</body>
</html>
"""
