"""How much memory a run needed at its peak."""

from __future__ import annotations

import torch

from medtut.machine import MemorySampler


class PeakMemory(MemorySampler):
    """Measure the peak between entering and leaving, in MB (10^6 bytes).

    On CUDA: the most that torch had allocated. Elsewhere: the largest resident size of
    the whole process, looked at twenty times a second (the kernel's own high-water mark
    cannot be reset without spoiling it for whoever else reads it).
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._cuda = device if device.type == "cuda" else None
        if self._cuda:
            torch.cuda.reset_peak_memory_stats(self._cuda)

    def look(self) -> None:
        """Look once, now."""
        if self._cuda:
            self.peak = torch.cuda.max_memory_allocated(self._cuda)
        else:
            super().look()

    @property
    def mb(self) -> float:
        """The peak so far."""
        self.look()
        return self.peak / 1e6
