"""Lesson 6: two processes with half the batch each take the steps of one with the whole batch.

python -m docs.lessons.many_processes
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import tyro

from transformer_scratch.batches import BatchSampler
from transformer_scratch.digits import Digits, make_datasets, split_pairs
from transformer_scratch.errors import exits_cleanly
from transformer_scratch.run_folder import read_metrics

BATCH, SAMPLES, SEED = 64, 640, 42
FLAGS = ["--dim", "16", "--num-layers", "1", "--num-datas", str(SAMPLES), "--max-epochs", "1"]
FLAGS += ["--warmup-steps", "5", "--lr", "0.00178", "--weight-decay", "0.1"]
FLAGS += ["--label-smoothing", "0", "--accelerator", "cpu", "--wandb", "disabled"]
FLAGS += ["--dropout", "0"]  # its random numbers differ between the processes
TRAIN = Path(__file__).resolve().parents[2] / "train.py"


def show_shares() -> None:
    """Which samples of the first batch each process takes."""
    task = Digits()
    data, _, _ = make_datasets(task, split_pairs(task, 0.2, SEED), SAMPLES, SEED)
    print(f"the first batch of {BATCH}, by sample number")
    for rank, world_size in ((0, 1), (0, 2), (1, 2)):
        sampler = BatchSampler(
            data, BATCH // world_size, True, SEED, rank=rank, world_size=world_size
        )
        samples, update_tokens, _ = next(iter(sampler))
        tokens = int(data.target_lengths[samples].sum())
        first = " ".join(str(sample) for sample in samples[:4].tolist())
        print(
            f"process {rank} of {world_size}: {len(samples)} samples {first} ...; "
            f"{tokens} of {update_tokens} tokens"
        )


def train(world_size: int, folder: Path) -> list[dict]:
    """Run train.py in one process, or in several under torchrun. -> the rows of its updates."""
    starter = [sys.executable]
    if world_size > 1:
        starter += ["-m", "torch.distributed.run", "--standalone"]
        starter += ["--nproc-per-node", str(world_size)]
    flags = [*FLAGS, "--batch-size", str(BATCH // world_size), "--run-dir", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # two processes share the cores of one
    finished = subprocess.run(
        [*starter, TRAIN, *flags], capture_output=True, encoding="utf-8", env=environment
    )
    if finished.returncode:  # it has said why
        print(finished.stderr, file=sys.stderr)
        sys.exit(finished.returncode)
    return [row for row in read_metrics(folder) if "train/loss_step" in row]


@exits_cleanly
def main() -> float:
    """-> the largest difference between two weights at the end."""
    show_shares()
    with tempfile.TemporaryDirectory() as place:
        folders = {world_size: Path(place, str(world_size)) for world_size in (1, 2)}
        one, two = (train(world_size, folder) for world_size, folder in folders.items())
        weights = [torch.load(folder / "last.pt")["model"] for folder in folders.values()]
    print("\nupdate  loss, one process  loss, two processes  gradient norms")
    for a, b in zip(one, two, strict=True):
        losses = f"{a['train/loss_step']:<18.6f}{b['train/loss_step']:<21.6f}"
        print(f"{a['step']:<8}{losses}{a['grad_norm']:.5f} {b['grad_norm']:.5f}")
    difference = max((weights[0][key] - weights[1][key]).abs().max().item() for key in weights[0])
    print(
        f"\nlargest difference between two weights at the end: {difference:.1e} "
        "(sums in another order, no more)"
    )
    return difference


if __name__ == "__main__":
    tyro.cli(main)
