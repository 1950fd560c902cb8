"""Reading what a run wrote."""

from pathlib import Path

from transformer_scratch.run_folder import read_metrics

__all__ = ["read_metrics", "step_losses"]


def step_losses(run: Path) -> list[float]:
    """The training loss of every update."""
    return [row["train/loss_step"] for row in read_metrics(run) if "train/loss_step" in row]
