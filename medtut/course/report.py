"""``index.html``: a picture and the key numbers of every lesson that was run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from medtut.course.profiles import SettingsError, lesson_module, profile_table
from medtut.course.render import fill
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
    folders = [p.parent for p in done if not p.parent.name.endswith(".partial")]
    page = fill(
        "index.html",
        profile=profile,
        table=profile_table().get(profile, {}),
        style=Path(__file__).with_name("index.css").read_text(encoding="utf-8"),
        cards=[_card(folder, one) for one in folders],
        minutes=minutes,
        memory=memory,
    )
    return write_text(folder / "index.html", page)


def key_numbers(slug: str, metrics: dict[str, Any]) -> list[tuple[str, str]]:
    """Return ``(label, formatted value)`` for a lesson's ``KEY_NUMBERS``.

    Numbers the run did not record are left out.
    """
    try:
        chosen = getattr(lesson_module(slug), "KEY_NUMBERS", [])
    except SettingsError:
        return []
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


def _card(base: Path, folder: Path) -> dict[str, Any]:
    """Return what ``index.html`` shows of one lesson."""
    name = folder.relative_to(base).as_posix()
    result = read_json(folder / "metrics.json", {})
    cost = read_json(folder / "cost.json", {})
    notes = []
    if result.get("status") != "complete":
        notes.append("This run did not reach its end.")
    if result.get("evidence") is False:
        notes.append("Smoke run: not evidence.")
    for fall in result.get("fell_back", []):
        notes.append(f"Not available: {fall['what']}; used {fall['to']}.")
    links = [("numbers", "metrics.json"), ("cost", "cost.json")]
    links += [("notebook", path.name) for path in sorted(folder.glob("*.ipynb"))]
    return {
        "slug": name,
        "title": cost.get("title") or name,
        "picture": next(iter(read_json(folder / "figures.json", [])), None),
        "page": next((path.name for path in sorted(folder.glob("*.html"))), None),
        "notes": notes,
        "rows": key_numbers(name, result.get("metrics", {})),
        "cost": cost,
        "links": [(label, file) for label, file in links if (folder / file).is_file()],
    }
