"""The runner: refusals before anything runs, results, failures, solutions."""

import json

import nbformat
import pytest
from pages import fetched_from_elsewhere
from rich.console import Console

from medtut.course import engine, nbfile
from medtut.course.catalog import find_lesson
from medtut.course.profiles import SettingsError
from medtut.course.runner import run_lessons
from medtut.errors import MedtutError

CONSOLE = Console(quiet=True)


def run(*args, **kwargs):
    return run_lessons(*args, console=CONSOLE, **kwargs)


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture
def no_kernel(monkeypatch):
    """Make it an error to start a kernel."""

    def started(*args, **kwargs):
        raise AssertionError("a kernel was started")

    monkeypatch.setattr(engine, "execute", started)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"lessons": ["90", "77"]}, "no lesson '77'.*90_tiny"),
        ({"lessons": ["90_tny"]}, "did you mean '90_tiny'"),
        ({"lessons": []}, "name a lesson"),
        ({"profile": "big"}, "unknown profile 'big'"),
        ({"overrides": {"stepz": 1}}, "unknown setting 'stepz'"),
        ({"overrides": {"steps": "ten"}}, "steps = 'ten'"),
        ({"overrides": {"out": "x"}}, "use --out"),
        ({"data": "nowhere"}, "nowhere.*no such folder"),
        ({"out": "file/below"}, "cannot write to the output folder"),
    ],
)
def test_refused_before_anything_runs(course, no_kernel, arguments, says):
    (course / "file").write_text("x", encoding="utf-8")
    with pytest.raises(MedtutError, match=f"(?s){says}"):
        run(**arguments)
    assert not list(course.glob("build/*/*"))


def test_notebooks_that_cannot_be_run_are_refused(course, no_kernel, notebook):
    folder = course / "notebooks"
    cells = notebook.cells("91_x")
    notebook(folder / "91_x.ipynb", cells, kernelspec=False)
    with pytest.raises(SettingsError, match="no kernelspec"):
        run(["91"])
    cells[1] = ("code", "profile = 'quick'\nseed = 1 + 1", ["parameters"])
    notebook(folder / "91_x.ipynb", cells)
    with pytest.raises(SettingsError, match=r"literal.*line 2 is 'seed = 1 \+ 1'"):
        run(["91"])
    cells[1] = ("code", "profile = 'quick'", ["parameters"])
    notebook(folder / "91_x.ipynb", cells)
    with pytest.raises(SettingsError, match="parameters cell has no steps"):
        run(["91"], overrides={"steps": 3})
    notebook(folder / "91_x.ipynb", cells[2:])
    with pytest.raises(SettingsError, match="exactly one cell tagged 'parameters'"):
        run(["91"])


def test_find_lesson(course, notebook):
    bonus = notebook(course / "notebooks" / "bonus" / "90_more.ipynb", [])
    for name in (90, "90", "90_tiny", "notebooks/90_tiny.ipynb"):
        assert find_lesson(name).slug == "90_tiny"
    for name in ("bonus/90_more", str(bonus)):
        assert find_lesson(name).slug == "bonus/90_more"
        assert find_lesson(name).bonus


def test_a_run_writes_everything(course, monkeypatch):
    monkeypatch.setenv("MEDTUT_PROFILE", "full")
    # An installed "python3" kernel may be another environment: it must not be used.
    spec = course / "jupyter" / "kernels" / "python3"
    spec.mkdir(parents=True)
    other = {"argv": ["no-such-python"], "display_name": "x", "language": "python"}
    (spec / "kernel.json").write_text(json.dumps(other), encoding="utf-8")
    monkeypatch.setenv("JUPYTER_PATH", str(course / "jupyter"))
    (done,) = run(None, "smoke", {"steps": 7, "ranks": [3]})
    folder = course / "build" / "smoke" / "90_tiny"
    assert done.ok
    assert done.folder == folder
    assert sorted(path.name for path in folder.iterdir()) == [
        "90_tiny.html",
        "90_tiny.ipynb",
        "cost.json",
        "figures",
        "figures.json",
        "metrics.json",
    ]
    result = read(folder / "metrics.json")
    assert result["status"] == "complete"
    assert result["metrics"]["steps"] == 7
    assert result["settings"]["ranks"] == [3]
    assert result["profile"] == "smoke"
    cost = read(folder / "cost.json")
    assert cost["title"].startswith("A small lesson")
    assert cost["peak_memory_mb"] > 30
    assert cost["seconds"] > 0.5
    assert len(cost["cells"]) == 5
    nb = nbformat.read(folder / "90_tiny.ipynb", as_version=4)
    nbformat.validate(nb)
    assert "papermill" not in nb.metadata
    assert "widgets" not in nb.metadata
    text = (folder / "90_tiny.ipynb").read_text(encoding="utf-8")
    assert str(course) not in text
    assert "written to build/smoke/90_tiny" in text
    assert '"steps = 7' in text
    page = (folder / "90_tiny.html").read_text(encoding="utf-8")
    assert fetched_from_elsewhere(page) == []
    assert 'alt="A line that goes up"' in page
    assert 'alt="x^2"' in page
    index = (course / "build" / "smoke" / "index.html").read_text(encoding="utf-8")
    for piece in (
        'src="90_tiny/figures/line.png"',
        'alt="A line that goes up"',
        "<td>0.250</td>",
        "<td>80%</td>",
        "not evidence",
        'href="90_tiny/90_tiny.html"',
    ):
        assert piece in index
    assert "not recorded" not in index
    assert fetched_from_elsewhere(index) == []


