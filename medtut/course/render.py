"""An executed notebook as one HTML file that needs no network."""

from __future__ import annotations

import base64
import copy
import html
import io
import re
from pathlib import Path
from typing import Any

_SCRIPT = re.compile(r"<script\b.*?</script>", re.DOTALL | re.IGNORECASE)
_AWAY = re.compile(r"https?://(?!www\.w3\.org)", re.IGNORECASE)
# Spellings matplotlib's mathtext does not know, and those it does.
_SPELLINGS = (
    (r"\\text(?:rm|normal)?\{", r"\\mathrm{"),
    (r"\\[td]frac(?![a-zA-Z])", r"\\frac"),
    (r"\\[lr]Vert(?![a-zA-Z])", r"\\|"),
    (r"\\le(?![a-zA-Z])", r"\\leq"),
    (r"\\ge(?![a-zA-Z])", r"\\geq"),
    (r"\\ne(?![a-zA-Z])", r"\\neq"),
)
_FENCE = re.compile(r"(```.*?```|~~~.*?~~~|`[^`\n]+`)", re.DOTALL)
_MATH = re.compile(
    r"(?<!\\)\$\$(?P<block>.+?)(?<!\\)\$\$"
    r"|(?<![\\$\w])\$(?P<inline>[^\s$](?:[^$\n]*[^\s$\\])?)\$(?![\d$])",
    re.DOTALL,
)


def fill(template: str, **values: Any) -> str:
    """Return a template of this folder (Jinja) with values put in, escaped."""
    from jinja2 import Environment, FileSystemLoader

    room = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return room.get_template(template).render(values)


def to_html(nb: Any, title: str) -> str:
    """Return a whole HTML page: pictures and formulas inside, nothing fetched.

    MathJax would come from a CDN; formulas are drawn with matplotlib instead, with
    their LaTeX source as alternative text.

    Parameters
    ----------
    nb : notebook
        Executed notebook; not changed.
    title : str
    """
    from nbconvert import HTMLExporter

    nb = copy.deepcopy(nb)
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            cell.source = draw_math(cell.source)
    exporter = HTMLExporter(template_name="lab", embed_images=False)
    nb.metadata["title"] = title
    page, _ = exporter.from_notebook_node(nb)
    return _SCRIPT.sub(_keep_script, page)


def draw_math(markdown: str) -> str:
    """Replace ``$...$`` and ``$$...$$`` outside code by pictures with alt text."""
    parts = _FENCE.split(markdown)
    for index in range(0, len(parts), 2):
        parts[index] = _MATH.sub(_picture, parts[index])
    return "".join(parts)


def _keep_script(match: re.Match[str]) -> str:
    away = _AWAY.search(match.group()) or "MathJax" in match.group()
    return "" if away else match.group()


def _picture(match: re.Match[str]) -> str:
    block = match["block"] is not None
    tex = " ".join((match["block"] or match["inline"]).split())
    svg = _svg(tex)
    if svg is None:
        code = f"<code>{html.escape(tex)}</code>"
        return f"\n\n<p>{code}</p>\n\n" if block else code
    image, height, depth = svg
    data = base64.b64encode(image).decode("ascii")
    tag = (
        f'<img alt="{html.escape(tex)}" src="data:image/svg+xml;base64,{data}" '
        f'style="height:{height:.2f}em;vertical-align:-{depth:.2f}em">'
    )
    return f'\n\n<p style="text-align:center">{tag}</p>\n\n' if block else tag


def _svg(tex: str) -> tuple[bytes, float, float] | None:
    """Draw a formula; return SVG, height and depth in em, None if it cannot be."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties
    from matplotlib.mathtext import MathTextParser

    points = 12.0
    for old, new in _SPELLINGS:
        tex = re.sub(old, new, tex)
    try:
        parsed = MathTextParser("path").parse(
            f"${tex}$", dpi=72, prop=FontProperties(size=points)
        )
    except (ValueError, RuntimeError):
        return None
    width, height, depth = (float(size) for size in parsed[:3])
    # A hair of room, or the outermost strokes are cut.
    pad = 0.5
    figure = Figure(figsize=((width + 2 * pad) / 72, (height + 2 * pad) / 72), dpi=72)
    FigureCanvasSVG(figure)
    figure.patch.set_alpha(0)
    place = pad / (width + 2 * pad), (depth + pad) / (height + 2 * pad)
    figure.text(*place, f"${tex}$", fontsize=points)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return buffer.getvalue(), (height + 2 * pad) / points, (depth + pad) / points
