"""Pictures of a classifier: confusion, reliability, intervals by class, Grad-CAM."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike as Array

from medtut.evaluate.calibration import ece, reliability
from medtut.viz import BLUE, GREY

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def show_confusion(ax: Axes, judged: dict[str, Any], title: str = "") -> None:
    """Draw the confusion matrix of a `report`: counts, shaded by share of the row."""
    table, names = np.array(judged["confusion"]), judged["classes"]
    share = table / table.sum(1, keepdims=True).clip(1)
    ax.imshow(share, cmap="cividis", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(table):
        colour = "black" if share[row, column] > 0.5 else "white"
        ax.text(column, row, count, ha="center", va="center", color=colour)
    ax.set_xticks(range(len(names)), names, fontsize=8, rotation=30, ha="right")
    ax.set_yticks(range(len(names)), names, fontsize=8)
    ax.set(xlabel="said", ylabel="truth")
    ax.set_title(title, fontsize=9)


def show_reliability(
    ax: Axes, probabilities: Array, truth: Array, bins: int = 10, name: str = ""
) -> None:
    """Draw accuracy over confidence; dots grow with the cases in their bin."""
    count, confidence, accuracy = reliability(probabilities, truth, bins)
    ax.plot([0, 1], [0, 1], color=GREY, ls="--", lw=1, marker="")
    label = f"{name} ECE {ece(probabilities, truth, bins):.3f}".strip()
    (line,) = ax.plot(confidence, accuracy, lw=1, marker="", label=label)
    area = 200 * count / count.sum() + 8
    ax.scatter(confidence, accuracy, area, color=line.get_color())
    ax.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
    ax.legend(fontsize=8, loc="upper left", frameon=False)


def show_classes(
    ax: Axes, judged: dict[str, Any], score: str = "recall", floor: float | None = None
) -> None:
    """Draw one score of each class with its interval, and a dashed floor."""
    for place, scores in enumerate(judged["per_class"].values()):
        if scores[score] is None:
            ax.text(0.02, place, "none in the truth", va="center", size=8, color=GREY)
            continue
        value, low, high = scores[score]
        ax.hlines(place, low, high, color=BLUE, lw=6, alpha=0.35)
        ax.plot(value, place, color=BLUE, marker="o")
        ax.annotate(f"{value:.2f}", (value, place), (0, 7), textcoords="offset points")
    if floor is not None:
        ax.axvline(floor, color=GREY, ls="--", lw=1, marker="")
    ax.set_yticks(range(len(judged["classes"])), judged["classes"], fontsize=8)
    ax.set(xlabel=score, xlim=(0, 1.02), ylim=(len(judged["classes"]) - 0.5, -0.5))


def show_cam(ax: Axes, image: Array, cam: Array, title: str = "") -> None:
    """Draw a grey picture (H, W) with a `grad_cam` map (H, W) in [0, 1] over it."""
    ax.imshow(image, cmap="gray", vmin=0, vmax=1)
    # Faint where the map is small, so that the picture stays to be read.
    ax.imshow(cam, cmap="magma", vmin=0, vmax=1, alpha=0.6 * np.asarray(cam))
    ax.set_axis_off()
    ax.set_title(title, fontsize=9)
