"""Runs train.py or its twin with a stopwatch beside it; nothing in either program knows of it.

    python -m comparison.measured plain|lightning FILE.json STEPS LOG_EVERY START_TIME [training flags]

The clock is read after every optimizer step. What both programs call alike to compute (fetching a batch, the model, its
loss, backward, the end of autocast, clipping, AdamW's step, zero_grad) is timed on its own; the rest of a step is what
its loop costs.
"""

import contextlib
import functools
import importlib
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from tqdm import tqdm

from transformer_scratch.model import Transformer

WARM_UP = 5  # updates that are not timed

# Both programs look these up by name when they call them, so that timing them needs no change in either.
SHARED = [
    (torch.utils.data.dataloader._BaseDataLoaderIter, "__next__"),
    (Transformer, "forward"),
    (torch.nn.functional, "cross_entropy"),
    (torch.amp.autocast, "__exit__"),  # lets go of the weights it has cast
    (torch.nn.utils, "clip_grad_norm_"),
    (torch.optim.Optimizer, "zero_grad"),
    (
        torch.autograd.profiler.record_function,
        "__enter__",
    ),  # PyTorch puts it around every optimizer's step
    (torch.autograd.profiler.record_function, "__exit__"),
]


class Stopwatch:
    """Reads the clock at every update, and adds up the time spent in what both programs share.

    program: the file whose main() runs, for the count of frames; on_update: what to call after every update.
    """

    def __init__(self, program: str | None = None, on_update: Callable[[], object] = lambda: None):
        self.program, self.on_update = program, on_update
        self.shared = 0.0
        self.depth, self.started = 0, 0.0
        self.frames: int | None = None
        self.readings: list[tuple[float, float]] = []  # (time, shared time) after each update

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Time what runs meanwhile."""
        timed = [
            (owner, name, self.timed(getattr(owner, name), name == "cross_entropy"))
            for owner, name in SHARED
        ]
        timed += [(torch.Tensor, "backward", self.timed_backward(torch.Tensor.backward))]
        timed += [(torch.optim.AdamW, "step", self.timed_step(torch.optim.AdamW.step))]
        with contextlib.ExitStack() as stack:
            for owner, name, function in timed:
                stack.enter_context(mock.patch.object(owner, name, function))
            stack.callback(register_optimizer_step_post_hook(self.after_update).remove)
            yield

    def timed(self, function, is_loss: bool):
        @functools.wraps(function)
        def call(*args, **kwargs):
            if is_loss and self.program and self.frames is None and torch.is_grad_enabled():
                self.frames = self.frames_above()
            with self:
                result = function(*args, **kwargs)
            if is_loss:
                self.loss = result
            return result

        return call

    def timed_backward(self, backward):
        """With it goes freeing the graph, which otherwise happens at some later line that lets go of the loss."""

        @functools.wraps(backward)
        def call(tensor, *args, **kwargs):
            with self:
                backward(tensor, *args, **kwargs)
                tensor.detach_()
                self.loss.detach_()

        return call

    def timed_step(self, step):
        """The optimizer's step, without the closure in which Lightning runs everything else."""

        @functools.wraps(step)
        def call(optimizer, closure=None):
            with self:
                return step(optimizer, closure and self.stopped(closure))

        return call

    def __enter__(self) -> None:
        """Count the time from here on as shared; once, where one shared function calls another."""
        self.depth += 1
        if self.depth == 1:
            self.started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.depth -= 1
        if self.depth == 0:
            self.shared += time.perf_counter() - self.started

    def stopped(self, closure):
        def call():
            self.shared += time.perf_counter() - self.started
            depth, self.depth = self.depth, 0
            try:
                return closure()
            finally:
                self.depth, self.started = depth, time.perf_counter()

        return call

    def frames_above(self) -> int:
        """How many functions are open between the program's main() and the loss, both ends included."""
        frame, count = sys._getframe(2), 1
        while frame.f_code.co_name != "main" or Path(frame.f_code.co_filename).stem != self.program:
            frame, count = frame.f_back, count + 1
        return count

    def after_update(self, optimizer: object, args: tuple, kwargs: dict) -> None:
        now = time.perf_counter()
        # From the second optimizer of a process on, PyTorch calls this from within AdamW's step, which is shared.
        running = now - self.started if self.depth else 0.0
        self.readings.append((now, self.shared + running))
        self.on_update()

    def results(self, log_every: int) -> dict:
        """Milliseconds of a step, and the microseconds of it around the model.

        Logging happens every log_every updates: windows of that length hold one each, and their median is taken.
        """
        readings = self.readings[WARM_UP:]
        window = max(1, min(log_every, len(readings) - 1))
        pairs = list(zip(readings[:-window], readings[window:], strict=True))
        if not pairs:
            return {"step_ms": None, "around_us": None}
        steps = [(b[0] - a[0]) / window for a, b in pairs]
        around = [(b[0] - a[0] - b[1] + a[1]) / window for a, b in pairs]
        return {
            "step_ms": statistics.median(steps) * 1e3,
            "around_us": statistics.median(around) * 1e6,
        }


def main() -> None:
    which, file, steps, log_every, started, *flags = sys.argv[1:]
    is_main = os.environ.get("RANK", "0") == "0"
    file = Path(file)
    screen = os.fdopen(os.dup(2), "w")
    output = open(file.with_suffix(".txt"), "a")  # noqa: SIM115 - what the program prints, until this process ends
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    interval = 0.2 if screen.isatty() else 10.0
    bar = tqdm(
        total=int(steps),
        desc=f"{which:<10}",
        unit="step",
        file=screen,
        mininterval=interval,
        disable=not is_main,
    )

    program = "train" if which == "plain" else "comparison.train_lightning"
    watch = Stopwatch(program.split(".")[-1], bar.update)
    with contextlib.closing(bar), watch.running():
        importlib.import_module(program).main(flags)
    if is_main:
        first_update = watch.readings[0][0] - time.perf_counter() + time.time()
        results = {
            **watch.results(int(log_every)),
            "startup_s": first_update - float(started),
            "total_s": time.time() - float(started),
            "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            / (2**20 if sys.platform == "darwin" else 2**10),
            "frames": watch.frames,
        }
        file.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
