"""How a program of this project ends: exit codes, and one clear line instead of a traceback where the user can act."""

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from tqdm import tqdm

INTERRUPTED, TERMINATED = 130, 143  # 128 + the signal's number, as shells have it


class BadInput(Exception):
    """Something the user gave cannot work; the message says what, and what to do. Exit code 2."""


class TrainingFault(Exception):
    """The run cannot go on, for a reason that needs no traceback; the message says what to do. Exit code 1."""


@contextmanager
def exit_codes() -> Iterator[None]:
    """Turn faults with a known remedy into one line and an exit code; anything else keeps its traceback."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show must not end a run
    try:
        yield
    except BadInput as error:
        finish(2, str(error))
    except TrainingFault as error:
        finish(1, str(error))
    except KeyboardInterrupt:
        finish(INTERRUPTED, "interrupted before there was anything to save")
    except BrokenPipeError:  # whoever read the output has gone, as `head` does: nobody is left to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (RuntimeError, MemoryError, OSError) as error:
        if not (message := remedy(error)):
            raise
        finish(1, message, only_main=False)


def remedy(error: Exception) -> str | None:
    """What to do about a fault of the machine; None for a fault of the program."""
    text = str(error)
    # torch.OutOfMemoryError is the GPU's; the CPU's allocator raises a plain RuntimeError.
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in text:
        return (
            "out of memory. A smaller --batch-size needs less; --accumulate 2 then keeps the size of an update. "
            "What was saved last is whole: --resume continues from it"
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full: {text}. What was saved last is whole: make room and --resume"
    if rank() and any(sign in text for sign in ("Connection closed by peer", "Connection reset by peer")):
        return "another process has ended, so this one cannot go on"
    return None


def rank() -> str | None:
    """This process among those that torchrun started; None when it is alone."""
    return os.environ.get("RANK") if os.environ.get("WORLD_SIZE", "1") != "1" else None


def finish(code: int, message: str, only_main: bool = True) -> None:
    """Say why, and leave. What all processes know, the main one says for all."""
    if not only_main or rank() in (None, "0"):
        label = "error" if code in (1, 2) else "stopped"
        label += f" in process {rank()}" if rank() else ""
        tqdm.write(f"{label}: {message}", file=sys.stderr)  # not into the middle of a progress bar
    sys.exit(code)