def test_a_failing_cell_is_shown_and_the_earlier_result_kept(course, notebook, capsys):
    cells = notebook.cells("91_bad")
    cells[3] = ("code", "lesson.record(loss=1)\nlesson.steps / 0")
    notebook(course / "notebooks" / "91_bad.ipynb", cells)
    earlier = course / "build" / "smoke" / "91_bad"
    earlier.mkdir(parents=True)
    (earlier / "metrics.json").write_text("{}", encoding="utf-8")
    (done,) = run_lessons(["91"], "smoke")
    assert not done.ok
    said = capsys.readouterr().err
    # The number is that of the lesson: what papermill puts in does not count.
    for piece in ("cell 4:", "lesson.steps / 0", "ZeroDivisionError", "left as it was"):
        assert piece in said
    assert (earlier / "metrics.json").read_text(encoding="utf-8") == "{}"
    left = course / "build" / "smoke" / "91_bad.partial"
    assert done.folder == left
    assert "ZeroDivisionError" in (left / "91_bad.ipynb").read_text(encoding="utf-8")


def test_an_error_inside_a_widget_is_a_failure(course, notebook):
    cells = notebook.cells("91_widget")
    caught = (
        "import ipywidgets\nfrom IPython.display import display\n"
        "box = ipywidgets.Output()\nwith box:\n    {}['lost']\n"
        "display(ipywidgets.VBox([box]))"
    )
    cells[3] = ("code", caught)
    notebook(course / "notebooks" / "91_widget.ipynb", cells)
    (done,) = run(["91"], "smoke")
    assert not done.ok
    assert "in a widget: KeyError: 'lost'" in done.errors[0]
    assert "{}['lost']" in done.errors[0]


def test_timeout_of_a_cell(course, notebook):
    cells = notebook.cells("91_slow")
    cells[3] = ("code", "import time\ntime.sleep(60)")
    notebook(course / "notebooks" / "91_slow.ipynb", cells)
    (done,) = run(["91"], "smoke", timeout=3)
    assert not done.ok
    assert "more than 3 s" in done.errors[0]
    assert done.errors[0].startswith("cell 4:")
    assert "time.sleep(60)" in done.errors[0]


def test_a_kernel_that_dies(course, notebook):
    cells = notebook.cells("91_dead")
    cells[3] = ("code", "import os\nos.write(2, b'last words')\nos._exit(1)")
    notebook(course / "notebooks" / "91_dead.ipynb", cells)
    (done,) = run(["91"], "smoke")
    assert not done.ok
    assert "kernel died" in done.errors[0]


def test_solve_needs_every_check_to_say_correct(course, notebook, monkeypatch):
    from medtut.course import exercises

    says = (
        "from IPython.display import display\n"
        "display({MIME: {'exercise': NAME, 'status': STATUS}}, raw=True)"
    )
    answers = {"91.1": "correct", "91.2": "misconception"}

    def solution(name):
        text = says.replace("MIME", repr(exercises.OUTCOME_MIME))
        return text.replace("NAME", repr(name)).replace("STATUS", repr(answers[name]))

    monkeypatch.setattr(exercises, "solution_source", solution)
    cells = notebook.cells("91_ex")
    cells[3:3] = [
        ("code", "raise SystemError", ["exercise"], {"exercise": name})
        for name in ("91.1", "91.2")
    ]
    notebook(course / "notebooks" / "91_ex.ipynb", cells)
    (done,) = run(["91"], "smoke", solve=True)
    assert done.errors == ["exercise 91.2: its solution is misconception, not correct"]


def test_plain_papermill_runs_a_lesson(course):
    import papermill

    out = course / "out.ipynb"
    papermill.execute_notebook(
        str(course / "notebooks" / "90_tiny.ipynb"),
        str(out),
        parameters={"profile": "smoke"},
        progress_bar=False,
    )
    assert out.is_file()
    result = read(course / "build" / "smoke" / "90_tiny" / "metrics.json")
    assert result["status"] == "complete"


def test_errors_papermill_takes_for_success():
    nb = nbformat.v4.new_notebook()
    cell = nbformat.v4.new_code_cell("import sys; sys.exit(0)", execution_count=1)
    cell.outputs = [nbformat.v4.new_output("error", ename="SystemExit", evalue="0")]
    nb.cells = [cell, nbformat.v4.new_code_cell("1 + 1")]
    (error,) = nbfile.find_errors(nb)
    assert error.index == 0
    assert nbfile.not_executed(nb) == [1]


def test_a_traceback_printed_into_a_widget():
    nb = nbformat.v4.new_notebook()
    state = {
        "m1": {
            "model_name": "OutputModel",
            "state": {
                "outputs": [
                    {
                        "output_type": "stream",
                        "name": "stderr",
                        "text": "\x1b[31mTraceback (most recent call last)\nKeyError",
                    }
                ]
            },
        }
    }
    nb.metadata["widgets"] = {nbfile.WIDGETS: {"state": state}}
    (error,) = nbfile.find_errors(nb)
    assert "KeyError" in error.text
    assert "\x1b" not in error.text
    assert "widgets" not in nbfile.clean(nb).metadata
