"""How many threads? Training steps with one and with one a core, alone and beside a busy program.

    python -m benchmarks.threads                 dim 32, 64, 256 and 512, about ten minutes
    python -m benchmarks.threads --dims 64

At the end of every operation threads wait for the slowest of them: asleep, as transformer_scratch
sets it, or spinning, as OpenMP does by itself. The busy program is a Python loop.
"""

import os
import subprocess
import sys
from dataclasses import dataclass

import torch
import tyro

from benchmarks.lib.measure import Options, Timing, interleave, number, print_table, save_json
from benchmarks.lib.training_steps import TrainingSteps
from transformer_scratch.errors import exits_cleanly
from transformer_scratch.hardware import keep_freed_memory

BUSY_PROGRAM = "while True: pass"


@dataclass
class Arguments(Options):
    """Compare one thread with one a core, alone and beside a busy program."""

    dims: tuple[int, ...] = (32, 64, 256, 512)
    """Widths of the model. A head has 64 dimensions, or all if there are fewer."""
    num_layers: int = 6
    """Blocks in the encoder, and as many in the decoder."""
    batch_size: int = 128
    """Samples a step."""
    rounds: int = 3
    """Processes of each kind, in turn; each takes three steps to warm up and three that count."""


def print_seconds(dim: int, num_layers: int, batch_size: int) -> None:
    """What the measured process does: print the seconds of a step."""
    keep_freed_memory()
    torch.manual_seed(0)
    step = TrainingSteps(dim, max(1, dim // 64), num_layers, batch_size).ours()
    step()
    print(step())


def measure(options: Arguments, dim: int, threads: int, spinning: bool = False) -> float:
    """-> the seconds of a step, in a process of its own."""
    sizes = (dim, options.num_layers, options.batch_size)
    code = f"from benchmarks.threads import print_seconds; print_seconds{sizes}"
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    if spinning:
        code = "import torch; " + code  # before transformer_scratch can say how to wait
        environment.pop("OMP_WAIT_POLICY", None)  # ours, which a process hands on
    command = [sys.executable, "-c", code]
    output = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, encoding="utf-8", check=True
    ).stdout
    return float(output)


def steps_a_second(timing: Timing) -> str:
    """Median, least and most."""
    slowest, fastest = max(timing.seconds), min(timing.seconds)
    return f"{number(1 / timing.median)} ({number(1 / slowest)} to {number(1 / fastest)})"


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    options = tyro.cli(Arguments, args=arguments)
    if options.quick:
        options.dims, options.num_layers, options.batch_size, options.rounds = (16,), 1, 8, 1
    cores = options.threads or torch.get_num_threads()
    rows, seconds = [], []
    for dim in options.dims:
        ways = {
            "1 thread": lambda dim=dim: measure(options, dim, 1),
            f"{cores} threads, asleep": lambda dim=dim: measure(options, dim, cores),
            f"{cores} threads, spinning": lambda dim=dim: measure(options, dim, cores, True),
        }
        for where in ("alone", "beside a busy program"):
            busy = None
            if where != "alone":
                busy = subprocess.Popen([sys.executable, "-c", BUSY_PROGRAM])
            try:
                timings = interleave(ways, options.rounds, f"dim {dim}, {where}", warm_up=0)
            finally:
                if busy:
                    busy.kill()
                    busy.wait()
            shown = {way: steps_a_second(timing) for way, timing in timings.items()}
            rows.append({"dim": str(dim), "": where, **shown})
            seconds.append([timing.seconds for timing in timings.values()])
    print_table("Training steps a second: median (least to most)", rows)
    save_json(options, "threads", {"rows": rows, "seconds": seconds})


if __name__ == "__main__":
    main()
