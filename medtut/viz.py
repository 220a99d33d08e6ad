"""One figure style for the course, with colours that colour-blind readers can tell."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from medtut.errors import MedtutError
from medtut.evaluate.statistics import MIN_SEEDS, interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito (2008), the order in which the course uses them.
BLUE, ORANGE, GREEN = "#0072B2", "#E69F00", "#009E73"
VERMILION, PURPLE, SKY = "#D55E00", "#CC79A7", "#56B4E9"
BLACK, GREY = "#000000", "#777777"
CYCLE = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY, BLACK)
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def figure(
    rows: int = 1, columns: int = 1, *, width: float = 7.5, height: float = 3.2
) -> tuple[Figure, np.ndarray]:
    """Make a figure in the course's style.

    Parameters
    ----------
    rows, columns : grid of axes.
    width, height : size in inches of the whole figure.

    Returns
    -------
    the figure and an array ``(rows * columns,)`` of its axes.
    """
    from cycler import cycler
    from matplotlib.figure import Figure

    # A Figure of its own, not pyplot's: nothing stays open behind the reader's back.
    fig = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    axes = np.atleast_1d(np.asarray(fig.subplots(rows, columns))).ravel()
    for ax in axes:
        ax.set_prop_cycle(cycler(color=CYCLE, marker=MARKERS))
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=9)
    return fig, axes


def figure_html(fig: Figure, alt: str, *, dpi: int = 90) -> str:
    """The figure as an ``<img>`` with its picture inside and alternative text."""
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=dpi)
    return picture_html(buffer.getvalue(), "png", alt)


def picture_html(content: bytes, kind: str, alt: str) -> str:
    """A PNG or GIF as an ``<img>`` with its bytes inside and alternative text."""
    data = base64.b64encode(content).decode("ascii")
    return (
        f'<img src="data:image/{kind};base64,{data}" alt="{html.escape(alt)}" '
        'style="max-width:100%;background:#fff">'
    )


def show_slice(
    ax: Axes, image: ArrayLike, title: str = "", *, label: ArrayLike | None = None
) -> None:
    """Draw one slice (height, width), or its labels on cividis when given."""
    picture = np.asarray(image if label is None else label)
    if label is None:
        low, high = np.quantile(picture, [0.005, 0.995])
        ax.imshow(picture, cmap="gray", vmin=low, vmax=high)
    else:
        ax.imshow(picture, cmap="cividis", interpolation="nearest")
    ax.set_title(title, fontsize=9)
    ax.set_axis_off()


def compare_arms(
    ax: Axes,
    arms: Mapping[str, ArrayLike],
    *,
    ylabel: str,
    baseline: tuple[str, float] | None = None,
    one_run: bool = False,
) -> None:
    """Draw arms with every seed as a dot and a bootstrap interval.

    Parameters
    ----------
    arms : name to scores ``(seeds, cases)``.
    baseline : name and score of a trivial baseline, drawn as a dashed line.
    one_run : set it to draw fewer than five seeds; the figure is then marked.

    Raises
    ------
    MedtutError
        An arm has fewer than five seeds and `one_run` is not set.
    """
    for place, (name, scores) in enumerate(arms.items()):
        table = np.atleast_2d(np.asarray(scores, dtype=float))
        if table.shape[0] < MIN_SEEDS and not one_run:
            raise MedtutError(
                f"compare_arms: {name} has {table.shape[0]} seed(s), and it takes "
                f"{MIN_SEEDS}. Add some, or pass one_run=True to mark the figure."
            )
        low, high = interval(table)
        colour = CYCLE[place % len(CYCLE)]
        ax.vlines(place, low, high, color=colour, lw=6, alpha=0.35)
        spread = np.linspace(-0.12, 0.12, len(table)) if len(table) > 1 else [0.0]
        ax.plot(place + np.asarray(spread), table.mean(1), ls="none", color=colour)
        ax.text(place + 0.17, table.mean(), f"{table.mean():.3f}", va="center", size=9)
    if baseline is not None:
        ax.axhline(baseline[1], color=GREY, ls="--", lw=1, marker="")
        ax.text(
            -0.45, baseline[1], f"{baseline[0]} {baseline[1]:.3f}", size=8, va="bottom"
        )
    ax.set_xticks(range(len(arms)), list(arms), fontsize=9)
    ax.set_xlim(-0.5, len(arms) - 0.3)
    ax.set_ylabel(ylabel)
    if one_run:
        ax.set_title("one run, not evidence", fontsize=9, color=VERMILION)


def log_slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Least-squares slope of log y over log x: the exponent of a power law."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])
