"""Trains with some source for a train.py, and notes everything about it that somebody would notice."""

import contextlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from transformer_scratch.checkpoint import load_checkpoint

PROJECT = Path(__file__).resolve().parent.parent


@dataclass
class Observed:
    """What a training did that somebody would notice."""

    crash: str | None = None
    losses: list[float] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)  # of the last epoch and of the test
    batches: int = 0  # sent through the model in training
    times: list[float] = field(default_factory=list)  # when each of them had its loss, in seconds
    readings: int = 0  # times the loop waited for the device to hand over numbers
    logged: int = 0  # rows of updates that W&B got
    exchanges: int = 0  # of gradients between processes
    kept_bytes: int = 0  # saved in evaluation for a backward pass that never comes
    resume_step: int | None = None  # where --resume would go on
    epochs_kept: list[str] = field(default_factory=list)
    best_epoch: int | None = None


def observe(source: str, flags: list[str], on_meta: bool = False) -> Observed:
    """Train with this source for a train.py, in this process, and look on."""
    seen = Observed()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    torch.seed()  # so that nothing seeds by accident
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        file = Path(folder, "train_without.py")
        file.write_text(source)
        spec = importlib.util.spec_from_file_location("train_without", file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        look_on(module, seen)
        if on_meta:
            move_to_meta(module, stack)
        nowhere = stack.enter_context(open(os.devnull, "w"))
        stack.enter_context(contextlib.redirect_stdout(nowhere))
        stack.enter_context(contextlib.redirect_stderr(nowhere))
        run = Path(folder, "run")
        try:
            module.main([*flags, "--run-dir", str(run)])
        except Exception as error:
            seen.crash = f"{type(error).__name__}: {str(error).splitlines()[0][:90]}"
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        read_folder(run, seen)
    return seen


def look_on(module: ModuleType, seen: Observed) -> None:
    """Put observers in the place of names that train.py uses."""
    token_loss, write_rows = module.token_loss, module.write_rows

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        seen.kept_bytes += tensor.nbytes
        return tensor

    def watched_loss(network, batch):
        if sys._getframe(1).f_code.co_name == "evaluate":
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                return token_loss(network, batch)
        loss = token_loss(network, batch)
        seen.batches += 1
        seen.times.append(time.perf_counter())
        return loss

    def watched_rows(run, waiting):
        seen.readings += 1
        write_rows(run, waiting)

    def log(row: dict) -> None:
        seen.logged += "train/loss_step" in row

    def count_exchange(state: None, bucket: dist.GradBucket):
        seen.exchanges += 1
        return allreduce_hook(state, bucket)

    def watched_parallel(model):
        parallel = DistributedDataParallel(model)
        parallel.register_comm_hook(None, count_exchange)
        return parallel

    nothing = lambda *args, **kwargs: None  # noqa: E731
    module.token_loss, module.write_rows = watched_loss, watched_rows
    module.DistributedDataParallel = watched_parallel
    module.wandb = SimpleNamespace(log=log, alert=nothing, finish=nothing)


def move_to_meta(module: ModuleType, stack: contextlib.ExitStack) -> None:
    """Let the loop believe in a device that is not the CPU; nothing of it can be saved, and some helpers lack it."""
    settle_config, make_optimizer, open_run = (
        module.settle_config,
        module.make_optimizer,
        module.open_run,
    )

    def settle(config, processes):
        config, _, dtype, reasons = settle_config(config, processes)
        return config, torch.device("meta"), dtype, reasons

    module.settle_config = settle
    module.make_optimizer = lambda *args, fused: make_optimizer(*args, fused=False)
    for owner, name, stand_in in (
        (torch.amp, "autocast", lambda *args, **kwargs: contextlib.nullcontext()),
        (torch.Tensor, "cpu", lambda tensor: tensor),
    ):
        stack.callback(setattr, owner, name, getattr(owner, name))
        setattr(owner, name, stand_in)

    def open_and_save_nothing(*args):
        run = open_run(*args)
        run.save_last = lambda **state: None
        return run

    module.open_run = open_and_save_nothing


def read_folder(run: Path, seen: Observed) -> None:
    """What the training left behind."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    seen.losses = [row["train/loss_step"] for row in rows if "train/loss_step" in row]
    for row in rows:
        if "train/loss_step" not in row:
            seen.figures |= {name: value for name, value in row.items() if "/" in name}
    with contextlib.suppress(Exception):
        seen.resume_step = load_checkpoint(run / "last.pt")["step"]
    with contextlib.suppress(Exception):
        seen.best_epoch = load_checkpoint(run / "best.pt")["epoch"]
    seen.epochs_kept = sorted(path.name for path in run.glob("epoch=*.pt"))


def observe_on_two_processes(source: str, flags: list[str]) -> Observed:
    """The same on two processes that talk to each other; the first one's observations."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    world = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "PYTHONPATH": str(PROJECT),
    }
    command = [sys.executable, "-m", "comparison.watching", *flags]
    processes = [
        subprocess.Popen(
            command, env={**os.environ, **world, "RANK": str(rank), "LOCAL_RANK": str(rank)}, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )
        for rank in range(2)
    ]  # fmt: skip
    for process in processes:
        process.stdin.write(source)
        process.stdin.close()
    outputs = [process.stdout.read() for process in processes]
    for process in processes:
        process.wait()
    return Observed(**json.loads(outputs[0].splitlines()[-1]))


if __name__ == "__main__":  # one process of two: the source comes in, the observations go out
    print(json.dumps(asdict(observe(sys.stdin.read(), sys.argv[1:]))))
