"""The runs in runs/, a line each, so that they can be told apart: evaluate.py --list."""

import json
import time
from pathlib import Path

from transformer_scratch.commands import python_command
from transformer_scratch.errors import BadInput
from transformer_scratch.run_folder import RUNS, read_metrics, saved_at

# What files can cause that hold something else; an OverflowError is of a number too large.
UNREADABLE = (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError)
COLUMNS = ("run", "seed", "size", "epochs", "exact match", "saved")


def print_runs() -> None:
    """Print the runs in runs/, the last saved at the end. Raises BadInput when there is none."""
    folders = sorted({file.parent for file in RUNS.glob("*/config.json")}, key=saved_at)
    if not folders:
        raise BadInput(f"there is no run in runs/; start one with: {python_command('train.py')}")
    rows = [COLUMNS, *map(describe, folders)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())


def describe(folder: Path) -> tuple[str, ...]:
    """The cells of a run's line; where its files cannot be read, the reason stands in them."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        heads = "1 head" if config["num_heads"] == 1 else f"{config['num_heads']} heads"
        size = f"dim {config['dim']}, {heads}, {config['num_layers']}+{config['num_layers']} layers"
        seed, max_epochs = str(config["seed"]), config["max_epochs"]
        rows = read_metrics(folder)
        validated = [row["val/exact_match"] for row in rows if "val/exact_match" in row]
        tested = [row["test/exact_match"] for row in rows if "test/exact_match" in row]
        exact = "none yet"
        if validated:
            exact = f"validation {validated[-1]:.1%}"
        if tested:
            exact = f"test {tested[-1]:.1%}"
    except UNREADABLE as error:
        return str(folder), "?", f"unreadable ({type(error).__name__})", "?", "?", date(folder)
    return str(folder), seed, size, f"{len(validated)} of {max_epochs}", exact, date(folder)


def date(folder: Path) -> str:
    """When its state was saved."""
    clock, file_date = saved_at(folder)
    seconds = clock or file_date
    try:
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds)) if seconds else "never"
    except UNREADABLE:
        return "?"
