"""A run is one folder: config.json, metrics.jsonl, last.pt, best.pt, epoch=K.pt, wandb/."""

import dataclasses
import fcntl
import itertools
import json
import math
import os
import sys
import uuid
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor

from transformer_scratch.checkpoint import link, load_first_good, save_checkpoint
from transformer_scratch.config import Config, run_name
from transformer_scratch.errors import BadInput, TrainingFault, when_main_ends
from transformer_scratch.processes import Processes

RUNS = Path("runs")
# These differ between processes; the rest of a checkpoint is the same in all of them.
OWN_TO_EACH_PROCESS = ("progress", "rng")


class RunFolder:
    """The folder of the run in progress. All processes call it; only the main one writes.

    checkpoint: the state to resume, None for a new run.
    Raises BadInput when the folder cannot be made or written, or is in use.
    """

    def __init__(self, config: Config, processes: Processes, checkpoint: dict | None):
        self.processes = processes
        self.settings = {**dataclasses.asdict(config), "resume": None}
        self.resumed = checkpoint is not None
        # Chosen here rather than by W&B, so that the very first state has it already.
        new_id = os.environ.get("WANDB_RUN_ID") or uuid.uuid4().hex[:8]
        self.wandb_id = checkpoint["wandb_id"] if checkpoint else new_id
        self.waiting: list[dict] = []
        self.path = Path(processes.run_on_main(lambda: config.resume or create_folder(config)))
        processes.run_on_main(lambda: self.prepare(checkpoint))

    @property
    def is_main(self) -> bool:
        return self.processes.is_main

    def prepare(self, checkpoint: dict | None) -> None:
        """Lock the folder and clear away what a killed process left half written."""
        try:
            lock = lock_folder(self.path)
            for unfinished in self.path.glob("*.pt.*.tmp"):
                unfinished.unlink()
            if checkpoint and checkpoint["file"] != str(self.path / "last.pt"):
                # last.pt is damaged or gone: it must not become previous.pt at the next save.
                link(self.path / "previous.pt", self.path / "last.pt")
            self.metrics = open(self.path / "metrics.jsonl", "ab", buffering=0)  # noqa: SIM115
            self.write_config()
        except OSError as error:
            raise BadInput(
                f"the run folder cannot be written: {error}; give another --run-dir"
            ) from None
        when_main_ends(lock.close)
        when_main_ends(self.metrics.close)

    def write_config(self) -> None:
        temporary = self.path / "config.json.tmp"
        temporary.write_text(json.dumps(self.settings, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, self.path / "config.json")

    # ---------------------------------------------------------------------------- metrics.jsonl

    def record(self, row: dict) -> None:
        """Note the numbers of an update. Tensors stay on the device until flush reads them.

        "train/loss_step" is this process's share of the update's loss, "grad_norm" the same on all.
        """
        self.waiting.append(row)

    def flush(self) -> dict:
        """Read all numbers that wait on the device and write their rows. -> the newest of them.

        Raises TrainingFault at the first loss or norm that is not finite; rows before it are kept.
        """
        rows, self.waiting = self.waiting, []
        losses = self.processes.sum(torch.stack([row["train/loss_step"] for row in rows]))
        for row, loss in zip(rows, losses, strict=True):
            row["train/loss_step"] = loss
        on_device = [(row, name) for row in rows for name in row if isinstance(row[name], Tensor)]
        numbers = torch.stack([row[name] for row, name in on_device]).tolist()  # the only wait
        for (row, name), number in zip(on_device, numbers, strict=True):
            row[name] = number
        for row in rows:
            if row.get("skipped"):
                row["grad_norm"] = None  # not finite: that is why fp16 skipped the update
            self.write(row)
        return rows[-1]

    def write(self, row: dict) -> None:
        """Add a line to metrics.jsonl.

        Raises TrainingFault when a number is not finite, or when the line cannot be written.
        """
        for name, number in row.items():
            if isinstance(number, float) and not math.isfinite(number):
                at_lr = f" at learning rate {row['lr']:g}" if "lr" in row else ""
                raise TrainingFault(
                    f"bad numbers at step {row['step']}: {name} is {number}{at_lr}. Try a smaller "
                    "--lr, a longer --warmup-steps, or --amp off. last.pt was saved before this"
                )
        if not self.is_main:
            return
        line = (json.dumps(row) + "\n").encode()
        try:
            if self.metrics.write(line) < len(line):
                raise OSError("the disk is full")
        except OSError as error:
            raise TrainingFault(
                f"{self.metrics.name} could not be written: {error}. Make room and --resume"
            ) from error

    def truncate_metrics(self, size: int) -> None:
        """Drop the lines written after a checkpoint: they are about to be written again."""
        if not self.is_main:
            return
        missing = size - self.metrics.seek(0, os.SEEK_END)
        if missing > 0:
            print(
                f"warning: {self.metrics.name} lacks {missing} bytes that the checkpoint expects",
                file=sys.stderr,
            )
        else:
            self.metrics.truncate(size)

    def is_finished(self) -> bool:
        """Whether the last line of metrics.jsonl is the test's; the same on all processes."""
        return self.processes.run_on_main(
            lambda: "test/exact_match" in (read_metrics(self.path) or [{}])[-1]
        )

    # ------------------------------------------------------------------------------ checkpoints

    def save(self, everything: dict) -> None:
        """Write last.pt: the state_dict() of everything the next update depends on.

        The last.pt from before stays as previous.pt.
        """
        state = {name: part.state_dict() for name, part in everything.items()}
        for name in OWN_TO_EACH_PROCESS:
            state[name] = self.processes.gather(state[name])
        if not self.is_main:
            return
        os.fsync(self.metrics.fileno())
        state |= {
            "epoch": everything["progress"].epoch,
            "step": everything["progress"].step,
            "config": self.settings,
            "metrics_size": self.metrics.seek(0, os.SEEK_END),
            "wandb_id": self.wandb_id,
            "environment": environment(),
        }
        save_checkpoint(self.path / "last.pt", state, keep_old_as=self.path / "previous.pt")
        self.processes.remember_run(self.path)

    def restore(self, everything: dict, checkpoint: dict) -> None:
        """Load the state of everything, and drop the metrics that were written after it."""
        for name, part in everything.items():
            state = checkpoint[name]
            if name in OWN_TO_EACH_PROCESS:
                state = state[self.processes.rank]
            part.load_state_dict(state)
        self.truncate_metrics(checkpoint["metrics_size"])
        for name, now in environment().items():
            before = checkpoint["environment"][name]
            if self.is_main and before != now:
                print(
                    f"warning: trained with {name} {before} so far, now {now}: "
                    "no longer bit for bit",
                    file=sys.stderr,
                )

    def save_best(self, ranking: list, epoch: int, **content: object) -> None:
        """Write epoch=K.pt if it is ranked, delete those no longer ranked, set best.pt."""
        if not self.is_main:
            return
        kept = [ranked_epoch for _, ranked_epoch in ranking]
        if epoch in kept:
            content |= {"epoch": epoch, "config": self.settings}
            save_checkpoint(self.path / f"epoch={epoch}.pt", content)
        best = next(file for file in self.ranked_files(ranking) if file.exists())
        link(best, self.path / "best.pt")
        for earlier in range(epoch + 1):
            if earlier not in kept:
                (self.path / f"epoch={earlier}.pt").unlink(missing_ok=True)

    def load_best(self, ranking: list) -> dict:
        """The best checkpoint or, where it is damaged, the next best. Raises CheckpointError."""
        files = [self.path / "best.pt", *self.ranked_files(ranking)]
        return self.processes.run_on_main(lambda: load_first_good(files)[0])

    def ranked_files(self, ranking: list) -> list[Path]:
        return [self.path / f"epoch={epoch}.pt" for _, epoch in ranking]


def environment() -> dict[str, object]:
    """What must match for a bit-identical resume: the order of sums depends on it."""
    return {"threads": torch.get_num_threads(), "torch": str(torch.__version__)}


def read_metrics(folder: Path) -> list[dict]:
    """The rows of a run's metrics.jsonl, leaving out a half-written last one."""
    file = folder / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def lock_folder(path: Path) -> TextIO:
    """Take the folder for this process alone. -> the lock; close it to release it.

    A POSIX record lock: the kernel drops it when its owner dies, and a forked data worker never
    owns it. Raises BadInput when another process trains in the folder.
    """
    file = open(path / ".lock", "a")  # noqa: SIM115
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise BadInput(
            f"{path} is in use by another training process; wait for it, or start a new run"
        ) from None
    return file


def create_folder(config: Config) -> Path:
    """Make --run-dir, or runs/<name>, or the next free <name>-2, <name>-3. Raises BadInput."""
    try:
        if config.run_dir is not None:
            path = Path(config.run_dir)
            if path.exists() and (not path.is_dir() or any(path.iterdir())):
                resume = f", or --resume {path}" if (path / "last.pt").exists() else ""
                raise BadInput(f"--run-dir {path} is not an empty folder; give a new one{resume}")
            path.mkdir(parents=True, exist_ok=True)
            return path
        for number in itertools.count(1):
            path = RUNS / (run_name(config) + (f"-{number}" if number > 1 else ""))
            try:
                path.mkdir(parents=True)  # fails if another process was faster
                return path
            except FileExistsError:
                if not RUNS.is_dir():
                    raise
    except OSError as error:
        raise BadInput(f"the run folder cannot be made: {error}; give another --run-dir") from None


def newest_run() -> Path:
    """The run in runs/ whose checkpoint was written last. Raises BadInput when there is none."""
    checkpoints = sorted(RUNS.glob("*/last.pt"), key=lambda path: path.stat().st_mtime)
    if not checkpoints:
        raise BadInput("there is no trained run in runs/; start with: python train.py")
    return checkpoints[-1].parent
