"""Faults to plant into a training before it starts: functions for `run(..., plant=...)`."""

import functools
import io
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import torch
import tqdm

import train
from transformer_scratch import batches, checkpoint, progress, random_state, run_folder, summary


def chain(*plants: Callable[[], None]) -> Callable[[], None]:
    return functools.partial(plant_all, plants)


def plant_all(plants: tuple[Callable[[], None], ...]) -> None:
    for plant in plants:
        plant()


def counter() -> Callable[[], int]:
    """-> a function that returns 1, 2, 3, ..."""
    return functools.partial(next, iter(range(1, 10**6)))


# ------------------------------------------------------------------------------ in an update


def act_at_step(step: int, act: Callable[[], None]) -> None:
    """Do something in the middle of an update (from 1), while its gradients are computed."""
    original, count = torch.nn.utils.clip_grad_norm_, counter()

    def clip_grad_norm_(*arguments: object) -> torch.Tensor:
        if count() == step:
            act()
        return original(*arguments)

    torch.nn.utils.clip_grad_norm_ = clip_grad_norm_


def signal_at_step(step: int, number: int, times: int = 1) -> None:
    """Send this process a signal in the middle of an update."""

    def send() -> None:
        for _ in range(times):
            os.kill(os.getpid(), number)

    act_at_step(step, send)


def raise_at_step(step: int, error: BaseException) -> None:
    """Let an update raise."""

    def fail() -> None:
        raise error

    act_at_step(step, fail)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def bad_number_at_batch(batch: int, number: float) -> None:
    """Make the loss of a batch (from 1) NaN or infinite."""
    original, count = train.F.cross_entropy, counter()

    def cross_entropy(*arguments: object, **others: object) -> torch.Tensor:
        loss = original(*arguments, **others)
        return loss * number if count() == batch else loss

    train.F.cross_entropy = cross_entropy


def overflow_in_fp16() -> None:
    """Overflow and growth within a few updates: the loss scale starts too large and grows soon."""
    torch.amp.GradScaler = functools.partial(
        torch.amp.GradScaler, init_scale=2.0**19, growth_interval=3
    )


def late_after_meeting(seconds: float) -> None:
    """Let this process pause when it has met the others."""
    original = train.start_processes

    def start_processes() -> object:
        processes = original()
        time.sleep(seconds)
        return processes

    train.start_processes = start_processes


def in_float64() -> None:
    """Round 10^9 times finer, so that almost nothing remains of the order of sums."""
    torch.set_default_dtype(torch.float64)


# ------------------------------------------------------------------------------- in the state


def leave_out(name: str) -> None:
    """Resume without restoring one part of the state."""
    if name == "metrics":
        run_folder.RunFolder.truncate_metrics = ignore
    elif name == "batches done":
        set_epoch = batches.BatchSampler.set_epoch
        batches.BatchSampler.set_epoch = lambda sampler, epoch, _: set_epoch(sampler, epoch)
    elif name in ("ranking", "epoch_loss"):
        load = progress.Progress.load_state_dict

        def load_less(this: progress.Progress, state: dict) -> None:
            load(this, {**state, name: getattr(this, name)})

        progress.Progress.load_state_dict = load_less
    else:
        owners = {
            "model": train.Transformer,
            "optimizer": torch.optim.AdamW,
            "scheduler": torch.optim.lr_scheduler.LambdaLR,
            "scaler": torch.amp.GradScaler.func,
            "rng": random_state.RandomState,
        }
        owners[name].load_state_dict = ignore


def ignore(*arguments: object, **others: object) -> None:
    pass


# --------------------------------------------------------------------------- in what is written


def kill_in_save(moment: str, number: int) -> None:
    """Kill this process at a moment of writing last.pt for the number-th time."""
    count = counter()
    save, link, replace = torch.save, checkpoint.link, os.replace

    def due(path: object) -> bool:
        return str(path).endswith("last.pt") and count() == number

    def killed_save(content: dict, file: BinaryIO, **others: object) -> None:
        # Tensors that travel between processes are saved to memory.
        if isinstance(file, io.BytesIO) or not due(file.name.rsplit(".", 2)[0]):
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
    count, link = counter(), run_folder.link

    def killed_link(existing: Path, name: Path) -> None:
        due = count() == number
        if due and moment == "before":
            kill()
        link(existing, name)
        if due:
            kill()

    run_folder.link = killed_link


