"""Ctrl-C, SIGTERM and a closed terminal stop a run after an update, once its state is saved."""

import os
import signal

import torch

from transformer_scratch.errors import when_main_ends
from transformer_scratch.processes import Processes


class Signals:
    """Remembers the first signal. A Ctrl-C after it exits at once, with the files as they are."""

    def __init__(self, processes: Processes):
        self.processes = processes
        self.received = 0
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            before = signal.getsignal(number)
            if before != signal.SIG_IGN:  # nohup ignores SIGHUP: that is to stay so
                signal.signal(number, self.remember)
                when_main_ends(signal.signal, number, before)

    def remember(self, number: int, frame: object) -> None:
        if self.received and number == signal.SIGINT:
            os._exit(128 + number)
        self.received = self.received or number

    def exchange(self) -> int:
        """The number of a signal that any process has received, 0 for none; the same on all.

        All processes must call it at the same point, and so they stop after the same update.
        """
        if self.processes.world_size == 1:
            return self.received
        # A tensor on the CPU: asking must not wait for the GPU.
        received = torch.tensor([self.received])
        torch.distributed.all_reduce(received, torch.distributed.ReduceOp.MAX)
        return int(received)
