"""Ctrl-C and SIGTERM end a run at the next update, after its state is saved; on all processes at the same update."""

import os
import signal

import torch

from transformer_scratch.runtime import Processes


class StopRequest:
    """Remembers the first signal. A second Ctrl-C leaves at once, with the files as they are (each is whole)."""

    def __init__(self, processes: Processes):
        self.processes = processes
        self.signal = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.remember)

    def remember(self, number: int, frame: object) -> None:
        if self.signal and number == signal.SIGINT:
            os._exit(128 + number)
        self.signal = number

    def exit_code(self) -> int:
        """0 to go on, otherwise what to exit with: 130 or 143. All processes get the same answer."""
        if self.processes.world_size == 1:
            return 128 + self.signal if self.signal else 0
        # A tensor on the CPU: asking must not wait for the GPU.
        asked = torch.tensor([self.signal])
        torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
        return 128 + int(asked) if int(asked) else 0
