"""How often the host waits for the GPU, counted by PyTorch's own debug mode for that."""

import contextlib
import linecache
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch


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
