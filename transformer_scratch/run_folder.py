"""A run is one folder: config.json, metrics.jsonl, last.pt, best.pt, epoch=K.pt, wandb/."""

import dataclasses
import fcntl
import itertools
import json
import math
import os
import sys
import time
import uuid
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from transformer_scratch.checkpoint import (
    NOT_SUPPORTED,
    CheckpointError,
    force_to_disk,
    link,
    load_checkpoint,
    load_first_good,
    load_state,
    save_checkpoint,
)
from transformer_scratch.commands import path_argument, python_command
from transformer_scratch.config import Config, run_name
from transformer_scratch.errors import BadInput, TrainingFault, when_main_ends
from transformer_scratch.output import warn_once
from transformer_scratch.processes import Processes
from transformer_scratch.task import Task

RUNS = Path("runs")
STATES = ("last.pt", "previous.pt")  # the second where the first is damaged or gone
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
            lock_folder(self.path)
            for unfinished in self.path.glob("*.pt.*.tmp"):
                unfinished.unlink()
            if checkpoint and checkpoint["file"] != str(self.path / "last.pt"):
                # last.pt is damaged or gone: it must not become previous.pt at the next save.
                link(self.path / "previous.pt", self.path / "last.pt")
            self.open_metrics()
            self.write_config()
        except OSError as error:
            remedy = "make it writable" if checkpoint else "give another --run-dir"
            raise BadInput(f"the run folder cannot be written: {error}; {remedy}") from None

    def write_config(self) -> None:
        temporary = self.path / "config.json.tmp"
        temporary.write_text(json.dumps(self.settings, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, self.path / "config.json")

    # ---------------------------------------------------------------------------- metrics.jsonl

    def open_metrics(self) -> None:
        self.metrics = open(self.path / "metrics.jsonl", "a+b", buffering=0)  # noqa: SIM115
        when_main_ends(self.metrics.close)

    def bring_back_metrics(self) -> None:
        """Write metrics.jsonl anew where somebody has deleted it: its rows are in the open file."""
        if self.path.exists() and not os.path.exists(self.metrics.name):
            self.metrics.seek(0)
            rows = self.metrics.read()
            self.open_metrics()
            self.metrics.write(rows)
            warn_once("metrics", f"{self.metrics.name} was gone; its rows are written anew")

    def record(self, row: dict) -> None:
        """Note the numbers of an update. Tensors of one number wait on the device for flush, as
        they are now: a weight goes on changing.

        "train/loss_step" is this process's share of the update's loss, which flush adds up. Of any
        other number the main process's own is written.
        """
        self.waiting.append(
            {
                name: value.detach().clone() if isinstance(value, Tensor) else value
                for name, value in row.items()
            }
        )

    def flush(self) -> dict:
        """Read all numbers that wait on the device and write their rows. -> the newest of them.

        Raises TrainingFault at the first loss or norm that is not finite; rows before it are kept.
        """
        rows, self.waiting = self.waiting, []
        losses = self.processes.sum(torch.stack([row["train/loss_step"] for row in rows]))
        for row, loss in zip(rows, losses, strict=True):
            row["train/loss_step"] = loss
        read_tensors(rows)
        for row in rows:
            if row.get("skipped"):
                # Gradients that are not finite are why fp16 skipped the update; the loss must be.
                for name, number in row.items():
                    if name != "train/loss_step" and not is_finite(number):
                        row[name] = None
            self.write(row)
        return rows[-1]

    def write(self, row: dict) -> None:
        """Add a line to metrics.jsonl. Its tensors are read first: numbers take their places.

        Raises TrainingFault when a number is not finite, or when the line cannot be written.
        """
        read_tensors([row])
        for name, number in row.items():
            if not isinstance(number, int | float | str | None):
                kind = type(number).__name__
                raise TypeError(f"{name} must be a number, or a tensor that holds one, not {kind}")
            if not is_finite(number):
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

    def keep_pairs(self, task: Task) -> None:
        """Copy the lines that evaluate.py asks, where the task is a file. Raises BadInput."""

        def keep() -> None:
            try:
                task.save_pairs(self.path)
            except OSError as error:
                raise BadInput(f"the run folder cannot be written: {error.strerror}") from None

        self.processes.run_on_main(keep)

    def save(self, everything: dict) -> None:
        """Write last.pt: the state_dict() of everything the next update depends on.

        The last.pt from before stays as previous.pt. Raises TrainingFault when a number that waits
        on the device is not finite, or when the file cannot be written.
        """
        if self.waiting:
            self.flush()
        state = {
            name: None if part is None else part.state_dict() for name, part in everything.items()
        }
        for name in OWN_TO_EACH_PROCESS:
            state[name] = self.processes.gather(state[name])
        self.saved_step = everything["progress"].step
        if not self.is_main:
            return
        self.bring_back_metrics()
        force_to_disk(self.metrics.fileno())
        state |= {
            "epoch": everything["progress"].epoch,
            "step": self.saved_step,
            "saved_at": time.time(),
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
            if part is not None:
                load_state(part, state, checkpoint["file"])
        self.saved_step = checkpoint["step"]
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
        content |= {"epoch": epoch, "config": self.settings}
        if epoch in kept:
            save_checkpoint(self.path / f"epoch={epoch}.pt", content)
        self.set_best(ranking, content)
        for earlier in range(epoch + 1):
            if earlier not in kept:
                (self.path / f"epoch={earlier}.pt").unlink(missing_ok=True)

    def set_best(self, ranking: list, content: dict) -> None:
        """Let best.pt hold the first epoch of the ranking.

        Where somebody has deleted its file, that is said; best.pt may still hold its weights.
        Otherwise the next best takes its place and, if none is left, the epoch that has just ended.
        """
        best = self.path / "best.pt"
        for _, ranked_epoch in ranking:
            file = self.path / f"epoch={ranked_epoch}.pt"
            if file.exists():
                link(file, best)
                return
            gone = f"{file} is gone"
            if epoch_of(best) == ranked_epoch:
                warn_once(f"{gone}, kept", f"{gone}; best.pt still holds its weights")
                return
            warn_once(f"{gone}, replaced", f"{gone}; the next best takes its place as best.pt")
        save_checkpoint(best, content)

    def load_best(self, ranking: list) -> dict:
        """The best checkpoint or, where it is damaged, the next best. Raises CheckpointError."""
        files = [self.path / "best.pt", *self.ranked_files(ranking), self.path / "last.pt"]
        return self.processes.run_on_main(lambda: load_first_good(files)[0])

    def ranked_files(self, ranking: list) -> list[Path]:
        return [self.path / f"epoch={epoch}.pt" for _, epoch in ranking]


def epoch_of(path: Path) -> int | None:
    """The epoch whose weights a checkpoint holds; None when it is missing or damaged."""
    try:
        return load_checkpoint(path)["epoch"]
    except CheckpointError:
        return None


def environment() -> dict[str, object]:
    """What must match for a bit-identical resume: the order of sums depends on it."""
    return {
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_initialized() else None,
    }


def is_finite(value: object) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def read_tensors(rows: list[dict]) -> None:
    """Put its number in the place of each tensor. Tensors of one device and type are read together:
    however many there are, the device is waited for once."""
    alike = defaultdict(list)
    for row in rows:
        for name, value in row.items():
            if isinstance(value, Tensor):
                if value.numel() != 1:
                    shape = tuple(value.shape)
                    raise ValueError(f"{name} must hold one number, not a tensor of {shape}")
                alike[value.device, value.dtype].append((row, name))
    for places in alike.values():
        numbers = torch.stack([row[name].reshape(()) for row, name in places]).tolist()
        for (row, name), number in zip(places, numbers, strict=True):
            row[name] = number


def read_metrics(folder: Path) -> list[dict]:
    """The rows of a run's metrics.jsonl, leaving out a half-written last one."""
    file = folder / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def lock_folder(path: Path) -> None:
    """Take the folder for this process until main ends.

    A POSIX record lock: the kernel drops it when its owner dies, and a forked data worker never
    owns it. Raises BadInput when another process trains in the folder.
    """
    file = open(path / ".lock", "ab")  # noqa: SIM115
    when_main_ends(file.close)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise BadInput(
            f"{path} is in use by another training process; wait for it, or start a new run"
        ) from None
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:
            raise
        warn_once(
            "lock",
            f"this file system has no locks ({error.strerror}): "
            "see to it yourself that no second process trains in this folder",
        )


def create_folder(config: Config) -> Path:
    """Make --run-dir, or runs/<name>, or the next free <name>-2, <name>-3. Raises BadInput."""
    try:
        if config.run_dir is not None:
            path = Path(config.run_dir)
            if path.exists() and not (path.is_dir() and never_trained(path)):
                advice = "give a new one"
                if (path / "last.pt").exists():
                    advice += f", or --resume {path_argument(path)}"
                raise BadInput(f"--run-dir {path} is not an empty folder; {advice}")
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


def never_trained(folder: Path) -> bool:
    """Whether a folder is empty, or left by a run that ended before its first state was saved."""
    names = {path.name for path in folder.iterdir() if not path.match("last.pt.*.tmp")}
    left_by_a_run = {".lock", "config.json", "config.json.tmp", "metrics.jsonl", "pairs"}
    return not names or (".lock" in names and names <= left_by_a_run)


def newest_run() -> Path:
    """The run in runs/ whose state was saved last. Raises BadInput when there is none."""
    folders = {file.parent for name in STATES for file in RUNS.glob(f"*/{name}")}
    if not folders:
        raise BadInput(
            f"there is no trained run in runs/; start with: {python_command('train.py')}"
        )
    return max(sorted(folders), key=saved_at)


def saved_at(folder: Path) -> tuple[float, float]:
    """When the state of a run was saved, in seconds since 1970, and the date of its file.

    The clock in the checkpoint counts, as a copied file has a new date. It is 0 where there is none
    in it, and where it is in the future: that clock was wrong.
    """
    for name in STATES:
        with suppress(Exception):  # a damaged file can raise almost anything
            # Only what is needed is read: mmap leaves the tensors on the disk.
            content = torch.load(folder / name, map_location="cpu", weights_only=True, mmap=True)
            clock = content.get("saved_at", 0)
            return clock if clock <= time.time() else 0, (folder / name).stat().st_mtime
    return 0, 0
