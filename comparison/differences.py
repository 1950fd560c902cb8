"""Where Lightning goes another way for good: each difference with train.py, measured on a small training.

python -m comparison.differences
"""

import contextlib
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytorch_lightning as pl

import train
from comparison import train_lightning
from comparison.parity import compare_runs, read_metrics
from comparison.parity_hooks import HOOKS

PROJECT = Path(__file__).resolve().parent.parent
SMALL = ["--dim", "16", "--num-layers", "1", "--batch-size", "32", "--num-datas", "640", "--max-epochs", "2",
         "--lr", "0.01", "--seed", "3", "--wandb", "disabled"]  # fmt: skip
OVERFLOWS = [
    "--amp",
    "fp16",
    "--dim",
    "64",
    "--batch-size",
    "1",
    "--num-datas",
    "40",
    "--lr",
    "0.02",
]


class PlainSync:
    """self.log on several processes without sync_dist, as it is by default."""

    def log(self, *args, sync_dist: bool = False, **named) -> None:
        super().log(*args, **named)


def both(flags: list[str], hooks=HOOKS) -> str:
    train.main([*SMALL, *flags, "--run-dir", "plain"])
    train_lightning.main([*SMALL, *flags, "--run-dir", "lightning"], hooks=hooks)
    parity = compare_runs(Path("plain"), Path("lightning"))
    return f"losses differ by up to {parity.max_loss_difference:.2g}"


def without(*names: str) -> list[type]:
    return [hook for hook in HOOKS if hook.__name__ not in names]


def resumed() -> str:
    """A twin that trains one epoch, and another that goes on from its checkpoint, against one that never stopped."""
    train_lightning.main([*SMALL, "--run-dir", "whole"])
    train_lightning.main([*SMALL, "--max-epochs", "1", "--run-dir", "first"])
    fit = pl.Trainer.fit
    pl.Trainer.fit = lambda *args: fit(*args, ckpt_path=Path("first/epoch=0.ckpt"))
    try:
        train_lightning.main([*SMALL, "--run-dir", "second"])
    finally:
        pl.Trainer.fit = fit
    pairs = zip(read_metrics(Path("whole"))[0][20:], read_metrics(Path("second"))[0], strict=True)
    gap = max(abs(a["train/loss_step"] - b["train/loss_step"]) for a, b in pairs)
    return f"losses after the checkpoint differ by up to {gap:.2g}"


def on_two_processes(variant: str) -> str:
    """The validation loss that Lightning logs and ranks checkpoints by, against that of train.py."""
    search = {**os.environ, "PYTHONPATH": str(PROJECT)}
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    flags = [*SMALL, "--devices", "2", "--batch-size", "16", "--max-epochs", "1"]
    for module, *arguments in (
        ("train", "--run-dir", "plain"),
        ("comparison.differences", variant),
    ):
        subprocess.run(
            [*command, "-m", module, *arguments, *flags], env=search, check=True, capture_output=True
        )  # fmt: skip
    ours, theirs = (
        read_metrics(Path(folder))[1][0]["val/loss_epoch"] for folder in ("plain", "lightning")
    )
    return f"validation loss {ours:.4f}, Lightning logs {theirs:.4f}"


VARIANTS = {
    "sync_dist": without("EpochMeansOverProcesses"),
    "rank_local": [PlainSync, *without("EpochMeansOverProcesses")],
}
ROWS = {
    "accumulation by 3: divided by 3 and multiplied by 3 is not the same in binary": lambda: both(
        ["--accumulate", "3"]
    ),
    "accumulation by 2, windows weighted by batch, not by token": lambda: both(
        ["--accumulate", "2"], without("TokenWeightedUpdates")
    ),
    "fp16, the schedule moves on when an update is skipped": lambda: both(
        [*OVERFLOWS, "--warmup-steps", "60"], without("ScheduleWaitsForSkippedUpdates")
    ),
    "resume from a checkpoint that has no random state": resumed,
    "two processes, sync_dist=True, an odd number of tokens": lambda: on_two_processes("sync_dist"),
    "two processes, sync_dist left out: one process's share": lambda: on_two_processes(
        "rank_local"
    ),
}


def main() -> None:
    if sys.argv[1:2] and sys.argv[1] in VARIANTS:
        train_lightning.main([*sys.argv[2:], "--run-dir", "lightning"], hooks=VARIANTS[sys.argv[1]])
        return
    logging.disable(logging.INFO)
    for name, measure in ROWS.items():
        with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
            os.chdir(folder)
            with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
                result = measure()
            os.chdir(PROJECT)
        print(f"{name}\n    {result}", flush=True)


if __name__ == "__main__":
    main()
