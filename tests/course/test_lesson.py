"""The object a notebook holds on to."""

import json

import numpy as np
import pytest
from matplotlib.figure import Figure

from medtut.course import lesson as lesson_file
from medtut.course import open_lesson
from medtut.errors import MedtutError


def figure(noise: int = 0):
    fig = Figure(figsize=(4, 3))
    axes = fig.subplots()
    if noise:
        rng = np.random.default_rng(0)
        axes.imshow(rng.random((noise, noise, 3)), interpolation="nearest")
    return fig


def test_settings_are_attributes_and_none_is_the_profile(course):
    lesson = open_lesson("90_tiny", profile="smoke", steps=None, lr=0.5)
    assert (lesson.steps, lesson.lr, lesson.profile) == (2, 0.5, "smoke")
    assert lesson.out == course / "build" / "smoke" / "90_tiny"
    with pytest.raises(AttributeError, match="no setting 'stepz'"):
        _ = lesson.stepz


def test_numbers_go_to_the_file(course):
    lesson = open_lesson("90_tiny", profile="smoke", data="/somewhere/private")
    lesson.record(loss=np.float32(0.5), curve=np.array([1, 2]), best=None)
    lesson.record(loss=0.25, nested={1: (True, "x")})
    lesson.fell_back("the real slices", "drawn ones")
    stored = json.loads(lesson.path.read_text(encoding="utf-8"))
    assert stored["metrics"] == {
        "loss": 0.25,
        "curve": [1, 2],
        "best": None,
        "nested": {"1": [True, "x"]},
    }
    assert stored["metrics"] == lesson.metrics
    assert stored["status"] == "running"
    assert stored["evidence"] is False
    assert stored["fell_back"] == [{"what": "the real slices", "to": "drawn ones"}]
    assert "private" not in json.dumps(stored)
    lesson.finish()
    stored = json.loads(lesson.path.read_text(encoding="utf-8"))
    assert stored["status"] == "complete"
    assert stored["peak_memory_mb"] > 10
    assert not list(lesson.out.glob("*.partial"))


@pytest.mark.parametrize(
    "bad", [float("nan"), [1.0, float("inf")], {"a": np.float64("nan")}, object(), 1j]
)
def test_what_cannot_be_recorded(course, bad):
    lesson = open_lesson("90_tiny", profile="smoke")
    with pytest.raises(MedtutError, match="record: loss"):
        lesson.record(loss=bad)
    assert lesson.metrics == {}


def test_show_saves_picture_and_alt_text(course):
    lesson = open_lesson("90_tiny", profile="quick")
    path = lesson.show(figure(), "axes", "  Empty\n axes ")
    assert path.read_bytes().startswith(b"\x89PNG")
    lesson.show(figure(), "axes", "Empty axes, again")
    (entry,) = json.loads((lesson.out / "figures.json").read_text(encoding="utf-8"))
    assert entry["alt"] == "Empty axes, again"
    assert entry["file"] == "figures/axes.png"


def test_show_keeps_files_small(course, monkeypatch):
    lesson = open_lesson("90_tiny", profile="quick")
    path = lesson.show(figure(noise=500), "noise", "Noise")
    assert path.stat().st_size <= lesson_file.FIGURE_BYTES
    monkeypatch.setattr(lesson_file, "FIGURE_BYTES", 1000)
    with pytest.raises(MedtutError, match="make it smaller"):
        lesson.show(figure(), "axes", "Axes")


@pytest.mark.parametrize(
    ("name", "alt"), [("a", ""), ("a", " \n"), ("", "x"), ("a/b", "x"), ("a.png", "x")]
)
def test_show_refuses(course, name, alt):
    lesson = open_lesson("90_tiny", profile="quick")
    with pytest.raises(MedtutError):
        lesson.show(figure(), name, alt)


def test_an_earlier_result_is_kept_aside(course):
    first = open_lesson("90_tiny", profile="smoke")
    first.record(loss=1.0)
    first.finish()
    second = open_lesson("90_tiny", profile="smoke")
    previous = second.out / "metrics.previous.json"
    assert json.loads(previous.read_text(encoding="utf-8"))["metrics"] == {"loss": 1.0}


def test_output_that_cannot_be_written(course):
    (course / "file").write_text("x", encoding="utf-8")
    with pytest.raises(MedtutError, match="cannot write to the output folder"):
        open_lesson("90_tiny", profile="smoke", out=str(course / "file" / "out"))
