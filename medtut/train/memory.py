"""How much memory a run needed at its peak."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from medtut.machine import MemorySampler


class PeakMemory(contextlib.ExitStack):
    """Measure the peak between entering and leaving, in MB (10^6 bytes).

    On CUDA: the most that torch had allocated. Elsewhere: the largest resident size of
    the whole process, looked at twenty times a second (the kernel's own high-water mark
    cannot be reset without spoiling it for whoever else reads it).
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._cuda = device if device.type == "cuda" else None
        self._sampler = MemorySampler()

    def __enter__(self) -> Any:
        if self._cuda:
            torch.cuda.reset_peak_memory_stats(self._cuda)
        else:
            self.enter_context(self._sampler)
        return super().__enter__()

    @property
    def mb(self) -> float:
        """The peak so far."""
        if self._cuda:
            return torch.cuda.max_memory_allocated(self._cuda) / 1e6
        self._sampler.look()
        return self._sampler.peak / 1e6
