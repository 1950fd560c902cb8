"""Lesson 5: a checkpoint holds everything that decides the next update. What if a part is missing?

    python -m docs.lessons.leave_one_out

One run trains two epochs without a break. Then train.py resumes its state from the middle of the
first epoch: once complete, and once for each part, with that part as it was at the very start.
"""

import contextlib
import io
import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import tyro

import train
from transformer_scratch.checkpoint import load_checkpoint, save_checkpoint
from transformer_scratch.errors import exits_cleanly
from transformer_scratch.run_folder import read_metrics

STOPPED_AT = 7  # of 10 updates in an epoch
FLAGS = ["--dim", "16", "--num-layers", "1", "--num-datas", "320", "--batch-size", "32"]
FLAGS += ["--warmup-steps", "15", "--accelerator", "cpu", "--wandb", "disabled"]
FLAGS += ["--amp", "fp16"]  # so that the scaler has something to remember
PARTS = {  # in last.pt -> what it is
    "model": "the weights",
    "optimizer": "AdamW's two averages for each weight",
    "scheduler": "how far the warm-up has come",
    "scaler": "the scale of the fp16 loss, and how long it has held",
    "rng": "the state of the random generators, which dropout draws from",
    "batch": "in progress: how many batches of the epoch are done",
}


def run(folder: Path, *flags: object) -> list[float]:
    """Train or resume quietly. -> the loss of every update."""
    # The scale starts far too high (PyTorch's own start is 2^16): the first updates overflow.
    scaler = mock.patch.object(
        torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=2.0**21)
    )
    silence, stderr = io.StringIO(), sys.stderr
    with scaler, contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
        try:
            train.main([str(flag) for flag in flags])
        except SystemExit:  # it has said why
            print(silence.getvalue(), file=stderr)
            raise
    return [row["train/loss_step"] for row in read_metrics(folder) if "train/loss_step" in row]


def leave_out(part: str | None, middle: dict, start: dict) -> dict:
    """The state in the middle of the epoch, with one part as it was at the start."""
    if part is None:
        return middle
    if part == "batch":  # progress and rng are lists: an entry for each process
        [progress] = middle["progress"]
        return {**middle, "progress": [{**progress, "batch": 0}]}
    return {**middle, part: start[part]}


@exits_cleanly
def main() -> dict[str | None, float]:
    """-> for each part left out (None: nothing), how far the losses are from the unbroken run's."""
    with tempfile.TemporaryDirectory() as place:
        unbroken_folder, half = Path(place, "unbroken"), Path(place, "half")
        unbroken = run(unbroken_folder, *FLAGS, "--max-epochs", 2, "--run-dir", unbroken_folder)

        # At the end of an epoch last.pt is written, and the last.pt from before is kept beside it:
        # without --save-every that is the state before the first update.
        run(half, *FLAGS, "--max-epochs", 1, "--run-dir", half)
        start = load_checkpoint(half / "previous.pt")
        shutil.rmtree(half)
        run(half, *FLAGS, "--max-epochs", 1, "--run-dir", half, "--save-every", STOPPED_AT)
        middle = load_checkpoint(half / "previous.pt")
        assert (start["step"], middle["step"]) == (0, STOPPED_AT)

        print(
            f"stopped after update {STOPPED_AT}, then resumed; "
            f"losses compared with {len(unbroken)} unbroken updates\n"
        )
        print(f"{'left out':<12}{'largest difference':<20}what it is")
        differences = {}
        for part in (None, *PARTS):
            folder = Path(place, f"without {part}")
            shutil.copytree(half, folder)
            save_checkpoint(folder / "last.pt", leave_out(part, middle, start))
            resumed = run(folder, "--resume", folder, "--max-epochs", 2)
            # Without `batch` the resumed run has more updates than the other.
            pairs = zip(unbroken, resumed, strict=False)
            differences[part] = max(abs(a - b) for a, b in pairs)
            meaning = PARTS.get(part, "the state as it was saved")
            difference = f"{differences[part]:.6f}" if differences[part] else "0"
            print(f"{part or 'nothing':<12}{difference:<20}{meaning}", flush=True)
        return differences


if __name__ == "__main__":
    tyro.cli(main)
