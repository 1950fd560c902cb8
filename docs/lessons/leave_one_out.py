"""Lesson 5: a checkpoint holds all that decides what comes next. Leave one thing out, and the resumed run is another.

    python -m docs.lessons.leave_one_out

One run trains two epochs without a break. Then train.py resumes its state in the middle of the first epoch: once whole,
and once for each part, with that part put back to what it was before the first update.
"""

import contextlib
import io
import json
import shutil
import tempfile
from functools import partial
from pathlib import Path
from unittest import mock

import torch

import train
from transformer_scratch.checkpoint import load_checkpoint, save_checkpoint

STOPPED_AT = 7  # of 10 updates in an epoch
FLAGS = ["--dim", "16", "--num-layers", "1", "--num-datas", "320", "--batch-size", "32", "--warmup-steps", "15"]
FLAGS += ["--amp", "fp16", "--wandb", "disabled"]  # fp16, so that the scaler has something to remember
PARTS = {  # in last.pt -> what it is
    "model": "the weights",
    "optimizer": "AdamW's two averages for each weight",
    "scheduler": "where the warm-up stands",
    "scaler": "the scale of the fp16 loss, and how long it has held",
    "rng": "the random numbers, which dropout draws from",
    "batch": "how many batches of the epoch are done",
}


def run(folder: Path, *flags: str) -> list[float]:
    """Train or resume quietly. -> the loss of every update."""
    # A scale that starts far too high (2^16 is PyTorch's): finding the right one costs the first updates.
    scaler = mock.patch.object(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=2.0**21))
    with scaler, contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        train.main([*map(str, flags)])
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["train/loss_step"] for row in rows if "train/loss_step" in row]


def main() -> dict[str | None, float]:
    """-> for each part left out (None: nothing), the largest difference to the run without a break."""
    with tempfile.TemporaryDirectory() as place:
        unbroken_folder, half = Path(place, "unbroken"), Path(place, "half")
        unbroken = run(unbroken_folder, *FLAGS, "--max-epochs", 2, "--run-dir", unbroken_folder)
        run(half, *FLAGS, "--max-epochs", 1, "--run-dir", half)
        start = load_checkpoint(half / "previous.pt")  # an epoch ends in last.pt; the state before it is kept too
        shutil.rmtree(half)
        run(half, *FLAGS, "--max-epochs", 1, "--run-dir", half, "--save-every", STOPPED_AT)
        middle = load_checkpoint(half / "previous.pt")
        assert (start["step"], middle["step"]) == (0, STOPPED_AT)

        print(
            f"stopped after update {STOPPED_AT}, then resumed; losses compared with {len(unbroken)} unbroken updates\n"
        )
        print(f"{'left out':<12}{'largest difference':<20}what it is")
        differences = {}
        for part in [None, *PARTS]:
            folder = Path(place, f"without {part}")
            shutil.copytree(half, folder)
            save_checkpoint(folder / "last.pt", middle if part is None else {**middle, part: start[part]})
            resumed = run(folder, "--resume", folder, "--max-epochs", 2)
            differences[part] = max(abs(a - b) for a, b in zip(unbroken, resumed, strict=False))
            meaning = PARTS.get(part, "the state as it was saved")
            print(f"{part or 'nothing':<12}{differences[part]:<20.6f}{meaning}", flush=True)
        return differences


if __name__ == "__main__":
    main()
