"""From typing the command to the first training step: how long, and what takes it.

    python -m benchmarks.startup
    python -m benchmarks.startup --lightning        (needs comparison/requirements.txt)

Each start is a new process; the files it reads are in the system's cache, as after any earlier run.
"""

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

from benchmarks.measure import Options, Timing, interleave, number, print_table, save_json, save_picture

COLORS = ["#444", "#2a7", "#db5", "#a6c", "#8bc", "#e77", "#bbb"]


@dataclass
class Arguments(Options):
    """Seconds to the first training step."""

    rounds: int = 5
    """Starts of each kind."""
    lightning: bool = False
    """Start the Lightning twin too."""


def start(program: str, flags: list[str]) -> dict:
    """Start once. -> seconds by stage, in order, and the packages that were imported."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(Path(__file__).with_name("first_step.py")), program, *flags]
        started = time.time()
        output = subprocess.run(
            [*command, "--run-dir", f"{folder}/run"], check=True, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL,
        ).stdout  # fmt: skip
    result = next(json.loads(line) for line in output.splitlines() if line.startswith('{"stamps"'))
    seconds = {}
    for stage, ended in result["stamps"]:
        seconds[stage] = ended - started - sum(seconds.values())
    return {"stages": seconds, "imported": result["imported"]}


def main(arguments: list[str] | None = None) -> None:
    options = tyro.cli(Arguments, args=arguments)
    kinds = {
        "train.py": ("train", []),
        "train.py --wandb disabled": ("train", ["--wandb", "disabled"]),
        "train.py --dim 512 --num-heads 8": ("train", ["--dim", "512", "--num-heads", "8"]),
    }
    if options.lightning:
        kinds["the Lightning twin"] = ("lightning", [])
    if options.quick:
        kinds = {"train.py --wandb disabled": kinds["train.py --wandb disabled"]}
    starts = {name: [] for name in kinds}

    def one_start(name: str) -> float:
        starts[name].append(start(*kinds[name]))
        return sum(starts[name][-1]["stages"].values())

    contenders = {name: lambda name=name: one_start(name) for name in kinds}
    totals = interleave(contenders, 1 if options.quick else options.rounds, "starts", warm_up=0 if options.quick else 1)
    stages = {
        name: {stage: Timing([run["stages"][stage] for run in runs]).median for stage in runs[0]["stages"]}
        for name, runs in starts.items()
    }
    columns = list(dict.fromkeys(stage for by_stage in stages.values() for stage in by_stage))
    rows = [
        {"command": name, "s to the first step (middle half)": totals[name].show(1)}
        | {stage: number(by_stage[stage]) if stage in by_stage else "-" for stage in columns}
        for name, by_stage in stages.items()
    ]
    print_table("Seconds from the command to the end of the first training step", rows)
    seconds = {name: timing.seconds for name, timing in totals.items()}
    imported = {name: runs[0]["imported"] for name, runs in starts.items()}
    save_json(options, "startup", {"seconds": seconds, "stages": stages, "imported": imported})
    draw(options, stages, columns)


def draw(options: Arguments, stages: dict[str, dict[str, float]], columns: list[str]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 2.6), layout="constrained")
    axes = figure.subplots()
    for stage, color in zip(columns, COLORS, strict=False):
        lefts = [sum(by.get(s, 0) for s in columns[: columns.index(stage)]) for by in stages.values()]
        axes.barh(list(stages), [by.get(stage, 0) for by in stages.values()], left=lefts, label=stage, color=color)
    axes.invert_yaxis()
    axes.set_xlabel("seconds to the end of the first training step")
    figure.legend(loc="outside upper center", ncols=4, fontsize=8)
    save_picture(options, "startup", figure)


if __name__ == "__main__":
    main()
