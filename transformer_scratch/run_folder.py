"""A run is one folder: config.json, metrics.jsonl, last.pt, best.pt, epoch=K.pt, wandb/. One process writes into it."""

import dataclasses
import fcntl
import itertools
import json
import os
import sys
from pathlib import Path

import torch

from transformer_scratch.checkpoint import link, load_first_good, save_checkpoint
from transformer_scratch.config import Config, run_name
from transformer_scratch.errors import BadInput, TrainingFault
from transformer_scratch.runtime import RUNS, Processes


class RunFolder:
    """An open run. The main process alone holds the lock, reads and writes: the others need not see the folder."""

    def __init__(self, path: Path, processes: Processes):
        self.path, self.processes = path, processes
        self.settings: dict = {}
        self.wandb_id: str | None = None

    @property
    def is_main(self) -> bool:
        return self.processes.is_main

    def open(self, saved: dict | None) -> None:
        """Lock the folder, clear away what a killed process left half written. Raises BadInput."""
        try:
            self.lock = lock(self.path)
            for unfinished in self.path.glob("*.pt.*.tmp"):
                unfinished.unlink()
            if saved and saved["file"] != str(self.path / "last.pt"):  # last.pt is damaged or gone: never keep it
                link(self.path / "previous.pt", self.path / "last.pt")
            self.metrics = open(self.path / "metrics.jsonl", "ab", buffering=0)  # noqa: SIM115 - open as long as the run
            self.write_config()
        except OSError as error:
            raise BadInput(f"the run folder cannot be written: {error}; give another --run-dir") from None

    def write_config(self) -> None:
        temporary = self.path / "config.json.tmp"
        temporary.write_text(json.dumps(self.settings, indent=2) + "\n")
        os.replace(temporary, self.path / "config.json")

    def append(self, rows: list[dict]) -> None:
        """Add lines to metrics.jsonl. Raises TrainingFault when the disk does not take them."""
        if not self.is_main:
            return
        lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
        try:
            if self.metrics.write(lines) < len(lines):
                raise OSError("the disk is full")
        except OSError as error:
            raise TrainingFault(f"{self.metrics.name} could not be written: {error}. Make room and --resume") from error

    def cut_metrics(self, size: int) -> None:
        """Forget the lines written after the checkpoint that is resumed: they are about to be written again."""
        if not self.is_main:
            return
        if (missing := size - self.metrics.seek(0, os.SEEK_END)) > 0:
            print(f"warning: {self.metrics.name} lacks {missing} bytes of the lines so far", file=sys.stderr)
            return
        self.metrics.truncate(size)

    def save_last(self, **state: object) -> None:
        """Write last.pt, which remembers how long metrics.jsonl was; the one before stays as previous.pt."""
        if not self.is_main:
            return
        os.fsync(self.metrics.fileno())
        state |= {"metrics_size": self.metrics.seek(0, os.SEEK_END), "wandb_id": self.wandb_id, **exact_only_with()}
        save_checkpoint(self.path / "last.pt", state, keep_old_as=self.path / "previous.pt")
        self.processes.remember_run(self.path)

    def save_ranked(self, ranking: list, epoch: int, **state: object) -> None:
        """Write epoch=K.pt if it made it into the ranking, drop the file that fell out, point best.pt to the first."""
        if not self.is_main:
            return
        kept = [kept_epoch for _, kept_epoch in ranking]
        if epoch in kept:
            save_checkpoint(self.path / f"epoch={epoch}.pt", {**state, "epoch": epoch})
        best = next(file for file in self.ranked_files(ranking) if file.exists())
        link(best, self.path / "best.pt")
        for earlier in range(epoch + 1):
            if earlier not in kept:
                (self.path / f"epoch={earlier}.pt").unlink(missing_ok=True)

    def ranked_files(self, ranking: list) -> list[Path]:
        return [self.path / f"epoch={epoch}.pt" for _, epoch in ranking]

    def load_best(self, ranking: list) -> dict:
        """The best checkpoint, or where it is damaged the next best, on all processes. Raises CheckpointError."""
        files = [self.path / "best.pt", *self.ranked_files(ranking)]
        return self.processes.from_main(lambda: load_first_good(files)[0])

    def is_finished(self) -> bool:
        """Whether the last line of metrics.jsonl is the test's. All processes get the answer."""
        lines = self.processes.from_main(lambda: (self.path / "metrics.jsonl").read_bytes().splitlines()[-1:])
        return b'"test/exact_match"' in b"".join(lines)


def exact_only_with() -> dict[str, object]:
    """What a run needs to be the same of to go on bit for bit: sums are added up in an order that depends on these."""
    return {"threads": torch.get_num_threads(), "torch": str(torch.__version__)}


def lock(path: Path) -> object:
    """Take the folder for this process alone. Raises BadInput when another one trains in it.

    A POSIX record lock: the kernel drops it when its owner dies, and a forked data worker never owns it.
    """
    file = open(path / ".lock", "a")  # noqa: SIM115 - closing it would drop the lock
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise BadInput(f"{path} is in use by another training process; wait for it, or start a new run") from None
    return file


def open_run(config: Config, processes: Processes, saved: dict | None) -> RunFolder:
    """Create the folder of a new run, or open the one to resume, on all processes. Raises BadInput."""
    path = Path(config.resume) if config.resume is not None else processes.from_main(lambda: create_folder(config))
    run = RunFolder(path, processes)
    run.settings = {**dataclasses.asdict(config), "resume": None}
    run.wandb_id = saved["wandb_id"] if saved else None
    processes.from_main(lambda: run.open(saved))
    for name, now in exact_only_with().items():
        if saved and run.is_main and saved[name] != now:
            print(
                f"warning: trained with {name} {saved[name]} so far, now {now}: no longer bit for bit", file=sys.stderr
            )
    return run


def create_folder(config: Config) -> Path:
    """Make runs/<name>, or the next free <name>-2, -3, ...; --run-dir is taken as it is. Raises BadInput."""
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
