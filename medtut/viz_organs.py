"""Slices of an abdominal CT with the outlines of its organs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from medtut.viz import CYCLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GREYS = 24  # as few as an eye tells apart: noise in more makes a file large
PLANES = {"sagittal": 0, "coronal": 1, "axial": 2}


def show_organs(
    ax: Axes, image: np.ndarray, masks: np.ndarray, names: Sequence[str] = (),
    plane: str = "coronal", at: int | None = None, title: str = "",
) -> None:  # fmt: skip
    """A slice with a coloured outline for every structure that it cuts.

    Parameters
    ----------
    image : (X, Y, Z) in 0 to 1, RAS+
    masks : (S, X, Y, Z) of 0 and 1
    names : of the S structures, for a legend; its entries are those in the slice.
    plane : "coronal", "axial" or "sagittal"
    at : voxel along the plane's axis; by default where most structures are.
    """
    axis = PLANES[plane]
    if at is None:
        others = tuple(a + 1 for a in range(3) if a != axis)
        at = int((masks > 0).any(others).sum(0).argmax()) if len(masks) else None
        at = image.shape[axis] // 2 if at is None else at
    # The patient's right is on the left, as seen from the feet or from the front.
    turn = (slice(None, None, -1 if axis == 2 else 1),)
    shown = np.round(np.take(image, at, axis) * GREYS) / GREYS

    def view(one: np.ndarray) -> np.ndarray:
        flipped = one[::-1] if axis != 0 else one
        return flipped.T[turn]

    low = "upper" if axis == 2 else "lower"
    grey = {"cmap": "gray", "vmin": 0, "vmax": 1, "interpolation": "nearest"}
    ax.imshow(view(shown), origin=low, **grey)
    for n, mask in enumerate(masks):
        cut = view(np.take(mask, at, axis))
        if not cut.any():
            continue
        colour, style = CYCLE[n % len(CYCLE)], "-" if n < len(CYCLE) else "--"
        ax.contour(cut, [0.5], colors=[colour], linewidths=1.3, linestyles=style)
        if names:
            said = names[n].replace("_", " ")
            ax.plot([], [], style, color=colour, marker="", label=said)
    ax.set_title(title, fontsize=9)
    ax.set_axis_off()
