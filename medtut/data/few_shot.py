"""Which volumes a few-shot experiment learns from, chooses by, and is judged on.

A result with k labelled volumes depends on which k they were. A `Protocol` draws them
once per seed, in one order, so that the support of k = 1 is part of that of k = 5, and
saves the ids. Upstream draws anew for every k, trains on 29 volumes where it says 30,
and reads one more than k (``fseft/datasets/dataset.py:57-62``); see
`published_support`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medtut.data.cache import digest
from medtut.data.organs import fault
from medtut.files import write_json


@dataclass(frozen=True)
class Protocol:
    """Ids per k and seed; made by `draw_protocol`.

    Attributes
    ----------
    name : what is segmented, for example "spleen".
    shots : the k, ascending.
    orders : one per seed: the support ids, as many as the largest k.
    validation : one per seed, perhaps empty.
    test : the same for all.
    """

    name: str
    shots: tuple[int, ...]
    orders: tuple[tuple[str, ...], ...]
    validation: tuple[tuple[str, ...], ...]
    test: tuple[str, ...]

    def __post_init__(self) -> None:
        name, k = self.name, max(self.shots, default=0)
        filled = self.shots and self.orders and self.test
        ascending = list(self.shots) == sorted(set(self.shots))
        if not filled or not ascending or self.shots[0] < 1:
            n = {"seeds": len(self.orders), "tests": len(self.test)}
            raise fault("protocol", name=name, shots=self.shots, **n)
        pairs = zip(self.orders, self.validation, strict=True)
        for seed, (order, held) in enumerate(pairs):
            if len(order) != k:
                raise fault("support", name=name, seed=seed, have=len(order), k=k)
            if twice := _twice([*order, *held, *self.test]):
                raise fault("overlap", name=name, seed=seed, ids=", ".join(twice[:5]))

    def support(self, k: int, seed: int) -> tuple[str, ...]:
        """Return exactly k ids.

        Raises
        ------
        OrganError
            A k or seed that was not drawn.
        """
        if k not in self.shots or not 0 <= seed < len(self.orders):
            there = {"shots": self.shots, "seeds": len(self.orders)}
            raise fault("not_drawn", name=self.name, k=k, seed=seed, **there)
        return self.orders[seed][:k]


def draw_protocol(
    pool: Iterable[str], test: Iterable[str], shots: Sequence[int] = (1, 5, 10),
    seeds: int = 5, validation: int = 0, name: str = "",
    voxels: Mapping[str, int] | None = None,
) -> Protocol:  # fmt: skip
    """Draw the support volumes of every seed.

    Parameters
    ----------
    pool : ids to learn from; their order does not matter.
    test : ids to judge on.
    shots : the numbers k of labelled volumes.
    seeds : how many draws.
    validation : volumes per seed that are drawn beside the support, for those who
        choose by labelled volumes of their own. They are labelled volumes too: a fair
        count says k + validation. `leave_one_out` needs none.
    name : of the task.
    voxels : id -> voxels of the structure, where known
        A support volume without any teaches nothing of it, and a "1-shot" run on it
        would be zero-shot: refused.

    Raises
    ------
    OrganError
        Ids in pool and test, doubled ids, more volumes asked for than there are, or a
        pool volume in which the structure is empty.
    """
    pool, test, k = sorted(pool), tuple(sorted(test)), max(shots, default=0)
    bare = [i for i in pool if voxels is not None and not voxels.get(i)]
    both = sorted(set(pool) & set(test))
    for key, bad in ("in_both", both), ("twice", _twice(pool)), ("bare", bare):
        if bad:
            raise fault(key, name=name, count=len(bad), ids=", ".join(bad[:5]))
    if (need := k + validation) > len(pool):
        asked = {"k": k, "validation": validation, "need": need, "have": len(pool)}
        raise fault("too_many", name=name, **asked)
    drawn = [np.random.default_rng(s).permutation(pool).tolist() for s in range(seeds)]
    orders = tuple(tuple(d[:k]) for d in drawn)
    held = tuple(tuple(d[k:need]) for d in drawn)
    return Protocol(name, tuple(sorted(set(shots))), orders, held, test)


def leave_one_out(support: Sequence[str]) -> tuple[tuple[tuple[str, ...], str], ...]:
    """Return (volumes to train on, the one held out) for every volume, if k >= 3.

    The number of steps is chosen by the held-out volumes' mean and then used on all k,
    so nothing but the k volumes is looked at. Below 3 a fold trains on one volume at
    most and says little: () is returned, and a fixed number of steps is to be taken.
    """
    if len(support) < 3:
        return ()
    return tuple((tuple(s for s in support if s != i), i) for i in support)


def published_support(ids: Sequence[str], k: int, fold: int) -> tuple[list[str], str]:
    """Return what upstream trains on and the volume it leaves aside; for the autopsy.

    It samples min(k + 1, 30) of the list and takes the last one away, so k = 30 trains
    on 29 (``fseft/datasets/dataset.py:57-62``). Folds count from 1.
    """
    drawn = random.Random(fold - 1).sample(list(ids), min(k + 1, 30))
    return drawn[:-1], drawn[-1]


def save_protocol(path: Path | str, protocol: Protocol) -> Path:
    """Write a protocol as JSON with a digest, by rename.

    Raises
    ------
    OrganError
        If another one is there already: it is drawn once.
    """
    path, content = Path(path), asdict(protocol)
    if path.exists() and load_protocol(path) != protocol:
        raise fault("other_protocol", path=path)
    return write_json(path, content | {"digest": digest("few_shot", content)})


def load_protocol(path: Path | str, ids: Iterable[str] | None = None) -> Protocol:
    """Read a protocol back.

    Parameters
    ----------
    path : path
    ids : the volumes there are now, optional; more of them are no harm.

    Raises
    ------
    OrganError
        No such file, damaged, edited, not a valid protocol, or volumes are missing.
    """
    try:
        content = json.loads(Path(path).read_text("utf-8"))
        if content.pop("digest") != digest("few_shot", content):
            raise ValueError("it was changed after it was saved: its digest differs")
        protocol = Protocol(**{key: _tuples(v) for key, v in content.items()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise fault("no_protocol", path=path, error=repr(error)) from error
    groups = (*protocol.orders, *protocol.validation, protocol.test)
    gone = sorted(set().union(*groups) - set(ids)) if ids is not None else []
    if gone:
        raise fault("gone", path=path, count=len(gone), ids=", ".join(gone[:5]))
    return protocol


def _twice(ids: Sequence[str]) -> list[str]:
    return sorted({i for i in ids if ids.count(i) > 1})


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
