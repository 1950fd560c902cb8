"""Runs train.py and its Lightning twin as they are, inside this process, and notes when each of their updates ends."""

import contextlib
import io
import logging
import signal
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from unittest import mock

import pytorch_lightning as pl
import wandb
from tqdm import tqdm

import train
from comparison import train_lightning
from transformer_scratch import summary
from transformer_scratch.config import load_config, settle_config
from transformer_scratch.data import BatchSampler, Task, make_datasets, make_loader, split_pairs
from transformer_scratch.runtime import prepare_cpu, start_processes


class Enough(Exception):
    """All updates that were wanted are done."""


class Clock:
    """Notes the end of every update; ends the program after `updates` of them."""

    def __init__(self, updates: int):
        self.updates, self.ends = updates, []

    def tick(self) -> None:
        self.ends.append(time.perf_counter())
        if len(self.ends) > self.updates:
            raise Enough

    def seconds(self) -> list[float]:
        """Of each update but the first, which warms up."""
        return [end - start for start, end in zip(self.ends, self.ends[1:], strict=False)]


class TickingBar(tqdm):
    """train.py's progress bar, which is told about every update."""

    clock: Clock

    def update(self, n: int = 1) -> None:
        super().update(n)
        self.clock.tick()


class TickingCallback(pl.Callback):
    def __init__(self, clock: Clock):
        self.clock = clock

    def on_train_batch_end(self, *_: object) -> None:
        self.clock.tick()


@contextlib.contextmanager
def quietly() -> Iterator[str]:
    """Run a program until it has done enough; -> a folder for its run. What it prints and its signal handlers go."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    silence = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
    with tempfile.TemporaryDirectory() as folder, silence[0], silence[1], warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("pytorch_lightning", "lightning_fabric", "lightning.pytorch", "lightning.fabric"):
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield f"{folder}/run"
        except Enough:
            pass
        finally:
            wandb.finish()
            for number, handler in handlers.items():
                signal.signal(number, handler)


def update_seconds(
    program: Callable[[list[str], Clock], None], flags: list[str], updates: int, wandb_mode: str = "disabled"
) -> list[float]:
    """Run a program for so many updates and one more. -> seconds of each, logging and fetching of data included.

    flags: with --batch-size, but without --num-datas, which is chosen so that the epoch is longer than that.
    """
    batch_size = int(flags[flags.index("--batch-size") + 1])
    clock = Clock(updates)
    with quietly() as folder:
        enough_data = ["--num-datas", str(batch_size * (updates + 3))]
        program([*flags, *enough_data, "--run-dir", folder, "--wandb", wandb_mode], clock)
    return clock.seconds()


def run_train(flags: list[str], clock: Clock) -> None:
    TickingBar.clock = clock
    with mock.patch.object(summary, "tqdm", TickingBar):
        train.main(flags)


def run_lightning(flags: list[str], clock: Clock) -> None:
    train_lightning.main(flags, callbacks=[TickingCallback(clock)])


def run_barebones_lightning(flags: list[str], clock: Clock) -> None:
    """trainer.fit with all that Lightning lets one switch off switched off: logging, bar, checkpoints, checks."""
    processes = start_processes()
    config = settle_config(load_config(flags, processes)[0], processes)[0]
    prepare_cpu(config.dim, config.batch_size)
    task = Task(config.num_categories, config.seq_len)
    splits = split_pairs(task, config.holdout, config.seed)
    data = make_datasets(task, splits, config.num_datas, config.seed)[0]
    loader = make_loader(BatchSampler(data, config.batch_size, True, config.seed))
    trainer = pl.Trainer(
        accelerator=config.accelerator, devices=1, max_epochs=1, barebones=True,
        gradient_clip_val=config.clip_norm, callbacks=[TickingCallback(clock)],
    )  # fmt: skip
    trainer.fit(train_lightning.LitTransformer(config, task, splits), loader)
