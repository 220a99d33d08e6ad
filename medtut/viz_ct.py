"""Slices of a CT as a radiologist sees them, and where a sentence looks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from medtut.viz import VERMILION

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Thousands of HU, as `medtut.data.ct_volume.prepare` gives them.
GREYS = 31
WINDOWS = {"lung": (-1.0, 0.2), "soft tissue": (-0.16, 0.24)}


def show_slice(
    ax: Axes, volume: np.ndarray, z: int, window: tuple[float, float], title: str = ""
) -> None:
    """An axial slice of a prepared volume (D, H, W)."""
    low, high = window
    # As few greys as an eye tells apart: noise in more makes a file large.
    shown = np.clip((np.asarray(volume[z], np.float32) - low) / (high - low), 0, 1)
    shown = np.round(shown * GREYS) / GREYS
    ax.imshow(shown, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    ax.set_title(title, fontsize=9)
    ax.set_axis_off()


def show_relevance(
    ax: Axes,
    volume: np.ndarray,
    found: np.ndarray,
    title: str,
    top: float | None = None,
    outline: np.ndarray | None = None,
) -> None:
    """The slice of the strongest token, patches that speak for a sentence coloured.

    Parameters
    ----------
    found : (d, h, w)
        Of `medtut.models.ctclip.relevance`.
    top : value of the strongest colour; by default the largest of `found`.
    outline : (D, H, W) bool, drawn around.
    """
    z = int(np.argmax(found.max((1, 2))))
    side = [n // d for n, d in zip(volume.shape, found.shape, strict=True)]
    show_slice(ax, volume, z * side[0] + side[0] // 2, WINDOWS["lung"], title)
    large = np.kron(found[z], np.ones(side[1:]))
    strong = np.clip(large / max(found.max() if top is None else top, 1e-9), 0, 1)
    ax.imshow(strong, cmap="cividis", alpha=0.6 * strong, vmin=0, vmax=1)
    mask = None if outline is None else outline[z * side[0] + side[0] // 2]
    if mask is not None and mask.any():
        ax.contour(mask, levels=[0.5], colors=[VERMILION], linewidths=1)


def relevance_key(fig: Figure, axes: Sequence[Axes], top: float) -> None:
    """The scale of colours of `show_relevance`, beside the pictures."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    colours = ScalarMappable(Normalize(0, top), "cividis")
    bar = fig.colorbar(colours, ax=list(axes), shrink=0.8)
    bar.set_label("speaks for the finding", fontsize=8)
    bar.ax.tick_params(labelsize=7)
