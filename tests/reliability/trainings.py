"""Trainings to do harm to, each in a process of its own.

The process is forked from one that has imported everything, so it starts at once. A plant is a
function that breaks something in that process before train.main is called.
"""

import multiprocessing
import os
import shlex
import socket
import sys
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

from transformer_scratch.checkpoint import checksum, load_checkpoint
from transformer_scratch.run_folder import read_metrics

# Two epochs of six updates.
SMALL = shlex.split(
    "--dim 16 --num-layers 1 --batch-size 32 --num-datas 192 --max-epochs 2 --wandb disabled"
)
NEW = ["--run-dir", "run"]
RESUME = ["--resume", "run"]

forkserver = multiprocessing.get_context("forkserver")
# torch.optim imports torch._dynamo late, which takes a second.
forkserver.set_forkserver_preload(["train", "plants", "torch._dynamo", "pytest"])


class Training(forkserver.Process):
    """A training in a folder, by default the current one. Its output goes to a file there."""

    def __init__(
        self,
        flags: Sequence[str],
        plant: Callable[[], None] | None = None,
        folder: Path | None = None,
        **environment: object,
    ):
        super().__init__()
        self.flags, self.plant, self.environment = list(flags), plant, environment
        self.folder = folder or Path.cwd()
        self.output = self.folder / f"output-{uuid.uuid4().hex}.txt"

    def run(self) -> None:
        import torch

        import train

        torch.set_num_threads(1)
        # Data workers inherit what is planted.
        multiprocessing.set_start_method("fork", force=True)
        os.chdir(self.folder)
        os.environ.update({name: str(value) for name, value in self.environment.items()})
        sys.argv = ["train.py", *self.flags]
        descriptor = os.open(self.output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        if self.plant:
            self.plant()
        train.main(self.flags)

    def wait(self) -> tuple[int, str]:
        """-> exit code, negative for a signal, and the output."""
        self.join(60)
        if self.is_alive():
            self.kill()
            raise AssertionError(f"still running after a minute: {self.read_output()}")
        return self.exitcode, self.read_output()

    def read_output(self) -> str:
        return self.output.read_text(encoding="utf-8")


def fingerprint(folder: Path) -> dict:
    """Everything a run has come to, bit for bit: a dict, so that a difference has a name."""
    last = load_checkpoint(folder / "last.pt")
    for key in ("wandb_id", "config", "metrics_size", "saved_at"):  # how and when may differ
        last.pop(key)
    prints = {key: checksum(value) for key, value in last.items()}
    for file in [*sorted(folder.glob("epoch=*.pt")), folder / "best.pt"]:
        prints[file.name] = checksum(load_checkpoint(file)["model"])
    return {**prints, "metrics": read_metrics(folder)}


def steps_done(folder: Path) -> int:
    """The updates in a run's metrics."""
    return sum("train/loss_step" in row for row in read_metrics(folder))


def start_two(
    flags: Sequence[str], plants: Sequence = (None, None), folders: Sequence = (None, None)
) -> list[Training]:
    """Start two processes that train together, as torchrun would."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    trainings = []
    for rank in range(2):
        environment = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": 2,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        trainings.append(Training(flags, plants[rank], folders[rank], **environment))
        trainings[-1].start()
    return trainings
