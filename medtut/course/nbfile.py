"""What can be said about a notebook file, and cleaning an executed one."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medtut.course.profiles import SettingsError

WIDGETS = "application/vnd.jupyter.widget-state+json"
VIEW = "application/vnd.jupyter.widget-view+json"
_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


@dataclass(frozen=True)
class CellError:
    """An error in an executed notebook.

    Attributes
    ----------
    index : int
        Position of the cell in the lesson, from 0, not counting the cells papermill
        put in; -1 for a widget that no cell claims.
    source : str
    text : str
        Name and message of the exception, or its traceback.
    """

    index: int
    source: str
    text: str

    def __str__(self) -> str:
        where = f"cell {self.index + 1}" if self.index >= 0 else "somewhere"
        source = "\n".join(f"    {line}" for line in self.source.splitlines())
        return f"{where}:\n{source}\n{self.text}".replace("\n\n", "\n")


def read_notebook(path: Path) -> Any:
    """Read a notebook in format 4.

    Raises
    ------
    SettingsError
        When the file is no notebook.
    """
    import nbformat

    try:
        return nbformat.read(str(path), as_version=4)
    except FileNotFoundError:
        raise SettingsError(f"there is no notebook {path}") from None
    except Exception as error:
        raise SettingsError(f"{path} cannot be read as a notebook: {error}") from None


def write_notebook(nb: Any, path: Path) -> Path:
    """Write a notebook by rename, ending in one newline."""
    import nbformat

    from medtut.files import write_text

    return write_text(path, nbformat.writes(nb).rstrip("\n") + "\n")


def tags(cell: Any) -> list[str]:
    """Return a cell's tags."""
    return list(cell.metadata.get("tags", []))


def parameters(nb: Any, name: str = "notebook") -> dict[str, Any]:
    """Return names and values of the parameters cell.

    Raises
    ------
    SettingsError
        No such cell, or a line in it that is not ``name = literal``: a value worked
        out there would be stale once papermill has put its own cell below.
    """
    cells = [cell for cell in nb.cells if "parameters" in tags(cell)]
    if (n := len(cells)) != 1:
        raise SettingsError(
            f"{name}: needs exactly one cell tagged 'parameters', has {n}"
        )
    values: dict[str, Any] = {}
    for node in ast.parse(cells[0].source).body:
        target = node.targets[0] if isinstance(node, ast.Assign) else None
        try:
            if not isinstance(target, ast.Name) or len(node.targets) != 1:
                raise ValueError
            values[target.id] = ast.literal_eval(node.value)
        except ValueError:
            raise SettingsError(
                f"{name}: the parameters cell may hold 'name = literal' lines only, "
                f"line {node.lineno} is {ast.unparse(node)!r}"
            ) from None
    return values


def find_errors(nb: Any) -> list[CellError]:
    """Return every error an executed notebook holds.

    Error outputs of cells (``sys.exit(0)`` too, which papermill takes for success),
    and errors that were caught into an Output widget: those are in the saved widget
    state and nowhere else.
    """
    cells = enumerate(nb.cells)
    outputs = [(k, out) for k, cell in cells for out in cell.get("outputs", [])]
    views = [(out.get("data", {}).get(VIEW, {}), k) for k, out in outputs]
    owners = {view.get("model_id"): k for view, k in views}
    told = [(k, _error_text(out)) for k, out in outputs if out.output_type == "error"]
    for model_id, caught in _widget_outputs(nb):
        texts, index = filter(None, map(_error_text, caught)), owners.get(model_id, -1)
        told += [(index, f"in a widget: {text}") for text in texts]
    return [error_at(nb, index, text) for index, text in told]


def error_at(nb: Any, index: int, text: str) -> CellError:
    """Make the `CellError` for a position in an executed notebook."""
    if nb is None or not 0 <= index < len(nb.cells):
        return CellError(-1, "", text)
    put_in = {"injected-parameters", "papermill-error-cell-tag"}
    extra = sum(bool(put_in & set(tags(cell))) for cell in nb.cells[:index])
    return CellError(index - extra, nb.cells[index].source, text)


def not_executed(nb: Any) -> list[int]:
    """Return positions of code cells that hold code but have no execution count."""
    code = [(k, c) for k, c in enumerate(nb.cells) if c.cell_type == "code"]
    return [k for k, c in code if c.source.strip() and not c.get("execution_count")]


def clean(nb: Any, hide: dict[str, str] | None = None) -> Any:
    """Strip what must not be stored, in place.

    Widget state (GitHub shows "Invalid Notebook" for it), papermill's records (they
    hold times and this machine's paths), empty tags; and in text outputs every key
    of `hide` is replaced by its value.
    """
    nb.metadata.pop("widgets", None)
    nb.metadata.pop("papermill", None)
    for cell in nb.cells:
        for key in ("papermill", "execution", "trusted", "collapsed"):
            cell.metadata.pop(key, None)
        if "tags" in cell.metadata and not cell.metadata.tags:
            del cell.metadata["tags"]
        for output in cell.get("outputs", []):
            _hide(output, hide or {})
    return nb


def _widget_outputs(nb: Any) -> Iterator[tuple[str, list[Any]]]:
    """Outputs caught by widgets, each with the outermost box that holds the widget."""
    states = nb.metadata.get("widgets", {}).get(WIDGETS, {}).get("state", {})
    box = {
        str(child).removeprefix("IPY_MODEL_"): model_id
        for model_id, model in states.items()
        for child in model.get("state", {}).get("children") or []
    }
    for model_id, model in states.items():
        outermost, seen = model_id, set()
        while outermost in box and outermost not in seen:
            seen.add(outermost)
            outermost = box[outermost]
        if outputs := model.get("state", {}).get("outputs"):
            yield outermost, list(outputs)


def _error_text(output: Any) -> str:
    text = "".join(output.get("text", ""))
    if output.get("output_type") == "error":
        text = f"{output.get('ename')}: {output.get('evalue')}"
    elif "Traceback (most recent call last)" not in text:
        return ""
    return _ANSI.sub("", text)


def _hide(output: Any, hide: dict[str, str]) -> None:
    for place in (output, output.get("data", {})):
        for key in [key for key in place if key.startswith("text")]:
            for secret, shown in hide.items():  # nbformat has joined the lines
                place[key] = place[key].replace(secret, shown)
