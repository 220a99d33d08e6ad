"""How much memory a run needed at its peak."""

from __future__ import annotations

import threading
from typing import Any

import torch


class PeakMemory:
    """Measure the peak between entering and leaving, in MB (10^6 bytes).

    On CUDA: the most that torch had allocated. Elsewhere: the largest resident size of
    the whole process, looked at twenty times a second (the kernel's own high-water mark
    cannot be reset without spoiling it for whoever else reads it).
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self._peak = device, 0
        self._stop = threading.Event()

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return self
        import psutil

        self._process = psutil.Process()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._look()
        self._thread.start()
        return self

    def __exit__(self, *unused: Any) -> None:
        if self.device.type != "cuda":
            self._stop.set()
            self._thread.join()

    def _look(self) -> None:
        self._peak = max(self._peak, self._process.memory_info().rss)

    def _watch(self) -> None:
        while not self._stop.wait(0.05):
            self._look()

    @property
    def mb(self) -> float:
        """The peak so far."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 1e6
        self._look()
        return self._peak / 1e6
