"""How a program ends: its exit code, one clear line where the user can act, nothing left behind."""

import atexit
import errno
import functools
import os
import random
import sys
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from contextvars import ContextVar

import torch

from transformer_scratch.output import lenient_output


class BadInput(Exception):
    """Something the user gave cannot work; the message says what, and what to do. Exit code 2."""

    exit_code = 2


class TrainingFault(Exception):
    """The run cannot continue, for a known reason; the message says what to do. Exit code 1."""

    exit_code = 1


class Stopped(Exception):
    """A signal asked the run to stop, and its state is saved; the message says how to resume it."""

    def __init__(self, signal_number: int, message: str):
        super().__init__(message)
        self.exit_code = 128 + signal_number  # the convention of shells


# What to undo when the main function that runs ends; each thread may run one.
endings: ContextVar[ExitStack | None] = ContextVar("endings", default=None)


def exits_cleanly(main: Callable) -> Callable:
    """Let main either return, or print one line that says why and exit.

    Exit codes: 2 BadInput, 128 + signal Stopped, 1 anything else; a fault of the program keeps its
    traceback. Before that, whatever main changed in the process is undone (see when_main_ends).
    """

    @functools.wraps(main)
    def run(*arguments: object, **options: object) -> object:
        with lenient_output():
            try:
                with ExitStack() as undo:
                    before = endings.set(undo)
                    # tyro, which reads the flags, draws random numbers for its cache.
                    undo.callback(random.setstate, random.getstate())
                    try:
                        return main(*arguments, **options)
                    finally:
                        endings.reset(before)
            except (Stopped, BadInput, TrainingFault) as error:
                leave(error.exit_code, str(error))
            except KeyboardInterrupt:
                leave(130, "interrupted; there was nothing to save")
            except Exception as error:
                if message := remedy(error):
                    leave(1, message, every_process=True)
                traceback.print_exc()
                sys.exit(1)

    return run


def exit_code_so_far() -> int:
    """The code that the program will exit with, for functions that are called when main ends."""
    error = sys.exc_info()[1]
    if error is None:
        return 0
    return getattr(error, "exit_code", 1)


def when_main_ends(function: Callable, *arguments: object) -> None:
    """Call the function when main ends, however it ends: to undo a process-wide change."""
    if undo := endings.get():
        undo.callback(function, *arguments)
    else:  # called outside a main function
        atexit.register(function, *arguments)


def remedy(error: Exception) -> str | None:
    """What to do about a fault of the machine; None for a fault of the program."""
    text = str(error)
    # torch.OutOfMemoryError is the GPU's; the CPU's allocator raises a plain RuntimeError.
    out_of_memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
    if out_of_memory or "can't allocate memory" in text:
        return (
            "out of memory. A smaller --batch-size needs less; --accumulate 2 then keeps the size "
            "of an update. What was saved last is whole: --resume continues from it"
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full: {text}. What was saved last is whole: make room and --resume"
    if isinstance(error, OSError) and error.errno in (errno.EIO, errno.EROFS, errno.ESTALE):
        return f"the disk fails: {text}. What was saved last is whole: --resume continues from it"
    peer_is_gone = "Connection closed by peer" in text or "Connection reset by peer" in text
    if rank() and peer_is_gone:
        return "another process has ended, so this one cannot continue"
    return None


def leave(code: int, message: str, every_process: bool = False) -> None:
    """Say why, and exit. A message common to processes that have met is printed by the main one."""
    have_met = rank() is not None and torch.distributed.is_initialized()
    if every_process or not have_met or rank() == "0":
        label = "error" if code in (1, 2) else "stopped"
        label += f" in process {rank()}" if have_met else ""
        print(f"{label}: {message}", file=sys.stderr)
    sys.exit(code)


def rank() -> str | None:
    """This process among those that torchrun started; None when it is alone."""
    return os.environ.get("RANK") if os.environ.get("WORLD_SIZE", "1") != "1" else None
