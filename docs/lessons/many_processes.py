"""Lesson 6: two processes with half the batch each take the same steps as one process with the whole batch.

python -m docs.lessons.many_processes
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from transformer_scratch.data import BatchSampler, Task, make_datasets, split_pairs

BATCH, SAMPLES = 64, 640
FLAGS = ["--dim", "16", "--num-layers", "1", "--num-datas", str(SAMPLES), "--max-epochs", "1", "--warmup-steps", "5"]
FLAGS += ["--dropout", "0", "--wandb", "disabled"]  # each process rolls its own dice, so no dropout here
TRAIN = Path(__file__).resolve().parents[2] / "train.py"


def show_shares() -> None:
    """Which samples of the first batch each process takes."""
    task = Task()
    data, _, _ = make_datasets(task, split_pairs(task, 0.2, 42), SAMPLES, 42)
    print(f"the first batch of {BATCH}, by sample number")
    for rank, world_size in ((0, 1), (0, 2), (1, 2)):
        samples, update_tokens = next(iter(BatchSampler(data, BATCH // world_size, True, 42, 1, rank, world_size)))
        tokens = int(data.target_lengths[data.rows[samples]].sum())
        first = " ".join(map(str, samples[:4].tolist()))
        print(f"process {rank} of {world_size}: {len(samples)} samples {first} ...; {tokens} of {update_tokens} tokens")


def train(world_size: int, folder: Path) -> list[dict]:
    """Run train.py in one process, or in several under torchrun. -> the rows of its updates."""
    start = [sys.executable]
    if world_size > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world_size)]
    batch = ["--batch-size", str(BATCH // world_size), "--run-dir", str(folder)]
    threads = {"OMP_NUM_THREADS": "1"}  # two processes share the cores of one
    subprocess.run([*start, TRAIN, *FLAGS, *batch], check=True, capture_output=True, env={**os.environ, **threads})
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "train/loss_step" in row]


def main() -> float:
    """-> the largest difference between two weights at the end."""
    show_shares()
    with tempfile.TemporaryDirectory() as place:
        one, two = (train(world_size, Path(place, str(world_size))) for world_size in (1, 2))
        weights = [torch.load(Path(place, name, "last.pt"))["model"] for name in ("1", "2")]
    print("\nupdate  loss, one process  loss, two processes  gradient norms")
    for a, b in zip(one, two, strict=True):
        losses = f"{a['train/loss_step']:<18.6f}{b['train/loss_step']:<21.6f}"
        print(f"{a['step']:<8}{losses}{a['grad_norm']:.5f} {b['grad_norm']:.5f}")
    difference = max((weights[0][key] - weights[1][key]).abs().max().item() for key in weights[0])
    print(f"\nlargest difference between two weights at the end: {difference:.1e} (sums in another order, no more)")
    return difference


if __name__ == "__main__":
    main()
