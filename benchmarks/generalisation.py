"""Does the model answer pairs that it has never seen? Trains with the defaults, seed after seed, and counts.

    python -m benchmarks.generalisation                                 ten digits, seeds 1 to 20
    python -m benchmarks.generalisation --task thirty-digits --seeds 1 2 3
    python -m benchmarks.generalisation --task paper-size --seeds 1 2 3

Each seed is one run of train.py and evaluate.py as a user starts them, with its own split, weights and order.
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
    json: str | None = None
    """File to write the rows to, besides the table."""


def run_seed(flags: list[str], seed: int) -> dict:
    """Train and evaluate. -> shares of exactly right answers, wall seconds of train.py, the wrong pairs."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        train = ["train.py", *flags, "--seed", str(seed), "--run-dir", str(run), "--wandb", "disabled"]
        started = time.perf_counter()
        subprocess.run([sys.executable, *train], cwd=PROJECT, check=True, capture_output=True)
        seconds = time.perf_counter() - started
        subprocess.run([sys.executable, "evaluate.py", "--run", str(run)], cwd=PROJECT, check=True, capture_output=True)
        result = json.loads((run / "evaluation.json").read_text())
    wrong = [f"{a} {b}" for a, b in (row["pair"] for row in result["predictions"] if not row["exact"])]
    return {
        "seed": seed,
        "trained": result["exact_match_seen"],
        "val": result["exact_match_val"],
        "test": result["exact_match_test"],
        "unseen": result["exact_match_unseen"],
        "seconds": seconds,
        "wrong": wrong,
    }


def print_table(rows: list[dict]) -> None:
    """A Markdown table, so that it can stand in docs/results.md as it is."""
    print("| seed | trained | unseen | validation | test | seconds | wrong |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        wrong = ", ".join(row["wrong"][:8]) + (" ..." if len(row["wrong"]) > 8 else "")
        print(f"| {row['seed']} | {shares(row)} | {row['seconds']:.0f} | {wrong} |")
    mean = {key: sum(row[key] for row in rows) / len(rows) for key in ("trained", "unseen", "val", "test", "seconds")}
    print(f"| mean | {shares(mean)} | {mean['seconds']:.0f} | |")
    worst = {key: min(row[key] for row in rows) for key in ("trained", "unseen")}
    print(f"\nworst seed: {worst['trained']:.1%} trained, {worst['unseen']:.1%} unseen")


def shares(row: dict) -> str:
    return " | ".join(f"{row[key]:.1%}" for key in ("trained", "unseen", "val", "test"))


def main() -> None:
    arguments = tyro.cli(Arguments)
    rows = []
    bar = tqdm(arguments.seeds, desc=arguments.task, unit="seed")
    for seed in bar:
        rows.append(run_seed(FLAGS[arguments.task], seed))
        bar.set_postfix(unseen=f"{rows[-1]['unseen']:.0%}")
        if arguments.json:  # after every seed, so that a stopped benchmark has not measured in vain
            Path(arguments.json).write_text(json.dumps(rows, indent=1) + "\n")
    print_table(rows)


if __name__ == "__main__":
    main()
