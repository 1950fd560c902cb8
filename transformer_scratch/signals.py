"""Ctrl-C, SIGTERM, a closed terminal and others stop a run once its state is saved."""

import os
import signal
import threading
from pathlib import Path

import torch

from transformer_scratch.errors import when_main_ends
from transformer_scratch.processes import Processes

# Ctrl-C; what a system sends that shuts down; what a terminal sends that closes; what batch systems
# send before they kill.
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGXCPU)


class Signals:
    """Remembers the first signal. A Ctrl-C after it exits at once, with the files as they are.

    received: its number, 0 for none. Whoever waits, for a data worker or a server, looks at it.
    """

    def __init__(self, processes: Processes):
        self.processes = processes
        self.received = 0
        if threading.current_thread() is not threading.main_thread():
            return  # Python handles signals in its main thread alone
        for number in STOPPING:
            before = signal.getsignal(number)
            # nohup ignores SIGHUP: that is to stay so. What a library in C hears stays its own.
            if before != signal.SIG_IGN and not (before == signal.SIG_DFL and is_handled(number)):
                signal.signal(number, self.remember)
                when_main_ends(signal.signal, number, before)

    def remember(self, number: int, frame: object) -> None:
        if self.received and number == signal.SIGINT:
            # print() may be in the middle of a line.
            os.write(2, b"\nstopped at once; --resume goes on from what was saved last\n")
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


def is_handled(number: int) -> bool:
    """Whether the system knows a handler: signal.getsignal does not know those set in C."""
    status = Path("/proc/self/status")  # of Linux
    if not status.exists():
        return False
    mask = status.read_text(encoding="utf-8").split("SigCgt:")[1].split()[0]
    return bool(int(mask, 16) >> (number - 1) & 1)
