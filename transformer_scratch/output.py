"""Output that fails, because a terminal or a reader has gone away, must not end a run."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import TextIO


class LenientStream:
    """Writes to a stream for as long as somebody is there to read it."""

    lost: OSError | None = None  # why, where it is not that the reader has gone away

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except UnicodeEncodeError:  # a terminal that cannot show these letters
            return self.stream.write(text.encode("ascii", "backslashreplace").decode())
        except (OSError, ValueError) as error:  # ValueError: somebody has closed the stream
            self.give_up(error)
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except (OSError, ValueError) as error:
            self.give_up(error)

    def give_up(self, error: Exception) -> None:
        """Send what follows to nowhere; what waits in buffers would fail again as Python ends."""
        if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
            self.lost = error
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)


warned_of: set[str] = set()


def warn_once(topic: str, message: str) -> None:
    """Print a warning, the first time that the topic comes up in this run of a program."""
    if topic not in warned_of:
        warned_of.add(topic)
        print(f"warning: {message}", file=sys.stderr)


@contextmanager
def lenient_output() -> Iterator[None]:
    """Inside, print and the progress bar never raise, whatever has become of their streams."""
    warned_of.clear()
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # Closed by the shell: the next file to be opened would get the number of the output.
            os.open(os.devnull, os.O_RDWR)
    with redirect_stdout(lenient(sys.stdout)), redirect_stderr(lenient(sys.stderr)):
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()


def lenient(stream: TextIO | None) -> LenientStream:
    """None is what Python has where the shell has closed a stream."""
    if stream is None or getattr(stream, "closed", False):
        stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    return LenientStream(stream)
