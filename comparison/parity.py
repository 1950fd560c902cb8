"""Are two runs the same run? Reads what train.py and its Lightning twin wrote, and takes the differences."""

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from transformer_scratch.run_folder import read_metrics


@dataclass
class Parity:
    """What two runs have in common. Losses are compared step by step; a step that only one of them did is inf apart."""

    losses: list[tuple[float, float]]  # (train.py, Lightning) for every update
    epoch_figures: dict[str, tuple[float, float]]  # epoch means, exact matches, the test's results
    skipped: tuple[int, int]  # updates that fp16 overflow skipped, in each
    max_loss_difference: float
    weights_equal: bool
    others: dict[str, bool] = field(
        default_factory=dict
    )  # norms, learning rates, states at the end: equal or not

    @property
    def first_different_step(self) -> int | None:
        return next(
            (step for step, pair in enumerate(self.losses, start=1) if pair[0] != pair[1]), None
        )

    @property
    def differences(self) -> list[str]:
        """Everything that is not equal, by name; empty where the two runs are the same run."""
        names = [f"loss of step {self.first_different_step}"] if self.max_loss_difference else []
        names += [name for name, (ours, theirs) in self.epoch_figures.items() if ours != theirs]
        names += [] if self.weights_equal else ["weights"]
        return names + [name for name, equal in self.others.items() if not equal]

    @property
    def holds(self) -> bool:
        return self.max_loss_difference == 0 and self.weights_equal

    def last_line(self) -> str:
        return (
            f"max |loss difference| = {self.max_loss_difference}, weights equal = {self.weights_equal}, "
            f"steps = {len(self.losses)}"
        )


def split_metrics(folder: Path) -> tuple[list[dict], list[dict]]:
    """-> the rows of updates, and those of epochs with the test's row at the end."""
    rows = read_metrics(folder)
    return [row for row in rows if "train/loss_step" in row], [
        row for row in rows if "train/loss_step" not in row
    ]


def same(a: object, b: object) -> bool:
    """Equal to the last bit, through dicts and lists."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return (
            isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
        )
    if isinstance(a, list | tuple):
        return isinstance(b, list | tuple) and len(a) == len(b) and all(map(same, a, b))
    return a == b


def compare_runs(plain: Path, lightning: Path) -> Parity:
    """plain: a folder of train.py; lightning: one of the twin."""
    our_steps, our_epochs = split_metrics(plain)
    their_steps, their_epochs = split_metrics(lightning)
    ours = torch.load(plain / "last.pt", map_location="cpu", weights_only=True)
    theirs = torch.load(lightning / "final.pt", map_location="cpu", weights_only=True)

    missing = abs(len(our_steps) - len(their_steps)) * [math.nan]
    our_losses = [row["train/loss_step"] for row in our_steps]
    their_losses = [row["train/loss_step"] for row in their_steps]
    fill = (missing, []) if len(our_losses) < len(their_losses) else ([], missing)
    losses = list(zip(our_losses + fill[0], their_losses + fill[1], strict=True))
    gaps = [abs(a - b) for a, b in losses]

    figures = {}
    for index in range(max(len(our_epochs), len(their_epochs))):
        our_row, their_row = (
            rows[index] if index < len(rows) else {} for rows in (our_epochs, their_epochs)
        )
        for name in sorted((our_row.keys() | their_row.keys()) - {"step", "epoch"}):
            label = name if name.startswith("test/") else f"{name}, epoch {index}"
            figures[label] = (our_row.get(name, math.nan), their_row.get(name, math.nan))

    return Parity(
        losses=losses,
        epoch_figures=figures,
        skipped=tuple(sum("skipped" in row for row in rows) for rows in (our_steps, their_steps)),
        max_loss_difference=max(
            (math.inf if math.isnan(gap) else gap for gap in gaps), default=math.inf
        ),
        weights_equal=same(dict(ours["model"]), dict(theirs["model"])),
        others={
            "gradient norms": column(our_steps, "grad_norm") == column(their_steps, "grad_norm"),
            "learning rates": column(our_steps, "lr") == column(their_steps, "lr"),
            "skipped updates": column(our_steps, "skipped") == column(their_steps, "skipped"),
            "optimizer state": same(ours["optimizer"], theirs["optimizer"]),
            "schedule state": same(ours["scheduler"], theirs["scheduler"]),
            "scaler state": same(ours["scaler"], theirs["scaler"]),
            "random state": same(ours["rng"][0]["torch"], theirs["rng"]),
        },
    )


def column(rows: list[dict], name: str) -> list:
    return [row.get(name) for row in rows]
