"""The pictures of a classifier show the numbers that were computed."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from medtut import viz_classification as vc
from medtut.evaluate.calibration import reliability
from medtut.evaluate.classification import report

P = np.array([[0.9, 0.05, 0.05], [0.6, 0.3, 0.1], [0.2, 0.7, 0.1], [0.8, 0.1, 0.1]])
TRUTH = np.array([0, 0, 1, 1])


@pytest.fixture
def ax():
    return Figure().subplots()


@pytest.fixture
def judged():
    return report(P, TRUTH, ["one", "two", "three"], n_boot=20)


def labels(axis):
    return [one.get_text() for one in axis.get_ticklabels()]


def test_confusion_has_the_truth_in_rows(ax, judged):
    vc.show_confusion(ax, judged, "both")
    cells = {one.get_position(): one.get_text() for one in ax.texts}
    assert len(cells) == 9
    assert (cells[0, 0], cells[0, 1], cells[1, 0], cells[1, 1]) == ("2", "1", "0", "1")
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("said", "truth")
    assert labels(ax.xaxis) == labels(ax.yaxis) == ["one", "two", "three"]
    shade = ax.images[0].get_array()
    assert shade[0].tolist() == [1, 0, 0]
    assert shade[1].tolist() == [0.5, 0.5, 0]
    # Letters stay legible: dark on the bright end of the colours.
    assert {o.get_text(): o.get_color() for o in ax.texts}["2"] == "black"
    assert ax.texts[-1].get_color() == "white"


def test_reliability_draws_its_bins_beside_the_diagonal(ax):
    vc.show_reliability(ax, P, TRUTH, bins=4, name="LoRA")
    diagonal, line = ax.lines
    count, confidence, accuracy = reliability(P, TRUTH, 4)
    assert line.get_xdata() == pytest.approx(confidence)
    assert line.get_ydata() == pytest.approx(accuracy)
    assert list(diagonal.get_xdata()) == list(diagonal.get_ydata()) == [0, 1]
    sizes = ax.collections[0].get_sizes()
    assert (np.argsort(sizes) == np.argsort(count)).all()
    assert "LoRA ECE 0." in ax.get_legend().get_texts()[0].get_text()


def test_classes_show_intervals_floor_and_what_is_missing(ax, judged):
    vc.show_classes(ax, judged, floor=0.25)
    (low, _), (high, _) = ax.collections[1].get_segments()[0]
    assert [0.5, low, high] == judged["per_class"]["two"]["recall"]
    assert ax.lines[1].get_xdata() == [0.5]
    assert [one.get_text() for one in ax.texts] == ["1.00", "0.50", "none in the truth"]
    assert ax.lines[-1].get_xdata() == [0.25, 0.25]
    assert labels(ax.yaxis) == ["one", "two", "three"]


def test_cam_leaves_the_picture_where_it_is_small(ax):
    cam = np.array([[0.0, 0.5], [1.0, 0.0]])
    vc.show_cam(ax, np.full((2, 2), 0.3), cam, "glioma")
    _, over = ax.images
    assert np.array_equal(over.get_alpha(), 0.6 * cam)
    assert over.get_clim() == (0, 1)
    assert ax.get_title() == "glioma"
