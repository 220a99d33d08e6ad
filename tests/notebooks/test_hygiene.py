"""Every stored notebook: run, small, short, in step with its text, in the schema.

The second half plants each defect once and sees it found.
"""

import copy
import json

import hygiene
import nbformat
import pytest

from medtut.course import nbfile
from medtut.course.catalog import LessonFile, all_lessons
from medtut.course.profiles import lesson_module
from tools.notebooks import check_step

LESSONS = all_lessons()
EVERY = pytest.mark.parametrize("lesson", LESSONS, ids=[one.slug for one in LESSONS])


def read(lesson: LessonFile):
    return nbfile.read_notebook(lesson.path)


@EVERY
@pytest.mark.parametrize(
    "check",
    [
        hygiene.executed_in_order,
        hygiene.no_errors,
        hygiene.no_widget_state,
        hygiene.short_cells,
        hygiene.alt_text,
        hygiene.no_local_paths,
    ],
    ids=lambda check: check.__name__,
)
def test_stored_notebook(lesson, check):
    assert check(read(lesson)) == []


@EVERY
def test_size_and_schema(lesson):
    assert hygiene.small(lesson.path) == []
    nb = read(lesson)
    nbformat.validate(nb)
    assert nb.metadata.kernelspec.name == "python3"
    assert hygiene.stable_ids(nb, lesson.slug) == []


@EVERY
def test_length_and_balance(lesson):
    nb = read(lesson)
    ratio = hygiene.words_per_line(nb)
    print(f"{lesson.slug}: {len(nb.cells)} cells, {ratio:.1f} words per line of code")
    if not lesson.bonus:
        assert hygiene.number_of_cells(nb) == []
        assert hygiene.enough_text(nb) == []


@EVERY
def test_in_step_with_its_text(lesson):
    assert check_step(lesson.slug) == []


@EVERY
def test_parameters_are_the_settings(lesson):
    nb = read(lesson)
    names = nbfile.parameters(nb, lesson.path.name)
    assert set(names) == set(lesson_module(lesson.slug).Settings.model_fields)
    assert names["profile"] == "quick"


@EVERY
def test_stored_numbers_are_of_a_whole_quick_run(lesson):
    path = lesson.path.parents[lesson.bonus] / "metrics" / f"{lesson.slug}.json"
    result = json.loads(path.read_text(encoding="utf-8"))
    assert result["profile"] == "quick"
    assert result["status"] == "complete"
    assert result["lesson"] == lesson.slug
    assert result["metrics"]


def good():
    """Return a notebook without a defect, as far as content goes."""
    nb = nbformat.v4.new_notebook()
    text = nbformat.v4.new_markdown_cell("one two three four five six seven")
    code = nbformat.v4.new_code_cell("a = 1", execution_count=1)
    image = {"text/html": '<img src="data:," alt="a line">', "text/plain": "x"}
    code.outputs = [nbformat.v4.new_output("display_data", data=image)]
    nb.cells = [text, code]
    return nb


def test_a_good_notebook_passes():
    nb = good()
    for check in (
        hygiene.executed_in_order,
        hygiene.no_errors,
        hygiene.no_widget_state,
        hygiene.short_cells,
        hygiene.alt_text,
        hygiene.no_local_paths,
        hygiene.enough_text,
    ):
        assert check(nb) == []


def _stream(text):
    return nbformat.v4.new_output("stream", name="stdout", text=text)


@pytest.mark.parametrize(
    ("check", "plant"),
    [
        (hygiene.executed_in_order, lambda nb: nb.cells[1].update(execution_count=2)),
        (
            hygiene.executed_in_order,
            lambda nb: nb.cells[1].update(execution_count=None),
        ),
        (
            hygiene.no_errors,
            lambda nb: nb.cells[1].outputs.append(
                nbformat.v4.new_output("error", ename="E", evalue="v")
            ),
        ),
        (hygiene.no_widget_state, lambda nb: nb.metadata.update(widgets={})),
        (hygiene.short_cells, lambda nb: nb.cells[1].update(source="a\n" * 26)),
        (hygiene.number_of_cells, lambda nb: None),
        (hygiene.enough_text, lambda nb: nb.cells[1].update(source="a = 1\nb = 2")),
        (hygiene.enough_text, lambda nb: nb.cells[0].update(source="word " * 16)),
        (hygiene.alt_text, lambda nb: nb.cells[0].update(source="![](x.png)")),
        (hygiene.alt_text, lambda nb: nb.cells[0].update(source='<img src="x">')),
        (
            hygiene.alt_text,
            lambda nb: (
                nb.cells[1].outputs[0].data.update({"text/html": "<img alt=' '>"})
            ),
        ),
        (
            hygiene.alt_text,
            lambda nb: nb.cells[1].outputs[0].update(data={"image/png": "x"}),
        ),
        (
            hygiene.no_local_paths,
            lambda nb: nb.cells[1].outputs.append(_stream("in /home/someone/x")),
        ),
        (
            hygiene.no_local_paths,
            lambda nb: nb.cells[1].update(source=r"open('C:\\Users\\me')"),
        ),
        (lambda nb: hygiene.stable_ids(nb, "x"), lambda nb: None),
    ],
)
def test_planted_defects_are_found(check, plant):
    nb = copy.deepcopy(good())
    plant(nb)
    assert check(nb)


def test_lines_of_code_are_counted_without_comments():
    source = '"""Text\nover lines."""\n\n# why\na = 1\nb = [\n    2,\n]\n%time a\n'
    assert hygiene.code_lines(source) == 5
    assert hygiene.code_lines('def f():\n    """Text."""\n    return """x\ny"""') == 3


def test_a_file_that_is_too_large(tmp_path):
    path = tmp_path / "x.ipynb"
    path.write_bytes(b" " * hygiene.MAX_BYTES)
    assert hygiene.small(path)
