"""Faults to plant into a training before it starts: functions for `run(..., plant=...)`."""

import functools
import io
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import torch

import train
from transformer_scratch import checkpoint, data, run_folder


def chain(*plants: Callable[[], None]) -> Callable[[], None]:
    return functools.partial(plant_all, plants)


def plant_all(plants: tuple[Callable[[], None], ...]) -> None:
    for plant in plants:
        plant()


def signal_at_step(step: int, number: int, times: int = 1) -> None:
    """Send this process a signal while it computes the gradients of an update (from 1), in the middle of the step."""
    original, calls = torch.nn.utils.clip_grad_norm_, iter(range(1, 10**6))

    def clip_grad_norm_(*arguments: object) -> torch.Tensor:
        if next(calls) == step:
            for _ in range(times):
                os.kill(os.getpid(), number)
        return original(*arguments)

    torch.nn.utils.clip_grad_norm_ = clip_grad_norm_


def overflow_in_fp16() -> None:
    """A loss scale that is too large at first and grows soon: real overflows, real growth, all within a few updates."""
    torch.amp.GradScaler = functools.partial(torch.amp.GradScaler, init_scale=2.0**19, growth_interval=3)


def leave_out(name: str) -> None:
    """Resume without restoring one part of the state."""
    nothing = lambda *arguments, **others: None  # noqa: E731
    if name == "rng":
        train.set_rng_state = nothing
    elif name == "metrics":
        run_folder.RunFolder.cut_metrics = nothing
    elif name == "position":
        original = train.BatchSampler.set_epoch
        train.BatchSampler.set_epoch = lambda sampler, epoch, first_batch: original(sampler, epoch)
    else:
        owner = {
            "model": train.Transformer,
            "optimizer": torch.optim.AdamW,
            "scheduler": torch.optim.lr_scheduler.LambdaLR,
            "scaler": torch.amp.GradScaler.func,
        }[name]
        owner.load_state_dict = nothing


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_in_save(moment: str, number: int) -> None:
    """Kill this process at a moment of writing last.pt for the number-th time."""
    calls = iter(range(1, 10**6))
    due = lambda path: str(path).endswith("last.pt") and next(calls) == number  # noqa: E731
    save, link, replace = torch.save, checkpoint.link, os.replace

    def killed_save(content: dict, file: BinaryIO, **others: object) -> None:
        # Tensors that travel between processes are saved to memory.
        if isinstance(file, io.BytesIO) or not due(file.name.rsplit(".", 2)[0]):  # last.pt.<pid>.tmp
            return save(content, file, **others)
        if moment == "half written":
            whole = io.BytesIO()
            save(content, whole)
            file.write(whole.getbuffer()[: whole.tell() // 2])
            file.flush()
        kill()

    def killed_link(existing: Path, name: Path) -> None:
        link(existing, name)
        if due(existing):
            kill()

    def killed_replace(source: Path, target: Path) -> None:
        last = due(target)
        if last and moment == "before the rename":
            kill()
        replace(source, target)
        if last:
            kill()

    if moment in ("before writing", "half written"):
        torch.save = killed_save
    elif moment == "after keeping the previous":
        checkpoint.link = killed_link
    else:
        os.replace = killed_replace


def kill_in_ranking(moment: str, number: int) -> None:
    """Kill this process when it points best.pt to the best epoch for the number-th time."""
    calls, link = iter(range(1, 10**6)), run_folder.link

    def killed_link(existing: Path, name: Path) -> None:
        due = next(calls) == number
        if due and moment == "before":
            kill()
        link(existing, name)
        if due:
            kill()

    run_folder.link = killed_link


def kill_in_metrics(number: int) -> None:
    """Kill this process when half of the lines are written, at the number-th time that lines are."""
    calls, append = iter(range(1, 10**6)), run_folder.RunFolder.append

    def killed_append(run: run_folder.RunFolder, rows: list[dict]) -> None:
        if next(calls) < number:
            return append(run, rows)
        os.write(run.metrics.fileno(), b'{"step": 9, "epo')
        kill()

    run_folder.RunFolder.append = killed_append


def signal_while_answering(call: int, number: int) -> None:
    """Send this process a signal while it answers pairs: each epoch's validation is a call, and then the test."""
    original, calls = train.predict, iter(range(1, 10**6))

    def predict(*arguments: object) -> list:
        if next(calls) == call:
            os.kill(os.getpid(), number)
        return original(*arguments)

    train.predict = predict


def signal_in_save(number: int, times: int = 1) -> None:
    """Send this process a signal while it writes the state at the end of the first epoch."""
    calls, save = iter(range(1, 10**6)), torch.save

    def interrupted_save(content: dict, file: BinaryIO) -> None:
        if file.name.rsplit(".", 2)[0].endswith("last.pt") and next(calls) == 2:
            file.write(b"half")
            file.flush()
            for _ in range(times):
                os.kill(os.getpid(), number)
            file.seek(0)
        save(content, file)

    torch.save = interrupted_save


def raise_at_step(step: int, error: BaseException) -> None:
    """Let the gradients of an update (from 1) raise."""
    original, calls = torch.nn.utils.clip_grad_norm_, iter(range(1, 10**6))

    def clip_grad_norm_(*arguments: object) -> torch.Tensor:
        if next(calls) == step:
            raise error
        return original(*arguments)

    torch.nn.utils.clip_grad_norm_ = clip_grad_norm_


def bad_number_at_batch(batch: int, number: float) -> None:
    """Make the loss of a batch (from 1) NaN or infinite."""
    original, calls = train.F.cross_entropy, iter(range(1, 10**6))

    def cross_entropy(*arguments: object, **others: object) -> torch.Tensor:
        loss = original(*arguments, **others)
        return loss * number if next(calls) == batch else loss

    train.F.cross_entropy = cross_entropy


def raise_in_dataset(batch: int) -> None:
    """Let the dataset raise when it fetches a batch (from 1)."""
    calls, fetch = iter(range(1, 10**6)), data.PairDataset.__getitem__

    def failing(dataset: data.PairDataset, item: tuple) -> data.Batch:
        if next(calls) == batch:
            raise ValueError("a damaged sample")
        return fetch(dataset, item)

    data.PairDataset.__getitem__ = failing


def in_a_worker(fault: Callable[[], None]) -> None:
    """Let a fault happen in the worker that prepares the fourth batch."""
    fetch, main = data.PairDataset.__getitem__, os.getpid()
    calls = iter(range(1, 10**6))

    def faulty(dataset: data.PairDataset, item: tuple) -> data.Batch:
        if os.getpid() != main and next(calls) == 2:  # of two workers, one prepares batches 2, 4, 6, ...
            fault()
        return fetch(dataset, item)

    data.PairDataset.__getitem__ = faulty
    data.WORKER_TIMEOUT = 1


def little_memory() -> None:
    """Let this process have a little more address space than it has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + 2**28
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def small_files(size: int) -> None:
    """No file of this process may grow beyond a size, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def in_float64() -> None:
    """Compute with so many digits that only the order of sums remains as a difference, at the fifteenth of them."""
    torch.set_default_dtype(torch.float64)
