"""``make notebooks``: ids, stamps, stored outputs, and whether text and file agree."""

import json

import nbformat
import pytest

from medtut.errors import MedtutError
from tools import notebooks, percent

TEXT = """# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A lesson
# <!-- medtut:colab --><!-- /medtut:colab -->
# <!-- medtut:cost --><!-- /medtut:cost -->

# %%
import sys

if "google.colab" in sys.modules:
    # medtut:install
    # /medtut:install

# %% tags=["parameters"]
{parameters}

# %%
{open}

# %% tags=["exercise"] medtut={{"exercise": "90.1"}}
answer = 1

# %% [markdown]
# The same text.

# %% [markdown]
# The same text.

# %%
lesson.record(loss=0.5)
lesson.finish()
"""


@pytest.fixture
def text(course, notebook):
    """Write the text form of lesson 90 and return its path."""
    path = course / "notebooks" / "source" / "90_tiny.py"
    path.parent.mkdir()
    content = TEXT.format(parameters=notebook.parameters, open=notebook.open("90_tiny"))
    # An if with nothing but comments is completed by the build's stamp.
    path.write_text(content, encoding="utf-8")
    percent.repository.cache_clear()
    yield path
    percent.repository.cache_clear()


def address(course, value):
    (course / "pyproject.toml").write_text(
        f'[project]\nname = "medtut"\n[tool.medtut]\nrepository = "{value}"\n'
        'branch = "main"\n',
        encoding="utf-8",
    )
    percent.repository.cache_clear()


def test_ids_do_not_depend_on_chance(text):
    one, two = (percent.build(text, "90_tiny") for _ in range(2))
    ids = [cell["id"] for cell in one.cells]
    assert ids == [cell["id"] for cell in two.cells]
    assert len(set(ids)) == len(ids) == 8
    assert ids[5] != ids[6]
    nbformat.validate(one)
    assert one.cells[4].metadata == {
        "tags": ["exercise"],
        "medtut": {"exercise": "90.1"},
    }


def test_badge_only_with_an_address(course, text):
    nb = percent.build(text, "90_tiny")
    assert "colab.research" not in nb.cells[0].source
    assert "raise RuntimeError" in nb.cells[1].source
    address(course, "https://github.com/someone/medtut")
    nb = percent.build(text, "90_tiny")
    assert (
        "github/someone/medtut/blob/main/notebooks/90_tiny.ipynb" in nb.cells[0].source
    )
    line = 'system("pip install -q git+https://github.com/someone/medtut@main")'
    assert line in nb.cells[1].source
    compile(nb.cells[1].source, "cell", "exec")
    address(course, "")
    assert "colab.research" not in percent.build(text, "90_tiny").cells[0].source


def test_build_stores_outputs_and_numbers(course, text):
    path = notebooks.build_notebook("90_tiny", profile="smoke")
    first = nbformat.read(path, as_version=4)
    counts = [c.execution_count for c in first.cells if c.cell_type == "code"]
    assert counts == [1, 2, 3, 4, 5]
    assert "numbers and 0 figures" in first.cells[-1].outputs[0].text
    assert "| smoke |" in first.cells[0].source
    assert str(course) not in path.read_text(encoding="utf-8")
    stored = course / "notebooks" / "metrics" / "90_tiny.json"
    assert json.loads(stored.read_text(encoding="utf-8"))["status"] == "complete"
    costs = (course / "benchmarks" / "costs.json").read_text(encoding="utf-8")
    assert json.loads(costs)["90_tiny"]["smoke"]["seconds"] > 0
    assert notebooks.check_step("90_tiny") == []

    # A sentence more costs no run: outputs of unchanged cells stay.
    content = text.read_text(encoding="utf-8")
    text.write_text(
        content.replace("# The same text.", "# Another text.", 1).replace(
            "answer = 1", "answer = 2"
        ),
        encoding="utf-8",
    )
    assert len(notebooks.check_step("90_tiny")) == 2
    notebooks.build_notebook("90_tiny", execute=False)
    again = nbformat.read(path, as_version=4)
    assert notebooks.check_step("90_tiny") == []
    assert again.cells[-1].outputs == first.cells[-1].outputs
    assert again.cells[4].execution_count is None
    assert "| smoke |" in again.cells[0].source


def test_a_failing_build_leaves_the_notebook(course, text):
    path = course / "notebooks" / "90_tiny.ipynb"
    before = path.read_bytes()
    content = text.read_text(encoding="utf-8")
    text.write_text(content.replace("answer = 1", "1 / 0"), encoding="utf-8")
    with pytest.raises(MedtutError, match="unchanged"):
        notebooks.build_notebook("90_tiny", profile="smoke")
    assert path.read_bytes() == before


def test_out_of_step_is_named(course, text):
    path = notebooks.build_notebook("90_tiny", execute=False)
    nb = nbformat.read(path, as_version=4)
    nb.cells[0].source = nb.cells[0].source.replace(
        "<!-- medtut:cost -->", "<!-- medtut:cost -->another number"
    )
    nbformat.write(nb, path)
    assert notebooks.check_step("90_tiny") == []
    nb.cells[4].metadata["tags"] = []
    nb.cells[5].source = "other"
    nb.cells.pop()
    nbformat.write(nb, path)
    said = "\n".join(notebooks.check_step("90_tiny"))
    for piece in ("8 cells in the text, 7", "cell 5: tags", "cell 6 reads differently"):
        assert piece in said
    assert "no text form" in notebooks.check_step("91_x")[0]
