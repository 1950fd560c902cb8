"""Runs train.py and its Lightning twin as they are, in this process, and reads after each update.

PyTorch's own hook is used: it calls a function after every optimizer step, whoever wrote the loop.
"""

import contextlib
import io
import itertools
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator

import transformer_scratch.own_matplotlib  # noqa: F401 - before Lightning, which imports it, too

# isort: split
import wandb
from torch.optim.optimizer import register_optimizer_step_post_hook

import train
from transformer_scratch.batches import make_loaders
from transformer_scratch.config import load_config
from transformer_scratch.errors import exits_cleanly
from transformer_scratch.hardware import choose_device, choose_threads, keep_freed_memory
from transformer_scratch.processes import start_processes


class Enough(BaseException):
    """All updates that were wanted are done. Not an Exception: the programs would handle that."""


def read_after_updates(
    program: Callable[[list[str]], object],
    flags: list[str],
    updates: int,
    read: Callable[[], object] = time.perf_counter,
    wandb_mode: str = "disabled",
) -> list:
    """Run a program for one update to warm up and `updates` more. -> read() at the end of each.

    flags: with --batch-size, but without --num-datas: the epoch has to be longer than this.
    """
    readings = []

    def after_update(*_: object) -> None:
        readings.append(read())
        if len(readings) > updates:
            raise Enough

    batch_size = int(flags[flags.index("--batch-size") + 1])
    enough_data = ["--num-datas", str(batch_size * (updates + 3))]
    hook = register_optimizer_step_post_hook(after_update)
    try:
        with quietly() as folder:
            program([*flags, *enough_data, "--run-dir", folder, "--wandb", wandb_mode])
    except Enough:
        return readings
    finally:
        hook.remove()
    raise RuntimeError(f"the program ended after {len(readings)} updates")


def update_seconds(*arguments: object, **options: object) -> list[float]:
    """Run a program for so many updates. -> the seconds of each, logging and fetching included."""
    ends = read_after_updates(*arguments, **options)
    return [end - start for start, end in itertools.pairwise(ends)]


@contextlib.contextmanager
def quietly() -> Iterator[str]:
    """Hide what a program prints, unless it fails. -> a folder for its run, removed afterwards."""
    hidden, shown = io.StringIO(), sys.stderr
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(hidden),
        contextlib.redirect_stderr(hidden),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        for name in ("pytorch_lightning", "lightning_fabric"):
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield f"{folder}/run"
        except Enough:
            raise
        except BaseException:
            print(hidden.getvalue(), file=shown)
            raise
        finally:
            wandb.finish()


def run_to_the_end(
    program: Callable[[list[str]], object],
    flags: list[str],
    read: Callable[[int], object],
) -> list:
    """-> read(number of the update), from 1, at the end of each update."""
    readings = []
    hook = register_optimizer_step_post_hook(lambda *_: readings.append(read(len(readings) + 1)))
    try:
        with quietly() as folder:
            program([*flags, "--run-dir", folder, "--wandb", "disabled"])
    finally:
        hook.remove()
    return readings


def run_train(flags: list[str]) -> None:
    train.main(flags)


# Lightning is imported where it is needed: without it train.py can be measured alone.


def run_lightning(flags: list[str]) -> None:
    from comparison import train_lightning

    train_lightning.main(flags, callbacks=[])  # without the recorder, which only the proof needs


@exits_cleanly
def run_barebones_lightning(flags: list[str]) -> None:
    """trainer.fit with all switched off that can be: logging, bar, checkpoints, checks."""
    import pytorch_lightning as pl

    from comparison import train_lightning

    processes = start_processes()
    config, task, _, _ = load_config(flags, processes)
    device, _ = choose_device(config.accelerator)
    choose_threads(config.dim, config.batch_size)
    keep_freed_memory()
    train_loader, _, _ = make_loaders(config, task, processes, device)
    trainer = pl.Trainer(
        accelerator=config.accelerator,
        devices=1,
        max_epochs=1,
        barebones=True,
        gradient_clip_val=config.clip_norm,
    )
    trainer.fit(train_lightning.LitTransformer(config, task), train_loader)
