"""Reading what a run wrote."""

import json
from pathlib import Path


def read_metrics(run: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def step_losses(run: Path) -> list[float]:
    """The training loss of every update."""
    return [row["train/loss_step"] for row in read_metrics(run) if "train/loss_step" in row]
