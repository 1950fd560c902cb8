"""With deterministic kernels a run that is stopped and resumed is the run that was never stopped.

Each bit, also of dropout, whose random numbers a GPU draws itself.
"""

import os
import shlex
import signal
from pathlib import Path

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from trainings import fingerprint

FLAGS = shlex.split(
    "--dim 32 --num-heads 2 --num-layers 2 --dropout 0.2 --num-datas 640 --batch-size 128 "
    "--max-epochs 2"
)


@pytest.fixture
def stop_at():
    """Send this process a signal after so many updates."""
    hooks = []

    def stop_at(update: int) -> None:
        count = iter(range(1, 10**6))

        def after_update(*_: object) -> None:
            if next(count) == update:
                os.kill(os.getpid(), signal.SIGTERM)

        hooks.append(register_optimizer_step_post_hook(after_update))

    yield stop_at
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("amp", ["off", "fp16", "bf16"])
def test_stopped_within_an_epoch(amp, accelerator, deterministic, train, stop_at):
    flags = [*FLAGS, "--accelerator", accelerator, "--amp", amp]
    train(*flags, "--run-dir", "whole")
    train(*flags, "--run-dir", "again")
    assert fingerprint(Path("again")) == fingerprint(Path("whole")), "the same twice"
    stop_at(4)
    with pytest.raises(SystemExit) as stopped:
        train(*flags, "--run-dir", "parts")
    assert stopped.value.code == 128 + signal.SIGTERM
    assert torch.load("parts/last.pt", map_location="cpu", weights_only=True)["step"] == 4
    train("--resume", "parts")
    assert fingerprint(Path("parts")) == fingerprint(Path("whole"))
