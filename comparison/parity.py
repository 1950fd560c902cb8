"""Are two runs the same run? Compares what train.py and its Lightning twin wrote."""

import itertools
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from transformer_scratch.run_folder import read_metrics

# The numbers of an epoch, and of the test, that both programs compute.
FIGURES = (
    "train/loss_epoch",
    "val/loss_epoch",
    "val/exact_match",
    "test/loss_epoch",
    "test/exact_match",
)


@dataclass
class Parity:
    """Both runs' numbers in pairs (train.py, Lightning). NaN stands for what one of them lacks."""

    losses: list[tuple[float, float]]  # of every update
    epoch_figures: dict[str, tuple[float, float]]  # epoch means, exact matches, the test's results
    skipped: tuple[int, int]  # updates that fp16 overflow skipped
    weights_equal: bool
    others: dict[str, bool] = field(default_factory=dict)  # norms, states, ...: equal or not
    other_optimizer: str = ""  # what to say where the two were not given the same one

    @property
    def max_loss_difference(self) -> float:
        gaps = [abs(ours - theirs) for ours, theirs in self.losses]
        return max((math.inf if math.isnan(gap) else gap for gap in gaps), default=math.inf)

    @property
    def differences(self) -> list[str]:
        """Everything that is not equal, by name; empty where the two runs are the same run."""
        steps = [step for step, (ours, theirs) in enumerate(self.losses, 1) if ours != theirs]
        names = [f"loss of step {steps[0]}"] if steps else []
        names += [name for name, (ours, theirs) in self.epoch_figures.items() if ours != theirs]
        names += [] if self.weights_equal else ["weights"]
        return names + [name for name, equal in self.others.items() if not equal]

    @property
    def holds(self) -> bool:
        return self.max_loss_difference == 0 and self.weights_equal

    def verdict(self) -> str:
        return (
            f"max |loss difference| = {self.max_loss_difference}, "
            f"weights equal = {self.weights_equal}, steps = {len(self.losses)}"
        )


def compare_runs(plain: Path, lightning: Path) -> Parity:
    """plain: a run folder of train.py; lightning: one of the twin."""
    our_steps, our_epochs = split_metrics(plain)
    their_steps, their_epochs = split_metrics(lightning)
    ours = torch.load(plain / "last.pt", map_location="cpu", weights_only=True)
    theirs = torch.load(lightning / "final.pt", map_location="cpu", weights_only=True)

    def both(name: str) -> tuple[list, list]:
        """A column of the rows of updates."""
        return [row.get(name) for row in our_steps], [row.get(name) for row in their_steps]

    figures = {}  # not those that a reader has added to train.py alone
    rows = itertools.zip_longest(our_epochs, their_epochs, fillvalue={})
    for index, (our_row, their_row) in enumerate(rows):
        for name in FIGURES:
            if name in our_row or name in their_row:
                label = name if name.startswith("test/") else f"{name}, epoch {index}"
                figures[label] = (our_row.get(name, math.nan), their_row.get(name, math.nan))

    return Parity(
        losses=list(itertools.zip_longest(*both("train/loss_step"), fillvalue=math.nan)),
        epoch_figures=figures,
        skipped=tuple(column.count(True) for column in both("skipped")),
        weights_equal=same(dict(ours["model"]), dict(theirs["model"])),
        others={
            "averaged weights": same(ours["averaged"], theirs["averaged"]),
            "gradient norms": same(*both("grad_norm")),
            "learning rates": same(*both("lr")),
            "skipped updates": same(*both("skipped")),
            "optimizer state": same(ours["optimizer"], theirs["optimizer"]),
            "schedule state": same(ours["scheduler"], theirs["scheduler"]),
            "scaler state": same(ours["scaler"], theirs["scaler"]),
            "random state": same(ours["rng"][0]["torch"], theirs["rng"]),
        },
        other_optimizer=compare_optimizers(ours["optimizer"], theirs["optimizer"]),
    )


def compare_optimizers(ours: dict, theirs: dict) -> str:
    """One sentence where two state_dicts belong to different optimizers, or to other settings of
    the same; otherwise nothing."""
    plain, lightning = (state["param_groups"][0] for state in (ours, theirs))
    names = sorted((plain.keys() | lightning.keys()) - {"params", "lr"})  # lr: the schedule's
    names = [name for name in names if plain.get(name) != lightning.get(name)]
    if not names:
        return ""

    def settings(optimizer: dict) -> str:
        return ", ".join(f"{name} {optimizer[name]}" for name in names if name in optimizer)

    return (
        f"the twin has another optimizer: train.py's has {settings(plain)}; the twin's has "
        f"{settings(lightning)}. The twin makes its own, in configure_optimizers of "
        "comparison/train_lightning.py"
    )


def split_metrics(folder: Path) -> tuple[list[dict], list[dict]]:
    """-> the rows of updates, and those of epochs with the test's row at the end."""
    rows = read_metrics(folder)
    steps = [row for row in rows if "train/loss_step" in row]
    return steps, [row for row in rows if "train/loss_step" not in row]


def same(a: object, b: object) -> bool:
    """Equal to the last bit, through dicts and lists."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return isinstance(b, list | tuple) and len(a) == len(b) and all(map(same, a, b))
    return a == b
