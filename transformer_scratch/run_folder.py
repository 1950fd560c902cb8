"""A run is one folder: config.json, metrics.jsonl, last.pt, best.pt, epoch=K.pt, wandb/. One process writes into it."""

import dataclasses
import fcntl
import itertools
import json
import os
from pathlib import Path

from transformer_scratch.checkpoint import link, save_checkpoint
from transformer_scratch.config import Config, run_name
from transformer_scratch.errors import BadInput, TrainingFault
from transformer_scratch.runtime import RUNS, Processes, remember_launch


class RunFolder:
    """An open run. Only the main process holds the lock and writes; on the others every writing method does nothing."""

    def __init__(self, path: Path, is_main: bool):
        self.path, self.is_main = path, is_main
        self.wandb_id: str | None = None
        if is_main:
            self.lock = lock(path)
            self.metrics = open(path / "metrics.jsonl", "ab")  # noqa: SIM115 - open as long as the run

    def write_config(self, config: Config) -> None:
        temporary = self.path / "config.json.tmp"
        temporary.write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")
        os.replace(temporary, self.path / "config.json")

    def append(self, rows: list[dict]) -> None:
        """Add lines to metrics.jsonl. Raises TrainingFault when the disk does not take them."""
        if not self.is_main:
            return
        try:
            self.metrics.write("".join(json.dumps(row) + "\n" for row in rows).encode())
            self.metrics.flush()
        except OSError as error:
            raise TrainingFault(f"{self.metrics.name} could not be written: {error}. Make room and --resume") from error

    def cut_metrics(self, size: int) -> None:
        """Forget the lines written after the checkpoint that is resumed: they are about to be written again."""
        if self.is_main:
            self.metrics.truncate(size)
            self.metrics.seek(size)

    def save_last(self, **state: object) -> None:
        """Write last.pt, which remembers how long metrics.jsonl was; the one before stays as previous.pt."""
        if not self.is_main:
            return
        os.fsync(self.metrics.fileno())
        last = self.path / "last.pt"
        if last.exists():
            link(last, self.path / "previous.pt")
        save_checkpoint(last, {**state, "metrics_size": self.metrics.tell(), "wandb_id": self.wandb_id})

    def save_ranked(self, ranking: list, epoch: int, **state: object) -> None:
        """Write epoch=K.pt if it made it into the ranking, drop the file that fell out, point best.pt to the first."""
        if not self.is_main:
            return
        kept = {kept_epoch for _, kept_epoch in ranking}
        if epoch in kept:
            save_checkpoint(self.path / f"epoch={epoch}.pt", {**state, "epoch": epoch})
        link(self.path / f"epoch={ranking[0][1]}.pt", self.path / "best.pt")
        for file in self.path.glob("epoch=*.pt"):
            if int(file.stem.removeprefix("epoch=")) not in kept:
                file.unlink()

    def is_finished(self) -> bool:
        lines = (self.path / "metrics.jsonl").read_bytes().splitlines()
        return bool(lines) and b'"test/exact_match"' in lines[-1]


def lock(path: Path) -> object:
    """Take the folder for this process alone. Raises BadInput when another one trains in it.

    A POSIX record lock: the kernel drops it when its owner dies, and a forked data worker never owns it.
    """
    file = open(path / ".lock", "a")  # noqa: SIM115 - closing it would drop the lock
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise BadInput(f"{path} is in use by another training process; wait for it, or start a new run") from None
    return file


def open_run(config: Config, processes: Processes, saved: dict | None) -> RunFolder:
    """Create the folder of a new run, or open the one to resume, on all processes. Raises BadInput."""
    try:
        if config.resume is not None:
            path = Path(config.resume)
        else:
            path = processes.from_main(create_folder(config) if processes.is_main else None)
        run = RunFolder(path, processes.is_main)
        if processes.is_main:
            run.write_config(dataclasses.replace(config, resume=None))
            remember_launch(path)
    except OSError as error:
        raise BadInput(f"the run folder cannot be written: {error}; give another --run-dir") from None
    run.wandb_id = saved["wandb_id"] if saved else None
    return run


def create_folder(config: Config) -> Path:
    """Make runs/<name>, or the next free <name>-2, -3, ...; --run-dir is taken as it is. Raises BadInput."""
    if config.run_dir is not None:
        path = Path(config.run_dir)
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise BadInput(f"--run-dir {path} is not an empty folder; give a new one, or --resume {path}")
        path.mkdir(parents=True, exist_ok=True)
        return path
    for number in itertools.count(1):
        path = RUNS / (run_name(config) + (f"-{number}" if number > 1 else ""))
        try:
            path.mkdir(parents=True)  # fails if another process was faster
            return path
        except FileExistsError:
            continue


def newest_run() -> Path:
    """The run in runs/ whose checkpoint was written last. Raises BadInput when there is none."""
    checkpoints = sorted(RUNS.glob("*/last.pt"), key=lambda path: path.stat().st_mtime)
    if not checkpoints:
        raise BadInput("there is no trained run in runs/; start with: python train.py")
    return checkpoints[-1].parent
