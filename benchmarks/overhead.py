"""What a training step costs around the model: logging, the progress bar, whatever a Trainer does.

    python -m benchmarks.overhead                    (needs comparison/requirements.txt: Lightning)
    python -m benchmarks.overhead --sizes small      one size alone

train.py, its Lightning twin and a Trainer with everything switched off train in turn, in one
process; train.py and the twin write W&B's files (offline). "Around the model" is what is left of a
step when everything that all of them call alike is taken off (lib/stopwatch.py). The stopwatch
itself takes time, so whole steps are timed in runs of their own, without it.

Ratios are taken within each round, whose runs are seconds apart: a machine whose speed changes
spoils a round, not the result.
"""

import functools
import itertools
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import tyro

from benchmarks.lib.measure import (
    Options,
    Timing,
    interleave,
    number,
    print_table,
    ratio,
    save_json,
    save_picture,
)
from benchmarks.lib.programs import (
    read_after_updates,
    run_barebones_lightning,
    run_lightning,
    run_train,
    update_seconds,
)
from benchmarks.lib.stopwatch import Stopwatch
from transformer_scratch.errors import exits_cleanly

Size = Literal["small", "default", "paper"]
Program = Callable[[list[str]], object]


@dataclass
class Arguments(Options):
    """Compare train.py, a bare Trainer and the Lightning twin: whole steps, and around the model.

    small is 1 + 1 layers, dim 16, batch 8; paper is dim 512, 8 heads, batch 32.
    """

    sizes: tuple[Size, ...] = ("small", "default", "paper")
    """The sizes to measure. Without OMP_NUM_THREADS, only paper uses more than one thread."""


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
LOG_EVERY = 10  # the default of --log-every


def whole_step(program: Program, flags: list[str], updates: int) -> float:
    """Seconds of a typical update."""
    return typical(update_seconds(program, flags, updates, wandb_mode="offline"))


def around_the_model(program: Program, flags: list[str], updates: int) -> float:
    """Seconds of a typical update that are the program's own."""
    watch = Stopwatch()
    with watch.running():
        readings = read_after_updates(program, flags, updates, watch.read, wandb_mode="offline")
    return typical([end - start for start, end in itertools.pairwise(readings)])


def typical(seconds: list[float]) -> float:
    """The median over windows that hold one update that logs, and nine that do not."""
    windows = torch.tensor(seconds, dtype=torch.float64).unfold(0, LOG_EVERY, 1)
    return windows.mean(dim=1).median().item()


def measure(size: Size, quick: bool) -> tuple[dict[str, Timing], dict[str, Timing]]:
    """-> seconds of a step, and those of it around the model, of every program in every round."""
    updates, rounds = (16, 1) if quick else (UPDATES[size], ROUNDS[size])
    flags = [*FLAGS[size], "--accelerator", "cpu", "--amp", "off"]

    def take_turns(what: Callable[[Program, list[str], int], float]) -> dict[str, Timing]:
        contenders = {
            name: functools.partial(what, program, flags, updates)
            for name, program in PROGRAMS.items()
        }
        return interleave(contenders, rounds, f"{size}, {what.__name__}")

    return take_turns(whole_step), take_turns(around_the_model)


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    options = tyro.cli(Arguments, args=arguments)
    options.set_threads()
    results = {}
    for size in ("small",) if options.quick else options.sizes:
        steps, around = measure(size, options.quick)
        results[size] = {
            "step": {name: timing.seconds for name, timing in steps.items()},
            "around": {name: timing.seconds for name, timing in around.items()},
        }
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
    save_json(options, "overhead", results)
    save_picture(options, "overhead", lambda: draw(results))


def draw(results: dict) -> object:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 0.4 + 1.6 * len(results)), layout="constrained")
    panels = figure.subplots(len(results), squeeze=False)[:, 0]
    for axes, (size, result) in zip(panels, results.items(), strict=True):
        around = [statistics.median(seconds) * 1e6 for seconds in result["around"].values()]
        bars = axes.barh(list(result["around"]), around, color=["#2a7", "#bbb", "#888"])
        axes.bar_label(bars, [number(value) for value in around], padding=3)
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set_title(size, loc="left", fontsize="medium")
    panels[-1].set_xlabel("microseconds a step around the model")
    return figure


if __name__ == "__main__":
    main()
