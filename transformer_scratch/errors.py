"""How a program of this project ends: exit codes, and one clear line instead of a traceback where the user can act."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

INTERRUPTED, TERMINATED = 130, 143  # 128 + the signal's number, as shells have it


class BadInput(Exception):
    """Something the user gave cannot work; the message says what, and what to do. Exit code 2."""


class TrainingFault(Exception):
    """The run cannot go on, for a reason that needs no traceback; the message says what to do. Exit code 1."""


@contextmanager
def exit_codes() -> Iterator[None]:
    """Turn faults with a known remedy into one line and an exit code; anything else keeps its traceback."""
    try:
        yield
    except BadInput as error:
        finish(2, str(error))
    except TrainingFault as error:
        finish(1, str(error))
    except KeyboardInterrupt:
        finish(INTERRUPTED, "interrupted before there was anything to save")
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError; the CPU's is a plain one
        if not is_out_of_memory(error):
            raise
        finish(1, "out of memory. A smaller --batch-size needs less; --accumulate 2 then keeps the size of an update. "
                  "What was saved last is whole: --resume continues from it")  # fmt: skip


def is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def finish(code: int, message: str) -> None:
    print(f"error: {message}" if code in (1, 2) else message, file=sys.stderr, flush=True)
    sys.exit(code)
