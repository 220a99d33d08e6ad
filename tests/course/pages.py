"""What a page would fetch from the network."""

from __future__ import annotations

import re

from medtut.course.render import _AWAY, _SCRIPT

_FETCHED = re.compile(
    r"""<(?:script|link|img|iframe|source|video|audio)\b[^>]*?\s(?:src|href)\s*=\s*
        ["']?(https?:)?//|@import\s+(?:url\()?["']?(https?:)?//""",
    re.IGNORECASE | re.VERBOSE,
)


def fetched_from_elsewhere(page: str) -> list[str]:
    """Return the pieces of a page that a browser would fetch from the network."""
    found = [match.group() for match in _FETCHED.finditer(page)]
    for script in _SCRIPT.findall(page):
        found += [script[:200]] if _AWAY.search(script) else []
    return found
