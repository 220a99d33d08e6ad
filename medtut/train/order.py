"""Which sample comes when, and what its augmentation draws.

Both follow from the seed and the position in the run alone. So a run that was cut off
goes on in the middle of an epoch, and the number of processes or of loading workers
changes nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


def sample_at(position: int, size: int, seed: int) -> int:
    """Return the index of the sample at ``position``, the samples of a run in a row.

    Every epoch is a permutation drawn from (seed, epoch); a batch may reach over the
    end of one, so no sample is left out and none is preferred.
    """
    epoch, within = divmod(position, size)
    return int(epoch_order(size, seed, epoch)[within])


@functools.lru_cache(maxsize=1)
def epoch_order(size: int, seed: int, epoch: int) -> np.ndarray:
    """Return the permutation of one epoch, shape (size,)."""
    return np.random.default_rng([seed, epoch]).permutation(size)


@dataclasses.dataclass(eq=False)
class Batches(torch.utils.data.Sampler):
    """Batches of one process, from a given step on.

    Parameters
    ----------
    size : int
        Samples in the data set.
    batch : int
        Samples in one batch, all processes together.
    first, last : int
        Batches of the run: ``first`` is the next one, ``last`` the one after the end.
    seed, process, processes : int
    """

    size: int
    batch: int
    first: int
    last: int
    seed: int
    process: int
    processes: int

    def __len__(self) -> int:
        return self.last - self.first

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for number in range(self.first, self.last):
            start = number * self.batch
            own = range(start + self.process, start + self.batch, self.processes)
            yield [(place, sample_at(place, self.size, self.seed)) for place in own]


class Seeded(torch.utils.data.Dataset):
    """A data set whose items are drawn under a seed of their own.

    Without this, an augmentation would depend on how many workers there are and on
    what they drew before a restart.
    """

    def __init__(self, data: Any, seed: int) -> None:
        self.data, self.seed = data, seed

    def __getitem__(self, key: tuple[int, int]) -> Any:
        position, index = key
        with own_randomness(self.seed, position):
            return self.data[index]


@contextlib.contextmanager
def own_randomness(seed: int, position: int) -> Iterator[None]:
    """Seed Python, NumPy and torch (CPU) inside, and put them back after."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    words = np.random.SeedSequence([seed, position, 0x6D74]).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    torch.random.default_generator.manual_seed(int(words[2]))
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
