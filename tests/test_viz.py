"""The figures refuse what would mislead."""

import matplotlib
import numpy as np
import pytest

from medtut import viz
from medtut.errors import MedtutError
from medtut.widgets import explore

matplotlib.use("Agg")


def test_comparison_refuses_few_seeds_unless_marked():
    fig, axes = viz.figure()
    with pytest.raises(MedtutError, match="takes 5"):
        viz.compare_arms(axes[0], {"a": np.ones((1, 4))}, ylabel="Dice")
    viz.compare_arms(axes[0], {"a": np.ones((1, 4))}, ylabel="Dice", one_run=True)
    assert axes[0].get_title() == "one run, not evidence"
    assert fig.axes


def test_five_seeds_are_drawn_with_their_mean():
    _, axes = viz.figure()
    scores = np.linspace(0, 1, 20).reshape(5, 4)
    viz.compare_arms(axes[0], {"a": scores}, ylabel="Dice", baseline=("floor", 0.2))
    texts = [text.get_text() for text in axes[0].texts]
    assert texts == ["0.500", "floor 0.200"]


def test_slope_of_a_power_law():
    x = np.array([4, 8, 16, 32])
    assert viz.log_slope(x, 3 * x**0.5) == pytest.approx(0.5)


def test_figure_html_escapes_the_alternative_text():
    fig, _ = viz.figure()
    html = viz.figure_html(fig, 'a "quoted" <text>')
    assert 'alt="a &quot;quoted&quot; &lt;text&gt;"' in html


def test_widget_draws_its_default_and_follows_the_slider(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    drawn = []

    def render(rank):
        drawn.append(rank)
        return viz.figure()[0]

    explore(render, "a curve", rank=(1, 9))
    (box,) = shown
    slider, picture = box.children
    assert drawn == [slider.value]
    assert 'alt="a curve"' in picture.value
    slider.value = 7
    assert drawn[-1] == 7
