"""Who trains, who is frozen, who does nothing: the parameter ledger."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from medtut.lora.inject import Patterns, as_patterns, is_adapter

ROWS = ("adapter", "head", "decoder", "other trainable", "dead", "frozen")


@dataclass(frozen=True)
class Row:
    """One line: tensors, parameters, bytes in memory, bytes as a safetensors file."""

    tensors: int
    parameters: int
    memory: int
    disk: int


@dataclass(frozen=True)
class Ledger:
    """Parameters of a model by what happens to them.

    ``rows`` has the keys of :data:`ROWS`; "dead" parameters ask for a gradient and get
    none, and are in no other row. ``names`` lists the tensors of each row.
    """

    rows: dict[str, Row]
    names: dict[str, tuple[str, ...]]
    trained: Row
    total: Row

    @property
    def trainable(self) -> int:
        """Parameters that ask for a gradient, the dead ones included."""
        return self.trained.parameters

    def to_dict(self) -> dict[str, dict[str, int]]:
        """Plain numbers: row -> tensors, parameters, memory, disk."""
        rows = {**self.rows, "trainable": self.trained, "total": self.total}
        return {key: vars(row).copy() for key, row in rows.items()}

    def _table(self) -> list[tuple[str, ...]]:
        whole = max(self.total.parameters, 1)
        lines = []
        for key, row in self.to_dict().items():
            count, sizes = row["parameters"], (human(row["memory"]), human(row["disk"]))
            share = f"{100 * count / whole:.3f} %"
            if row["tensors"] or key not in ("head", "decoder", "other trainable"):
                lines.append((key, f"{row['tensors']:,}", f"{count:,}", share, *sizes))
        return lines

    def to_text(self) -> str:
        """An aligned table."""
        table = [_HEADINGS, *self._table()]
        first, *others = (max(map(len, column)) for column in zip(*table, strict=True))
        form = "  ".join([f"{{:<{first}}}", *(f"{{:>{width}}}" for width in others)])
        lines = [form.format(*row) for row in table]
        rule = "-" * len(lines[0])
        return "\n".join([lines[0], rule, *lines[1:-2], rule, *lines[-2:]])

    __str__ = to_text

    def _repr_html_(self) -> str:
        """The same table for a notebook, with header cells a screen reader uses."""
        head = "".join(f'<th scope="col">{h}</th>' for h in _HEADINGS)
        first = '<tr><th scope="row" style="text-align:left">{}</th>'
        line = first + 5 * '<td style="text-align:right">{}</td>' + "</tr>"
        body = "".join(line.format(*row) for row in self._table())
        return (
            "<table><caption>Parameter ledger</caption>"
            f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        )


_HEADINGS = ("part", "tensors", "parameters", "share", "in memory", "on disk")


def human(size: int) -> str:
    """Bytes in decimal units, three digits."""
    value, units = float(size), ["B", "kB", "MB", "GB"]
    while value >= 999.5 and len(units) > 1:
        value /= 1000
        units.pop(0)
    text = f"{value:.0f}" if units[0] == "B" or value >= 99.95 else f"{value:.1f}"
    return f"{text} {units[0]}"


def safetensors_size(tensors: dict[str, Tensor]) -> int:
    """Exact size in bytes of a safetensors file with these tensors, no metadata."""
    if not tensors:
        return 0
    header, offset = {}, 0
    for name in sorted(tensors, key=lambda n: (-tensors[n].element_size(), n)):
        t, start = tensors[name], offset
        offset += t.nbytes
        kind = str(t.dtype).removeprefix("torch.")  # float32 is written F32, uint8 U8
        kind = re.sub("(float|uint|int)", lambda m: m[1][0], kind).upper()
        place = {"shape": list(t.shape), "data_offsets": [start, offset]}
        header[name] = {"dtype": kind, **place}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False)
    return 8 + 8 * math.ceil(len(text.encode("utf-8")) / 8) + offset


def _row(tensors: dict[str, Tensor]) -> Row:
    return Row(
        len(tensors),
        sum(t.numel() for t in tensors.values()),
        sum(t.nbytes for t in tensors.values()),
        safetensors_size(tensors),
    )


def ledger(
    model: nn.Module,
    head: Patterns = (),
    decoder: Patterns = (),
    *,
    dead: Iterable[str] = (),
) -> Ledger:
    """Count the parameters of a model by what happens to them.

    Parameters
    ----------
    model : nn.Module
        On any device, also "meta". A tensor used in two places counts once.
    head, decoder : str or sequence of str
        Regular expressions searched in the names of trainable parameters.
    dead : sequence of str
        Names of parameters without gradient, from :func:`find_dead`.

    Returns
    -------
    Ledger

    Raises
    ------
    LoRAError
        If an expression is not valid.
    """
    heads, decoders = as_patterns(head, "head"), as_patterns(decoder, "decoder")
    dead = set(dead)
    tensors: dict[str, dict[str, Tensor]] = {row: {} for row in ROWS}
    for name, p in model.named_parameters():
        fits = {
            "frozen": not p.requires_grad,
            "dead": name in dead,
            "adapter": is_adapter(name),
            "head": any(h.search(name) for h in heads),
            "decoder": any(d.search(name) for d in decoders),
        }
        row = next((row for row, so in fits.items() if so), "other trainable")
        tensors[row][name] = p
    trained = {n: t for row in ROWS if row != "frozen" for n, t in tensors[row].items()}
    return Ledger(
        {row: _row(group) for row, group in tensors.items()},
        {row: tuple(group) for row, group in tensors.items()},
        _row(trained),
        _row(trained | tensors["frozen"]),
    )


def find_dead(model: nn.Module, loss: Tensor) -> list[str]:
    """Names of trainable parameters that the loss does not reach.

    ``.grad`` is left alone and the graph is kept, so ``loss.backward()`` still works.
    A gradient of zeros is not dead: at the start, LoRA's ``B = 0`` makes that of every
    ``A`` zero.

    Parameters
    ----------
    model : nn.Module
    loss : Tensor
        A scalar.
    """
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    if not named or not loss.requires_grad:
        return [n for n, _ in named]
    grads = torch.autograd.grad(
        loss, [p for _, p in named], retain_graph=True, allow_unused=True
    )
    return [n for (n, _), g in zip(named, grads, strict=True) if g is None]
