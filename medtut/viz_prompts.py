"""Pictures of prompted segmentation: a box, the true outline and the one found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

# Okabe-Ito: told apart by all, and by line style in grey.
SCATTERED = 60  # pieces of a mask above which it has no outline to be drawn
TRUTH, FOUND, BOX = "#56B4E9", "#E69F00", "#F0E442"


def show_prompt(
    ax: Any,
    image: np.ndarray,
    truth: np.ndarray | None = None,
    found: np.ndarray | None = None,
    box: Sequence[float] | None = None,
    title: str = "",
    margin: int | None = None,
) -> None:
    """Draw one picture with outlines.

    Parameters
    ----------
    ax : matplotlib axes
    image : (H, W) or (H, W, 3), in [0, 1]
    truth, found : (H, W) bool
        Blue and full, orange and dashed. A mask found in more than `SCATTERED` pieces
        is named in the title, not drawn.
    box : x0, y0, x1, y1, optional
        Yellow and dotted, in pixels.
    margin : int, optional
        Show only so many pixels around what is outlined.
    """
    from matplotlib.patches import Rectangle
    from scipy.ndimage import label

    if found is not None and label(found)[1] > SCATTERED:
        # Noise, such as an untrained model gives: no outline, and a huge picture.
        found, title = None, f"{title} (found: scattered)"
    ax.imshow(image, cmap="gray", vmin=0, vmax=1)
    for mask, colour, style in ((truth, TRUTH, "-"), (found, FOUND, "--")):
        if mask is not None and mask.any():
            line = {"colors": colour, "linestyles": style, "linewidths": 1.4}
            ax.contour(mask.astype(float), [0.5], **line)
    if box is not None:
        x, y, right, low = box
        frame = Rectangle((x, y), right - x, low - y, fill=False)
        frame.set(edgecolor=BOX, linestyle=":", linewidth=1.6)
        ax.add_patch(frame)
    shown = [m for m in (truth, found) if m is not None and m.any()]
    if margin is not None and shown:
        rows, columns = np.nonzero(np.any(shown, axis=0))
        height, width = shown[0].shape
        ax.set_xlim(
            max(-0.5, columns.min() - margin), min(width - 0.5, columns.max() + margin)
        )
        ax.set_ylim(
            min(height - 0.5, rows.max() + margin), max(-0.5, rows.min() - margin)
        )
    ax.set(xticks=[], yticks=[])
    ax.set_title(title, fontsize=9)


def legend_lines(box: bool = True) -> list[Any]:
    """Handles for a legend of what `show_prompt` draws."""
    from matplotlib.lines import Line2D

    names = [("truth", TRUTH, "-"), ("found", FOUND, "--"), ("box", BOX, ":")]
    return [
        Line2D([], [], color=colour, linestyle=style, label=name)
        for name, colour, style in names[: 3 if box else 2]
    ]
