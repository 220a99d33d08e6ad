"""Widgets over pure functions: the same function draws the static default."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def explore(render: Callable[..., Figure], alt: str, **controls: Any) -> None:
    """Show `render` with sliders and menus for its arguments.

    Parameters
    ----------
    render : pure function of the controls that returns a figure.
    alt : what the figure shows, for readers who do not see it.
    controls : what ``ipywidgets.interactive`` takes: ``rank=(1, 64)``,
        ``layer=["query", "value"]``, or a widget.

    Notes
    -----
    An error in a widget's callback is caught by the widget and would pass unseen, so
    the runner looks for it in the saved widget state. The figure is put into an HTML
    widget rather than the Output widget, whose content is lost when a page is saved.
    """
    import ipywidgets
    from IPython.display import display

    from medtut.viz import figure_html

    picture = ipywidgets.HTML()
    holder = ipywidgets.interactive(
        lambda **values: setattr(picture, "value", figure_html(render(**values), alt)),
        **controls,
    )

    display(ipywidgets.VBox([*holder.children[:-1], picture]))
