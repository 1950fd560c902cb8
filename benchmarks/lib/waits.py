"""How often the host waits for the GPU, counted by PyTorch's own debug mode for that."""

import contextlib
import linecache
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.lib.programs import read_after_updates, run_train


class Waits:
    """Counts while counting() is active, and by line of code. Without a GPU there are none."""

    def __init__(self):
        self.count, self.by_line = 0, Counter()

    @contextlib.contextmanager
    def counting(self) -> Iterator["Waits"]:
        """Each wait is a warning of PyTorch's, which is counted instead of shown."""
        if not torch.cuda.is_available():
            yield self
            return
        with warnings.catch_warnings():
            warnings.filterwarnings("always", message="called a synchronizing CUDA operation")
            warnings.showwarning = self.note
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield self
            finally:
                torch.cuda.set_sync_debug_mode("default")

    def note(
        self, message: Warning, category: type, file: str, number: int, *_: object, **__: object
    ) -> None:
        if "synchronizing CUDA operation" in str(message):
            self.count += 1
            line = linecache.getline(file, number).partition("  #")[0].strip()
            self.by_line[f"{Path(file).name}: {line}"] += 1


def waits_of_training(flags: list[str], updates: int) -> tuple[float, Waits]:
    """Train with train.py. -> the waits of an update on average, and all that was counted.

    The update that warms up is counted, but is not in the average.
    """
    waits = Waits()

    def counted(flags: list[str]) -> None:
        with waits.counting():
            run_train(flags)

    counts = read_after_updates(counted, flags, updates, lambda: waits.count)
    return (counts[-1] - counts[0]) / updates, waits
