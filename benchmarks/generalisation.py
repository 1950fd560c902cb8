"""Does the model answer pairs that it has never seen? Trains seed after seed, and counts.

    python -m benchmarks.generalisation                                 ten digits, seeds 1 to 20
    python -m benchmarks.generalisation --task thirty-digits --seeds 1 2 3
    python -m benchmarks.generalisation --task paper-size --seeds 1 2 3

Each seed is one run of train.py and evaluate.py as a user starts them, with its own split, first
weights and order of the data.
"""

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from tqdm import tqdm

from transformer_scratch.errors import BadInput, exits_cleanly

PROJECT = Path(__file__).resolve().parent.parent
FLAGS = {
    "ten-digits": [],
    "thirty-digits": ["--num-categories", "30", "--max-epochs", "4"],
    "paper-size": ["--dim", "512", "--num-heads", "8"],
}


@dataclass
class Arguments:
    """Train and evaluate once a seed; print a table with the failing pairs."""

    task: Literal["ten-digits", "thirty-digits", "paper-size"] = "ten-digits"
    """Which configuration."""
    seeds: tuple[int, ...] = tuple(range(1, 21))
    """The seeds, one after the other."""
    json: Path | None = None
    """File to write the rows to, besides the table."""


def run_seed(flags: list[str], seed: int) -> dict:
    """-> shares of exactly right answers, seconds of train.py, the pairs answered wrong."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        started = time.perf_counter()
        run_script("train.py", *flags, "--seed", seed, "--run-dir", run, "--wandb", "disabled")
        seconds = time.perf_counter() - started
        run_script("evaluate.py", "--run", run, "--no-pictures")
        result = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    wrong = [row["pair"] for row in result["predictions"] if not row["exact"]]
    return {
        "seed": seed,
        "trained": result["exact_match_seen"],
        "unseen": result["exact_match_unseen"],
        "validation": result["exact_match_val"],
        "test": result["exact_match_test"],
        "seconds": seconds,
        "wrong": [f"{first} {last}" for first, last in wrong],
    }


def run_script(name: str, *arguments: object) -> None:
    command = [sys.executable, name, *map(str, arguments)]
    finished = subprocess.run(command, cwd=PROJECT, capture_output=True)
    if finished.returncode:
        error = finished.stderr.decode(errors="replace")
        sys.exit(f"{name} ended with {finished.returncode}:\n{error}")


def print_table(rows: list[dict]) -> None:
    """A Markdown table, to be copied into docs/results.md as it is."""
    shares = ("trained", "unseen", "validation", "test")
    print(f"| seed | {' | '.join(shares)} | seconds | wrong |\n|{'---|' * 7}")
    for row in rows:
        wrong = ", ".join(row["wrong"][:8]) + (" ..." if len(row["wrong"]) > 8 else "")
        cells = " | ".join(f"{row[name]:.1%}" for name in shares)
        print(f"| {row['seed']} | {cells} | {row['seconds']:.0f} | {wrong} |")
    cells = " | ".join(f"{sum(row[name] for row in rows) / len(rows):.1%}" for name in shares)
    seconds = sum(row["seconds"] for row in rows) / len(rows)
    print(f"| mean | {cells} | {seconds:.0f} | |")


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    options = tyro.cli(Arguments, args=arguments)
    if not options.seeds or min(options.seeds) < 0:
        raise BadInput("--seeds: give one or more, each at least 0")
    rows = []
    bar = tqdm(options.seeds, desc=options.task, unit="seed")
    for seed in bar:
        rows.append(run_seed(FLAGS[options.task], seed))
        bar.set_postfix(unseen=f"{rows[-1]['unseen']:.0%}")
        if options.json:  # after every seed, so that a stopped benchmark has not measured in vain
            options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print_table(rows)


if __name__ == "__main__":
    main()
