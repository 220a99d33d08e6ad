"""Pages that need no network."""

import nbformat
import pytest
from pages import fetched_from_elsewhere

from medtut.course.render import draw_math, to_html


@pytest.mark.parametrize(
    "tex",
    [
        r"\Delta W = \frac{\alpha}{r} BA",
        r"W \in \mathbb{R}^{d \times k}",
        r"\lVert \Delta W \rVert_F",
        r"\text{rank}(W) \le r",
        r"\tfrac{\alpha}{\sqrt{r}}",
        r"\sum_{i=1}^{r} \sigma_i u_i v_i^\top",
    ],
)
def test_formulas_are_drawn_with_their_source_as_alt_text(tex):
    shown = draw_math(f"Here ${tex}$ and\n$$\n{tex}\n$$\n")
    assert shown.count(f'alt="{tex}"') == 2
    assert "$" not in shown


def test_what_cannot_be_drawn_is_shown_as_source():
    assert draw_math(r"$\begin{pmatrix}a\end{pmatrix}$") == (
        r"<code>\begin{pmatrix}a\end{pmatrix}</code>"
    )


@pytest.mark.parametrize("text", ["costs $5 and $6", "`$x$`", "```\n$x$\n```", r"\$a$"])
def test_dollars_that_are_no_formula(text):
    assert draw_math(text) == text


@pytest.mark.parametrize(
    "page",
    [
        '<script src="https://cdn.example/x.js"></script>',
        "<script>import('https://cdn.example/x.mjs')</script>",
        '<link rel="stylesheet" href="//cdn.example/x.css">',
        '<img alt="" src=http://example/x.png>',
        "<style>@import url('https://fonts.example/x');</style>",
    ],
)
def test_what_would_be_fetched_is_found(page):
    assert fetched_from_elsewhere(page)


def test_a_page_fetches_nothing():
    nb = nbformat.v4.new_notebook()
    nb.cells = [
        nbformat.v4.new_markdown_cell("# Title\n[a link](https://example.org)"),
        nbformat.v4.new_code_cell("1"),
    ]
    page = to_html(nb, "A title")
    assert fetched_from_elsewhere(page) == []
    assert "<title>A title</title>" in page
