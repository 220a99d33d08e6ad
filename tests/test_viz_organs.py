"""Slices of organs: which one, which way round, and what the legend says."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from medtut.viz import CYCLE
from medtut.viz_organs import GREYS, show_organs

SHAPE = (8, 10, 14)  # right, front, head


@pytest.fixture
def axes():
    return Figure().subplots()


def cubes():
    """Two organs at y = 6, one at y = 2, one that is nowhere."""
    masks = np.zeros((4, *SHAPE), bool)
    masks[0, 5:7, 5:8, 3:5] = True
    masks[1, 1:3, 6:8, 8:11] = True
    masks[2, 3:5, 1:3, 6:9] = True
    return masks


def picture(ax):
    """What one sees: rows from the top of the figure."""
    image = np.asarray(ax.images[0].get_array())
    return image[::-1] if ax.images[0].origin == "lower" else image


def legend(ax):
    return ax.get_legend_handles_labels()[1]


@pytest.mark.parametrize("plane", ["axial", "coronal", "sagittal"])
def test_right_is_on_the_left_and_the_head_or_the_front_is_up(axes, plane):
    image = np.zeros(SHAPE)
    image[6, 8, 11] = 1  # right, front and up
    at = {"axial": 11, "coronal": 8, "sagittal": 6}[plane]
    show_organs(axes, image, np.zeros((0, *SHAPE)), plane=plane, at=at)
    shown = picture(axes)
    row, column = (int(n[0]) for n in np.nonzero(shown))
    want = {
        "axial": (10, 8, 1, 1),
        "coronal": (14, 8, 2, 1),
        "sagittal": (14, 10, 2, 8),
    }
    assert (*shown.shape, row, column) == want[plane]


@pytest.mark.parametrize("plane", ["axial", "coronal", "sagittal"])
def test_outlines_lie_on_what_they_outline(axes, plane):
    masks, image = cubes()[:1], np.zeros(SHAPE)
    image[masks[0]] = 1
    show_organs(axes, image, masks, ["liver"], plane)
    shown = np.asarray(axes.images[0].get_array())
    rows, columns = np.nonzero(shown)
    (outline,) = axes.collections
    points = np.concatenate([p.vertices for p in outline.get_paths()])
    for axis, places in ((0, columns), (1, rows)):
        assert points[:, axis].min() == pytest.approx(places.min() - 0.5)
        assert points[:, axis].max() == pytest.approx(places.max() + 0.5)
    # The contour is drawn in the image's coordinates, so its axis is the image's.
    assert axes.yaxis_inverted() == (plane == "axial")


def test_the_slice_with_most_structures(axes):
    masks, image = cubes(), np.zeros(SHAPE)
    image += np.arange(10)[:, None] / GREYS
    show_organs(axes, image, masks, ["a", "b_c", "d", "e"])
    assert np.asarray(axes.images[0].get_array())[0, 0] == pytest.approx(6 / GREYS)
    assert legend(axes) == ["a", "b c"], "of those in the slice alone"
    assert len(axes.collections) == 2
    other = Figure().subplots()
    show_organs(other, image, masks, ["a", "b", "d", "e"], at=2, title="here")
    assert legend(other) == ["d"]
    assert other.get_title() == "here"


def test_without_structures_it_is_the_middle(axes):
    image = np.zeros(SHAPE) + np.arange(14) / GREYS
    show_organs(axes, image, np.zeros((0, *SHAPE)), plane="axial")
    assert np.asarray(axes.images[0].get_array())[0, 0] == pytest.approx(7 / GREYS)
    assert legend(axes) == []


def test_as_many_greys_and_lines_as_can_be_told_apart(axes):
    image = np.random.default_rng(0).random(SHAPE)
    masks = np.zeros((9, *SHAPE), np.uint8)
    for n in range(9):
        masks[n, n % 3 * 2 : n % 3 * 2 + 2, 5, n // 3 * 4 : n // 3 * 4 + 3] = 1
    show_organs(axes, image, masks, [f"organ_{n}" for n in range(9)], at=5)
    assert len(np.unique(axes.images[0].get_array())) <= GREYS + 1
    np.testing.assert_allclose(
        np.asarray(axes.images[0].get_array()),
        image[::-1, 5].T,
        atol=0.5 / GREYS + 1e-9,
    )
    handles, labels = axes.get_legend_handles_labels()
    assert labels == [f"organ {n}" for n in range(9)]
    looks = [(h.get_color(), h.get_linestyle()) for h in handles]
    assert len(set(looks)) == 9 > len(CYCLE)
    axes.legend()
    axes.figure.canvas.draw()
