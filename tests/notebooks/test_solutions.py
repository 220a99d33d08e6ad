"""Every solution runs with the names its own notebook imports, and is correct."""

import ast
from pathlib import Path

import nbformat
import pytest

from medtut.course.exercises import exercise, solution_source

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("[0-9]*.ipynb"))
CASES = [
    (path, cell.metadata["medtut"]["exercise"])
    for path in NOTEBOOKS
    for cell in nbformat.read(path, as_version=4).cells
    if "exercise" in cell.metadata.get("medtut", {})
]


def imported(path: Path) -> dict:
    """Names of the standard library and torch that the notebook has imported."""
    scope: dict = {}
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type != "code":
            continue
        for node in ast.walk(ast.parse(cell.source)):
            light = isinstance(node, ast.Import) or (
                isinstance(node, ast.ImportFrom)
                and node.module
                and node.module.startswith("torch")
            )
            if light:
                exec(compile(ast.Module([node], []), path.name, "exec"), scope)
    return scope


@pytest.mark.parametrize(("path", "number"), CASES, ids=[number for _, number in CASES])
def test_solution_is_correct_in_its_notebook(path, number):
    scope = imported(path)
    source = solution_source(number)
    exec(source, scope)
    function = ast.parse(source).body[-1].name
    outcome = exercise(number).check(scope[function])
    assert outcome.status == "correct", outcome.message
