"""What an outage of W&B's server costs: seconds an epoch, and seconds until the program has ended.

    python -m tests.reliability.outages
    python -m tests.reliability.outages --project ../other-checkout --modes refused 500

Each row is a training of its own, a real process of train.py that sends its numbers to a stand-in
for the server. When the second epoch has ended the server begins to fail, and never recovers.
"""

import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import tyro

from tests.wandb_server import WandbServer
from transformer_scratch.errors import exits_cleanly

PROJECT = Path(__file__).resolve().parents[2]
TRAINING = shlex.split(
    "--dim 16 --num-layers 1 --batch-size 32 --num-datas 960 --max-epochs 6 --run-dir run"
)
# How the lines begin that train.py prints after an epoch, and when all but W&B's part is done.
EPOCH, OUTAGE, RESULT = "epoch ", "epoch 1: ", "next  "


@dataclass
class Arguments:
    """Train while W&B's server fails, and take the time."""

    project: Path = PROJECT
    """The checkout whose train.py is run."""
    modes: tuple[str, ...] = ("healthy", "refused", "hanging", "500", "429", "403")
    """What becomes of the server; see tests/wandb_server.py."""
    limit: float = 300
    """Seconds without a new line after which a training is killed."""


@dataclass
class Watched:
    """A program that has ended, and when it printed what, in seconds since its start."""

    lines: list[tuple[float, str]] = field(default_factory=list)
    ended_at: float = 0
    exit_code: int | None = None  # None: it was killed, because nothing happened any more

    @property
    def output(self) -> str:
        return "".join(line for _, line in self.lines)

    def times(self, beginning: str) -> list[float]:
        """When it printed lines that begin so."""
        return [when for when, line in self.lines if line.startswith(beginning)]

    @property
    def seconds_an_epoch(self) -> float | None:
        """From the outage on; None when no more epoch ended."""
        times = self.times(EPOCH)[1:]  # the first epoch ended before it
        return (times[-1] - times[0]) / (len(times) - 1) if times[1:] else None

    @property
    def seconds_to_the_end(self) -> float | None:
        """From the result to the end; None when it did not get there."""
        (result,) = self.times(RESULT) or [None]
        return self.ended_at - result if result and self.exit_code is not None else None


def watch(
    command: list[str],
    folder: Path,
    environment: dict[str, str],
    on_line: Callable[[str, subprocess.Popen], object] = lambda line, process: None,
    limit: float = 300,
) -> Watched:
    """Run a program, and call a function with each line that it prints, and the process."""
    watched, start = Watched(), time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1", **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        start_new_session=True,
    )

    def read() -> None:
        for line in process.stdout:
            watched.lines.append((time.monotonic() - start, line))
            on_line(line, process)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    while process.poll() is None:
        time.sleep(0.02)
        watched.ended_at = time.monotonic() - start
        if watched.ended_at - max(watched.times(""), default=0) > limit:
            os.killpg(process.pid, signal.SIGKILL)
            break
    else:
        watched.exit_code = process.returncode
    process.wait()
    reader.join(timeout=10)  # a process that it has left behind may hold the pipe
    return watched


def train_through(
    server: WandbServer,
    mode: str | int,
    folder: Path,
    *flags: str,
    project: Path = PROJECT,
    limit: float = 300,
) -> Watched:
    """Train with W&B online; at the end of the second epoch the server's mode changes."""

    def fail(line: str, process: subprocess.Popen) -> None:
        if line.startswith(OUTAGE):
            server.mode = mode

    command = [sys.executable, str(project / "train.py"), *TRAINING, *flags]
    return watch(command, folder, server.environment(folder / "home"), fail, limit)


@exits_cleanly
def main() -> None:
    arguments = tyro.cli(Arguments)
    project = arguments.project.resolve()  # each training runs in a folder of its own
    print("server     seconds an epoch   seconds from the result to the end   exit code")
    for name in arguments.modes:
        mode = int(name) if name.isdigit() else name
        with (
            tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
            WandbServer() as server,
        ):
            seen = train_through(server, mode, Path(folder), project=project, limit=arguments.limit)
        epoch, end = (
            f"over {arguments.limit:.0f}" if seconds is None else f"{seconds:.1f}"
            for seconds in (seen.seconds_an_epoch, seen.seconds_to_the_end)
        )
        code = "killed" if seen.exit_code is None else seen.exit_code
        print(f"{name:9}  {epoch:>16}   {end:>34}   {code:>9}", flush=True)


if __name__ == "__main__":
    main()
