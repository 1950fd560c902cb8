"""What saving costs: the share of a run's time that goes into writing states, and what one save takes.

    python -m benchmarks.saving                        the default run
    python -m benchmarks.saving --flags="--dim 512 --num-heads 8 --num-datas 2560 --max-epochs 2"

The training is train.py's own, in this process; a clock stands around every save that it makes.
"""

import os
import shlex
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import tyro

import train
from benchmarks.measure import Options, save_json
from transformer_scratch.run_folder import RunFolder


@dataclass
class Arguments(Options):
    """Measure what saving costs in a training."""

    flags: str = ""
    """Flags of train.py, in one string, behind an equals sign."""


@dataclass
class Clock:
    """Seconds of every save, and of the epochs from the first update to the end of the test."""

    saves: dict[str, list[float]] = field(default_factory=dict)

    def around(self, name: str) -> None:
        """Time every call of a method of RunFolder."""
        method, seconds = getattr(RunFolder, name), self.saves.setdefault(name, [])

        def timed(run: RunFolder, *arguments: object, **state: object) -> None:
            started = time.perf_counter()
            method(run, *arguments, **state)
            seconds.append(time.perf_counter() - started)

        setattr(RunFolder, name, timed)


def main() -> None:
    arguments = tyro.cli(Arguments)
    arguments.set_threads()
    flags = shlex.split(arguments.flags) or (["--num-datas", "640", "--max-epochs", "1"] if arguments.quick else [])
    clock = Clock()
    clock.around("save_last")
    clock.around("save_ranked")
    here = os.getcwd()
    with tempfile.TemporaryDirectory(dir=".") as folder:
        os.chdir(folder)
        try:
            started = time.perf_counter()
            train.main(["--wandb", "disabled", "--run-dir", "run", *flags])
            total = time.perf_counter() - started
            size = Path("run/last.pt").stat().st_size
            steps = sum('"lr"' in line for line in Path("run/metrics.jsonl").read_text().splitlines())
        finally:
            os.chdir(here)
    saving = sum(map(sum, clock.saves.values()))
    slowest = max(map(max, clock.saves.values()))
    step = (total - saving) / steps
    results = {
        "run (s)": total,
        "updates": steps,
        "saves": sum(map(len, clock.saves.values())),
        "in saves (s)": saving,
        "share of the run": saving / total,
        "last.pt (MB)": size / 1e6,
        "slowest save (s)": slowest,
        "slowest save, in updates": slowest / step,
    }
    for name, value in results.items():
        print(f"{name:<26}{value:>10.1%}" if "share" in name else f"{name:<26}{value:>10.3g}")
    save_json(arguments, "saving", results)


if __name__ == "__main__":
    sys.exit(main())
