"""The pictures of lesson 03: what is drawn is where it belongs, and told apart."""

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from medtut import viz_prompts as vp


@pytest.fixture
def ax():
    return Figure().subplots()


def rectangle(rows, columns, size=(40, 60)):
    mask = np.zeros(size, bool)
    mask[slice(*rows), slice(*columns)] = True
    return mask


TRUE = rectangle((10, 20), (30, 50))
OTHER = rectangle((12, 24), (28, 45))
GREY = np.linspace(0.2, 0.6, 40 * 60).reshape(40, 60)


def outlines(ax):
    """Colour, dash pattern and extent (left, top, right, bottom) of every contour."""
    found = []
    for lines in ax.collections:
        points = np.concatenate([path.vertices for path in lines.get_paths()])
        place = (*points.min(0).tolist(), *points.max(0).tolist())
        dashed = lines.get_linestyles()[0][1] is not None
        found.append((to_hex(lines.get_edgecolor()[0]).upper(), dashed, place))
    return found


def test_outlines_run_along_the_masks_edge(ax):
    vp.show_prompt(ax, GREY, TRUE, OTHER)
    assert outlines(ax) == [
        # Half a pixel outside the first and the last pixel of the mask.
        (vp.TRUTH, False, (29.5, 9.5, 49.5, 19.5)),
        (vp.FOUND, True, (27.5, 11.5, 44.5, 23.5)),
    ]
    assert not ax.patches


def test_box_stands_where_its_numbers_say(ax):
    vp.show_prompt(ax, GREY, box=np.array([30.0, 10, 49, 19]))
    (frame,) = ax.patches
    assert frame.get_bbox().extents.tolist() == [30, 10, 49, 19]
    assert to_hex(frame.get_edgecolor()).upper() == vp.BOX
    assert frame.get_linestyle() == ":"
    assert not frame.get_fill()
    assert not ax.collections


@pytest.mark.parametrize("image", [GREY, np.stack([GREY, GREY, 0 * GREY], -1)])
def test_greys_are_not_stretched(ax, image):
    vp.show_prompt(ax, image, title="t2f")
    (shown,) = ax.images
    np.testing.assert_array_equal(shown.get_array(), image)
    assert shown.get_clim() == (0, 1), "two pictures side by side mean the same"
    assert shown.get_cmap().name == "gray"
    assert ax.get_title() == "t2f"
    assert not len(ax.get_xticks())
    assert not len(ax.get_yticks())


def test_nothing_found_is_no_outline(ax):
    vp.show_prompt(ax, GREY, TRUE, np.zeros_like(TRUE))
    assert [colour for colour, *_ in outlines(ax)] == [vp.TRUTH]
    assert ax.get_xlim() == (-0.5, 59.5), "the whole picture without a margin"
    assert ax.get_ylim() == (39.5, -0.5)


def test_margin_is_kept_around_both_masks(ax):
    vp.show_prompt(ax, GREY, TRUE, OTHER, margin=5)
    assert ax.get_xlim() == (28 - 5, 49 + 5)
    assert ax.get_ylim() == (23 + 5, 10 - 5), "the first row stays on top"


def test_margin_ends_at_the_picture(ax):
    vp.show_prompt(ax, GREY, TRUE, margin=25)
    assert ax.get_xlim() == (5, 59.5)
    assert ax.get_ylim() == (39.5, -0.5)


def test_margin_ends_at_the_pictures_first_row_and_column(ax):
    vp.show_prompt(ax, GREY, found=rectangle((2, 9), (1, 6)), margin=4)
    assert ax.get_xlim() == (-0.5, 5 + 4)
    assert ax.get_ylim() == (8 + 4, -0.5)


def test_margin_around_nothing_shows_all(ax):
    vp.show_prompt(ax, GREY, np.zeros_like(TRUE), margin=3)
    assert ax.get_xlim() == (-0.5, 59.5)


@pytest.mark.parametrize("box", [True, False])
def test_legend_names_what_is_drawn(ax, box):
    lines = vp.legend_lines(box)
    found = [(x.get_label(), x.get_color(), x.get_linestyle()) for x in lines]
    wanted = [("truth", vp.TRUTH, "-"), ("found", vp.FOUND, "--")]
    assert found == wanted + [("box", vp.BOX, ":")] * box


def test_a_scattered_mask_is_named_and_not_drawn(ax):
    noise = np.zeros((40, 60), bool)
    noise[::4, ::4] = True  # 150 pieces
    vp.show_prompt(ax, GREY, TRUE, noise, title="slice 3")
    assert [colour for colour, *_ in outlines(ax)] == [vp.TRUTH]
    assert ax.get_title() == "slice 3 (found: scattered)"
    few = noise & rectangle((0, 16), (0, 40))  # 40 pieces: still drawn
    vp.show_prompt(ax, GREY, None, few, title="slice 3")
    assert ax.get_title() == "slice 3"
