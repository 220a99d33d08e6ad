"""Slices of a CT: what is coloured, on which scale, and what is drawn around."""

import matplotlib
import numpy as np
import pytest

from medtut import viz, viz_ct

matplotlib.use("Agg")


@pytest.fixture
def drawn():
    volume, found = np.zeros((8, 12, 12), np.float32), np.full((4, 3, 3), -1.0)
    found[2, 1, 2] = 2.0
    return volume, found


def strengths(ax):
    return np.asarray(ax.images[1].get_array())


def test_the_strongest_token_has_the_strongest_colour(drawn):
    _, (ax,) = viz.figure()
    viz_ct.show_relevance(ax, *drawn, "here")
    found = strengths(ax)
    assert ax.get_title() == "here"
    assert np.argwhere(found == 1).min(0).tolist() == [4, 8]
    assert (found == 1).sum() == 16
    assert found.sum() == 16, "what speaks against it has no colour"


def test_a_scale_of_ones_own_makes_maps_comparable(drawn):
    volume, found = drawn
    _, (one, other, over) = viz.figure(1, 3)
    for ax, top in ((one, 4.0), (other, 8.0), (over, 1.0)):
        viz_ct.show_relevance(ax, volume, found, "", top)
    assert [strengths(ax).max() for ax in (one, other, over)] == [0.5, 0.25, 1]


def test_an_outline_is_drawn_where_the_slice_has_it(drawn):
    _, (with_it, without) = viz.figure(1, 2)
    mask = np.zeros((8, 12, 12), bool)
    mask[5, 3:6, 2:5] = True  # of the slice that is shown
    viz_ct.show_relevance(with_it, *drawn, "", None, mask)
    viz_ct.show_relevance(without, *drawn, "", None, np.roll(mask, 1, 0))
    assert len(with_it.collections) == 1
    assert not without.collections
    edge = with_it.collections[0].get_paths()[0].vertices
    assert edge.min(0).tolist() == [1.5, 2.5]
    assert edge.max(0).tolist() == [4.5, 5.5]


def test_the_key_has_the_scale():
    fig, axes = viz.figure(1, 2)
    viz_ct.relevance_key(fig, axes, 3.0)
    bar = fig.axes[-1]
    assert bar.get_ylim() == (0, 3)
    assert bar.get_ylabel() == "speaks for the finding"