def kill_in_metrics(number: int) -> None:
    """Kill this process when it has written half of the number-th line of metrics."""
    count, write = counter(), run_folder.RunFolder.write

    def killed_write(run: run_folder.RunFolder, row: dict) -> None:
        if count() < number:
            return write(run, row)
        os.write(run.metrics.fileno(), b'{"step": 9, "epo')
        kill()

    run_folder.RunFolder.write = killed_write


def signal_in_save(number: int, times: int = 1) -> None:
    """Send this process a signal while it writes the state at the end of the first epoch."""
    count, save = counter(), torch.save

    def interrupted_save(content: dict, file: BinaryIO) -> None:
        if file.name.rsplit(".", 2)[0].endswith("last.pt") and count() == 2:
            file.write(b"half")
            file.flush()
            for _ in range(times):
                os.kill(os.getpid(), number)
            file.seek(0)
        save(content, file)

    torch.save = interrupted_save


def signal_while_answering(call: int, number: int) -> None:
    """Send this process a signal while it answers pairs: a call an epoch, two for the test."""
    original, count = train.predict, counter()

    def predict(*arguments: object) -> list:
        if count() == call:
            os.kill(os.getpid(), number)
        return original(*arguments)

    train.predict = predict


def small_files(size: int) -> None:
    """No file of this process may grow beyond a size, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


# ---------------------------------------------------------------------------- in what is shown

OUTPUTS = {  # what shows a number or a text -> where train.py finds it
    "the bar moves": (tqdm.tqdm, "update"),
    "the bar shows the loss": (tqdm.tqdm, "set_postfix"),
    "W&B gets a row": (train, "log"),
    "the epoch is printed": (summary, "print_epoch"),
    "the result is printed": (summary, "print_end"),
}


def act_at_output(output: str, number: int, act: Callable[[], None]) -> None:
    """Do something instead of showing something for the number-th time."""
    owner, name = OUTPUTS[output]
    original, count = getattr(owner, name), counter()

    def show(*arguments: object, **others: object) -> object:
        return act() if count() == number else original(*arguments, **others)

    setattr(owner, name, show)


def lose_output(how: str) -> None:
    """Whatever is written to stdout and stderr fails from now on."""
    if how == "closed":  # as by >&- 2>&- <&-, before Python starts
        sys.stdin = sys.stdout = sys.stderr = None
        for descriptor in range(3):
            os.close(descriptor)
        return
    if how == "terminal gone":
        other_end, lost = os.openpty()
        os.close(other_end)
    elif how == "reader gone":
        other_end, lost = os.pipe()
        os.close(other_end)
    else:
        lost = os.open("/dev/full", os.O_WRONLY)
    os.dup2(lost, 1)
    os.dup2(lost, 2)
    os.close(lost)


def raise_in_dataset(batch: int) -> None:
    """Let the dataset raise when it fetches a batch (from 1)."""
    count, fetch = counter(), batches.PairDataset.__getitem__

    def failing(dataset: batches.PairDataset, item: batches.BatchIndices) -> batches.Batch:
        if count() == batch:
            raise ValueError("a damaged sample")
        return fetch(dataset, item)

    batches.PairDataset.__getitem__ = failing


def in_a_worker(batch: int, fault: Callable[[], None]) -> None:
    """Let a fault happen in each data worker when it prepares its batch-th batch."""
    fetch, main, count = batches.PairDataset.__getitem__, os.getpid(), counter()

    def faulty(dataset: batches.PairDataset, item: batches.BatchIndices) -> batches.Batch:
        if os.getpid() != main and count() == batch:
            fault()
        return fetch(dataset, item)

    batches.PairDataset.__getitem__ = faulty
    batches.WORKER_TIMEOUT = 1


def little_memory() -> None:
    """Let this process have a little more address space than it has now."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + 2**28
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
