"""Train with some source for a train.py, and note everything about it that a person would notice.

Names that train.py looks up when it runs are patched from outside; the source stays as it is.
"""

import contextlib
import importlib.util
import inspect
import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from transformer_scratch.checkpoint import CheckpointError, load_checkpoint
from transformer_scratch.optimizer import make_optimizer
from transformer_scratch.run_folder import RunFolder, read_metrics
from transformer_scratch.signals import Signals

PROJECT = Path(__file__).resolve().parent.parent.parent
NO_NUMBERS = "Cannot copy out of meta tensor"  # PyTorch's words


@dataclass
class Observed:
    """What a training did that a person would notice."""

    crash: str | None = None  # the last line on stderr of a training that failed
    losses: list[float] = field(default_factory=list)  # of every update
    figures: dict[str, float] = field(default_factory=dict)  # of the last epoch and of the test
    batches: int = 0  # whose loss was computed, validation and test included
    updates: int = 0  # written to metrics.jsonl
    readings: int = 0  # times the loop waited for the device to hand over numbers
    rows_logged: int = 0  # rows of updates that W&B got
    exchanges: int = 0  # of gradients between processes
    kib_kept: int = 0  # kept in evaluation for a backward pass that never comes
    resume_step: int | None = None  # where --resume would continue
    best_epoch: int | None = None
    epochs_kept: int = 0  # epoch=K.pt files


def observe(source: str, flags: list[str], on_meta: bool = False) -> Observed:
    """Train with this source for a train.py, in this process or, with --devices 2, in two new ones.

    on_meta: on PyTorch's meta device, as if it were a GPU.
    """
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "changed_train.py")
        script.write_text(source, encoding="utf-8")
        if "--devices" in flags:
            return observe_two_processes(script, flags)
        return observe_script(script, flags, on_meta)


def observe_script(script: Path, flags: list[str], on_meta: bool = False) -> Observed:
    seen = Observed()
    spec = importlib.util.spec_from_file_location(script.stem, script)
    train = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(train)
    torch.seed()  # so that nothing is seeded by accident
    run, stderr = script.with_name("run"), io.StringIO()
    signals_heard: list[int] = []

    def remember(signals: Signals, number: int, frame: object, original=Signals.remember) -> None:
        signals_heard.append(number)
        original(signals, number, frame)

    with (
        watched(train, seen),
        mock.patch.object(Signals, "remember", remember),
        on_meta_device(train) if on_meta else contextlib.nullcontext(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(stderr),
    ):
        try:
            train.main([*flags, "--run-dir", str(run)])
        except SystemExit:
            seen.crash = stderr.getvalue().splitlines()[-1]
    if signals_heard:  # Ctrl-C was for all trainings, not for this one alone
        raise KeyboardInterrupt
    read_folder(run, seen)
    return seen


@contextlib.contextmanager
def watched(train: ModuleType, seen: Observed) -> Iterator[None]:
    """Count what the training does."""

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        seen.kib_kept += tensor.nbytes // 1024
        return tensor

    def evaluate(*arguments: object, original=train.evaluate) -> object:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            return original(*arguments)

    def exchange(state: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        seen.exchanges += 1
        return allreduce_hook(state, bucket)

    def parallel(model: torch.nn.Module) -> DistributedDataParallel:
        network = DistributedDataParallel(model)
        network.register_comm_hook(None, exchange)
        return network

    with (
        mock.patch.object(train, "evaluate", evaluate),
        mock.patch.object(train, "DistributedDataParallel", parallel),
        mock.patch.object(train, "token_loss", side_effect=train.token_loss) as token_loss,
        mock.patch.object(RunFolder, "flush", autospec=True, side_effect=RunFolder.flush) as flush,
        mock.patch.object(train, "log") as log,
    ):
        try:
            yield
        finally:
            seen.batches, seen.readings = token_loss.call_count, flush.call_count
            rows = [call.args[0] for call in log.call_args_list]
            seen.rows_logged = sum("train/loss_step" in row for row in rows)


@contextlib.contextmanager
def on_meta_device(train: ModuleType) -> Iterator[None]:
    """Stand in for a GPU by the meta device, which knows shapes and no numbers.

    Like a GPU it refuses tensors that are somewhere else. The training ends where it first reads a
    number (NO_NUMBERS). What the device lacks (autocast, the fused optimizer, saving) is left out.
    """

    def optimizer(*arguments: object, **options: object) -> torch.optim.Optimizer:
        given = inspect.signature(make_optimizer).bind(*arguments, **options)
        given.arguments["fused"] = False
        return make_optimizer(*given.args, **given.kwargs)

    with (
        mock.patch.object(train, "choose_device", return_value=(torch.device("meta"), "")),
        mock.patch.object(train, "make_optimizer", optimizer),
        mock.patch.object(torch.amp, "autocast", lambda *_, **__: contextlib.nullcontext()),
        mock.patch.object(RunFolder, "save"),
    ):
        yield


def read_folder(run: Path, seen: Observed) -> None:
    """What the training left behind."""
    for row in read_metrics(run):
        if "train/loss_step" in row:
            seen.losses.append(row["train/loss_step"])
        else:
            seen.figures |= {name: value for name, value in row.items() if "/" in name}
    seen.updates = len(seen.losses)
    seen.epochs_kept = len(list(run.glob("epoch=*.pt")))
    with contextlib.suppress(CheckpointError):
        seen.resume_step = load_checkpoint(run / "last.pt")["step"]
    with contextlib.suppress(CheckpointError):
        seen.best_epoch = load_checkpoint(run / "best.pt")["epoch"]


def observe_two_processes(script: Path, flags: list[str]) -> Observed:
    """Two processes train together; what the first one observed."""
    result = script.with_name("observed.json")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    this = ["-m", "comparison.hidden_steps.observe", str(script), str(result)]
    finished = subprocess.run(
        [sys.executable, *torchrun, *this, *flags], cwd=PROJECT, capture_output=True
    )
    if not result.exists():
        raise RuntimeError(finished.stderr.decode(errors="replace"))
    return Observed(**json.loads(result.read_text(encoding="utf-8")))


if __name__ == "__main__":  # one of two processes
    observed = observe_script(Path(sys.argv[1]), sys.argv[3:])
    if os.environ["RANK"] == "0":
        Path(sys.argv[2]).write_text(json.dumps(asdict(observed)), encoding="utf-8")
