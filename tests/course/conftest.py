"""A folder with tiny notebooks and the lesson modules that belong to them."""

from pathlib import Path

import nbformat
import pytest

LESSON = """
from pydantic import Field
from medtut.course.profiles import LessonSettings

class Settings(LessonSettings):
    steps: int = Field(ge=1)
    lr: float = Field(gt=0)
    ranks: tuple[int, ...] = (4, 8)
    name: str = "lora"

PRESETS = {"smoke": {"steps": 2, "lr": 1e-2}, "quick": {"steps": 10, "lr": 1e-3},
           "full": {"steps": 100, "lr": 1e-3}}
KEY_NUMBERS = [("loss", "final loss", ".3f"), ("per.dice", "Dice", "{:.0%}"),
               ("never", "not recorded", ".1f")]
COHORT_VERSION = "c1"
ARMS = {"lora": {"name": "lora"}, "full": {"name": "full", "lr": 1e-4}}

def run_arm(arm, seed, settings):
    if seed == 13:
        raise ValueError("diverged")
    return {"dice": 0.5 + seed / 100, "lr": settings.lr}
"""
PARAMETERS = """profile = "quick"
seed = 0
data = None
out = None
steps = None
lr = None
ranks = None
name = None"""
OPEN = """from medtut.course import open_lesson
lesson = open_lesson("{slug}", profile=profile, seed=seed, data=data, out=out,
                     steps=steps, lr=lr, ranks=ranks, name=name)"""
DRAW = """from matplotlib.figure import Figure
fig = Figure(figsize=(2, 2))
fig.subplots().plot([1, 2])
lesson.show(fig, "line", "A line that goes up")
lesson.record(loss=0.25, per={"dice": 0.8}, steps=lesson.steps)
print("written to", lesson.out)"""


def make_notebook(path: Path, cells: list[tuple], kernelspec: bool = True) -> Path:
    """Write a notebook from ``(kind, source[, tags[, metadata]])``."""
    nb = nbformat.v4.new_notebook()
    if kernelspec:
        nb.metadata["kernelspec"] = {
            "name": "python3",
            "display_name": "Python 3",
            "language": "python",
        }
    for index, (kind, source, *rest) in enumerate(cells):
        make = getattr(nbformat.v4, f"new_{kind}_cell")
        cell = make(source, id=f"cell{index}")
        if rest:
            cell.metadata["tags"] = rest[0]
        if len(rest) > 1:
            cell.metadata["medtut"] = rest[1]
        nb.cells.append(cell)
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nb, path)
    return path


def lesson_cells(slug: str) -> list[tuple]:
    """Return the cells of a small lesson that works."""
    return [
        ("markdown", "# A small lesson about $x^2$"),
        ("code", PARAMETERS, ["parameters"]),
        ("code", OPEN.format(slug=slug)),
        ("code", DRAW),
        ("code", "lesson.finish()"),
    ]


@pytest.fixture
def course(tmp_path, monkeypatch):
    """An own folder of notebooks with lesson 90; the current folder is a fresh one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MEDTUT_PROFILE", raising=False)
    monkeypatch.setenv("MEDTUT_NOTEBOOKS", str(tmp_path / "notebooks"))
    lessons = tmp_path / "notebooks" / "lessons"
    lessons.mkdir(parents=True)
    for number in ("90", "91", "92"):
        (lessons / f"l{number}.py").write_text(LESSON, encoding="utf-8")
    make_notebook(tmp_path / "notebooks" / "90_tiny.ipynb", lesson_cells("90_tiny"))
    return tmp_path


@pytest.fixture
def notebook():
    """Return the function that writes notebooks, with the cells of a lesson."""
    make_notebook.cells = lesson_cells
    make_notebook.parameters = PARAMETERS
    make_notebook.open = lambda slug: OPEN.format(slug=slug)
    return make_notebook
