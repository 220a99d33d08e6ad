"""Pairing of a notebook with its text form, and what the build writes into it."""

from __future__ import annotations

import hashlib
import re
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

from medtut.course.files import repository_root
from medtut.files import read_json

KERNELSPEC = {"display_name": "Python 3", "language": "python", "name": "python3"}
COST = re.compile(r"(<!-- medtut:cost -->).*?(<!-- /medtut:cost -->)", re.DOTALL)
BADGE = re.compile(r"(<!-- medtut:colab -->).*?(<!-- /medtut:colab -->)", re.DOTALL)
# In code the place is a pair of comments; the same address goes between them.
INSTALL = re.compile(r"(# medtut:install)\n.*?([ \t]*# /medtut:install)", re.DOTALL)
NO_ADDRESS = "    raise RuntimeError('install medtut first: this copy has no address')"


@cache
def repository(root: Path | None = None) -> tuple[str, str]:
    """Return the public address and branch from ``[tool.medtut]``; "" when unset."""
    path = (root or repository_root()) / "pyproject.toml"
    if not path.is_file():
        return "", "main"
    table = tomllib.loads(path.read_text(encoding="utf-8"))
    own = table.get("tool", {}).get("medtut", {})
    return own.get("repository", "").rstrip("/"), own.get("branch", "main")


def read_text_form(path: Path) -> Any:
    """Read a jupytext percent file as a notebook without outputs."""
    import jupytext

    nb = jupytext.reads(path.read_text(encoding="utf-8"), fmt="py:percent")
    nb.metadata.pop("jupytext", None)
    nb.metadata["kernelspec"] = dict(KERNELSPEC)
    nb.nbformat, nb.nbformat_minor = 4, 5
    return nb


def build(path: Path, slug: str, root: Path | None = None) -> Any:
    """Make the notebook of a text form: deterministic ids, cost table, badge."""
    nb = read_text_form(path)
    set_ids(nb, slug)
    stamp(nb, slug, root)
    return nb


def set_ids(nb: Any, slug: str) -> None:
    """Give every cell an id that depends on its content and not on chance.

    Equal cells are told apart by their count, so that a cell put in above does not
    change the ids below it.
    """
    seen: dict[str, int] = {}
    for cell in nb.cells:
        text = f"{slug}\n{cell.cell_type}\n{unstamped(cell.source)}"
        count = seen[text] = seen.get(text, -1) + 1
        digest = hashlib.sha256(f"{text}\n{count}".encode()).hexdigest()
        cell["id"] = digest[:12]


def stamp(nb: Any, slug: str, root: Path | None = None) -> None:
    """Fill the places of cost table, badge and install line, in place."""
    places = {
        "markdown": (
            (COST, cost_table(slug, root), "\n\n"),
            (BADGE, badge(slug, root), "\n"),
        ),
        "code": ((INSTALL, install_line(root), "\n"),),
    }
    for cell in nb.cells:
        for place, content, gap in places.get(cell.cell_type, ()):
            inside = f"{gap}{content}{gap}" if content else "\n"
            cell.source = place.sub(
                lambda match, x=inside: f"{match[1]}{x}{match[2]}", cell.source
            )


def unstamped(source: str) -> str:
    """Return a cell's source with the stamped places empty."""
    for place in (COST, BADGE, INSTALL):
        source = place.sub(r"\1\n\2", source)
    return source


def badge(slug: str, root: Path | None = None) -> str:
    """Return the Colab badge in Markdown, "" while no repository is set."""
    address, branch = repository(root)
    if not address:
        return ""
    name = re.sub(r"^https?://github\.com/", "", address)
    return (
        "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
        f"(https://colab.research.google.com/github/{name}/blob/{branch}/notebooks/"
        f"{slug}.ipynb)"
    )


def install_line(root: Path | None = None) -> str:
    """Return the line that installs the course in Colab, indented by four.

    torch is not named in it: pip keeps a preinstalled one that is within our range.
    """
    address, branch = repository(root)
    if not address:
        return NO_ADDRESS
    return f'    get_ipython().system("pip install -q git+{address}@{branch}")'


def cost_table(slug: str, root: Path | None = None) -> str:
    """Return time and memory per profile as a Markdown table, "" when not recorded."""
    from medtut.course.report import memory, minutes

    path = (root or repository_root()) / "benchmarks" / "costs.json"
    costs = read_json(path, {}).get(slug, {})
    rows = [
        f"| {profile} | {minutes(one['seconds'])} | {memory(one['peak_memory_mb'])} "
        f"| {one['cpu']}, {one['cores']} cores"
        + (f", {one['device']} |" if one["device"] != "cpu" else " |")
        for profile in ("smoke", "quick", "full")
        if (one := costs.get(profile))
    ]
    if not rows:
        return ""
    head = ["| profile | time | peak memory | measured on |", "|---|---|---|---|"]
    return "\n".join(head + rows)


def differences(text: Any, stored: Any) -> list[str]:
    """Compare a text form with a notebook; return what is not in step.

    Outputs, ids and what the build stamps in do not count.
    """
    found = []
    if len(text.cells) != len(stored.cells):
        found.append(
            f"{len(text.cells)} cells in the text, {len(stored.cells)} in the notebook"
        )
    pairs = zip(text.cells, stored.cells, strict=False)
    for number, (one, two) in enumerate(pairs, start=1):
        if one.cell_type != two.cell_type:
            found.append(f"cell {number} is {one.cell_type} in the text only")
        elif unstamped(one.source).strip() != unstamped(two.source).strip():
            found.append(f"cell {number} reads differently: {two.source[:60]!r}")
        elif any(
            (one.metadata.get(key) or None) != (two.metadata.get(key) or None)
            for key in ("tags", "medtut")
        ):
            found.append(f"cell {number}: tags or metadata differ")
    return found
