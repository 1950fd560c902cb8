"""What a training step costs around the model: bookkeeping, logging, the progress bar, and whatever a Trainer does.

    python -m benchmarks.overhead                    (needs comparison/requirements.txt: Lightning)
    python -m benchmarks.overhead --sizes small      one size alone

train.py, its Lightning twin and a Trainer with everything switched off train in turn, in one process; train.py and the
twin write W&B's files (offline). "Around the model" is what is left of a step when everything that all of them call
alike (fetching the batch, forward, loss, backward, clipping, AdamW's step, zero_grad) is taken off; that needs a
stopwatch, so whole steps are timed in runs of their own, without it. Ratios are taken within each round, whose runs are
seconds apart, so that a machine whose speed changes spoils a round, not the result.
"""

import functools
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import tyro

from benchmarks.measure import Options, Timing, interleave, number, print_table, save_json, save_picture
from benchmarks.programs import Clock, run_barebones_lightning, run_lightning, run_train, update_seconds
from comparison.measured import Stopwatch

Size = Literal["small", "default", "paper"]
Program = Callable[[list[str], Clock], None]


@dataclass
class Arguments(Options):
    """Whole steps and microseconds around the model: train.py, a bare Trainer, the Lightning twin."""

    sizes: tuple[Size, ...] = ("small", "default", "paper")
    """small is 1 + 1 layers, dim 16, batch 8; paper is dim 512, 8 heads, batch 32. Only the latter uses more than one
    thread, unless OMP_NUM_THREADS says otherwise."""


FLAGS = {
    "small": ["--dim", "16", "--num-layers", "1", "--batch-size", "8"],
    "default": ["--batch-size", "128"],
    "paper": ["--dim", "512", "--num-heads", "8", "--batch-size", "32"],
}
UPDATES = {"small": 300, "default": 60, "paper": 20}
ROUNDS = {"small": 15, "default": 9, "paper": 5}
PROGRAMS = {
    "train.py": run_train,
    "Lightning, barebones": run_barebones_lightning,
    "Lightning, the twin": run_lightning,
}
LOG_EVERY = 10  # the default of --log-every: a window of so many updates holds one that logs


def whole_step(program: Program, flags: list[str], updates: int) -> float:
    """Seconds of a typical update."""
    seconds = update_seconds(program, flags, updates, "offline")
    return torch.tensor(seconds).unfold(0, LOG_EVERY, 1).mean(dim=1).median().item()


def around_the_model(program: Program, flags: list[str], updates: int) -> float:
    """Seconds of a typical update that are the program's own."""
    watch = Stopwatch()
    with watch.running():
        update_seconds(program, flags, updates, "offline")
    return watch.results(LOG_EVERY)["around_us"] / 1e6


def measure(size: Size, quick: bool, threads: int) -> tuple[dict[str, Timing], dict[str, Timing]]:
    """-> seconds of a step, and those of it around the model, of every program in every round."""
    updates, rounds = (16, 1) if quick else (UPDATES[size], ROUNDS[size])
    flags = [*FLAGS[size], "--accelerator", "cpu", "--amp", "off"]

    def take_turns(what: Callable[[Program, list[str], int], float]) -> dict[str, Timing]:
        def run(program: Program) -> float:
            torch.set_num_threads(threads)  # a small model leaves it at one
            return what(program, flags, updates)

        contenders = {name: functools.partial(run, program) for name, program in PROGRAMS.items()}
        return interleave(contenders, rounds, f"{size}, {what.__name__}")

    return take_turns(whole_step), take_turns(around_the_model)


def ratio(of: Timing, to: Timing) -> Timing:
    return Timing([a / b for a, b in zip(of.seconds, to.seconds, strict=True)])


def main(arguments: list[str] | None = None) -> None:
    options = tyro.cli(Arguments, args=arguments)
    options.set_threads()
    threads = torch.get_num_threads()
    results = {}
    for size in ("small",) if options.quick else options.sizes:
        steps, around = measure(size, options.quick, threads)
        results[size] = {"step": {name: t.seconds for name, t in steps.items()},
                         "around": {name: t.seconds for name, t in around.items()}}  # fmt: skip
        rows = [
            {
                "program": name,
                "ms a step (middle half)": steps[name].show(),
                "x train.py's": ratio(steps[name], steps["train.py"]).show(1),
                "µs around the model": around[name].show(1e6),
                "train.py's share of it": f"{ratio(around['train.py'], around[name]).median:.2f}",
            }
            for name in PROGRAMS
        ]
        print_table(f"{size}: {' '.join(FLAGS[size])}", rows)
    torch.set_num_threads(threads)
    save_json(options, "overhead", results)
    draw(options, results)


def draw(options: Options, results: dict) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 0.4 + 1.6 * len(results)), layout="constrained")
    panels = figure.subplots(len(results), squeeze=False)[:, 0]
    for axes, (size, result) in zip(panels, results.items(), strict=True):
        around = {name: statistics.median(seconds) * 1e6 for name, seconds in result["around"].items()}
        bars = axes.barh(list(around), list(around.values()), color=["#2a7", "#bbb", "#888"])
        axes.bar_label(bars, [number(value) for value in around.values()], padding=3)
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set_title(size, loc="left", fontsize="medium")
    panels[-1].set_xlabel("microseconds a step around the model")
    save_picture(options, "overhead", figure)


if __name__ == "__main__":
    main()
