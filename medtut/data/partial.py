"""Sets that label some structures only: which ones, and how to draw from them.

Every hospital annotates what it needs. A volume whose labels do not name the pancreas
has one all the same, and its voxels are "unknown", not "background":
`annotated_mask` says which structures a volume speaks about, and the loss
(`medtut.models.partial_loss`) keeps to them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medtut.data.organs import STRUCTURES, fault


@functools.cache
def pretraining_sets() -> dict[str, dict[str, Any]]:
    """Return the registry of the published pretraining sets, ``abdomen_sets.yml``.

    Name -> ``set``, ``folder`` (in upstream's lists), ``listed`` (its volumes there),
    ``cases`` (as published), ``where``, ``terms``, ``cite``, ``layout`` and ``native``
    (names of image and labels, there and in the download), ``ids``
    (structure -> id on disk, or [id, side]; see `medtut.data.organ_records.Record`) and
    ``note``. The six tasks of MSD have an entry each, so nine sets are 14 entries.
    """
    import yaml

    file = Path(__file__).with_name("abdomen_sets.yml")
    return yaml.safe_load(file.read_text(encoding="utf-8"))


def set_of(path: str, where: str) -> dict[str, Any]:
    """Return the entry of `pretraining_sets` that a path of upstream's lists is of.

    Raises
    ------
    OrganError
        A path of no known set; `where` says where it stands.
    """
    folders = {one["folder"]: one for one in pretraining_sets().values()}
    for folder, known in folders.items():
        if path.startswith(folder + "/"):
            return known
    raise fault("unknown_set", where=where, path=path, known=", ".join(folders))


def annotated_mask(
    names: Iterable[str], structures: Sequence[str] = STRUCTURES
) -> np.ndarray:
    """Return (S,) bool: which of the structures are among the names."""
    return np.isin(structures, list(names))


class BalancedSampler:
    """Indices for a DataLoader, every group as often as the others.

    Groups take turns in a random order; within a group every volume comes before one
    comes again. By volumes alone AbdomenCT-1K (706 of 2,042) would be seen fifty times
    as often as CHAOS (14). Upstream balances too, but draws with numpy's global
    generator, with replacement (``pretrain/datasets/utils.py:40-47``).

    Parameters
    ----------
    groups : the group of every volume, such as its hospital.
    length : indices per epoch; by default as many as volumes.
    seed : int

    Raises
    ------
    OrganError
        No volume, or no length.
    """

    def __init__(
        self, groups: Sequence[str], length: int | None = None, seed: int = 0
    ) -> None:
        self.length = len(groups) if length is None else length
        if not len(groups) or self.length < 1:
            raise fault("sampler", volumes=len(groups), length=self.length)
        self.groups, self.seed, self.epoch = np.asarray(groups), seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Draw another order; the same on every process, as accelerate needs it."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self.seed, self.epoch])
        queues: dict[str, list[int]] = {}
        turn: list[str] = []
        for _ in range(self.length):
            turn = turn or rng.permutation(np.unique(self.groups)).tolist()
            group = turn.pop()
            members = np.flatnonzero(self.groups == group)
            queue = queues.get(group) or rng.permutation(members).tolist()
            yield queue.pop()
            queues[group] = queue
