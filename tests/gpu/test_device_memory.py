"""A training takes no more memory from epoch to epoch; where there is none it says so in a line."""

import contextlib
import gc
from pathlib import Path

import pytest
import torch
from conftest import TINY
from metrics import step_losses
from torch.optim.optimizer import register_optimizer_step_post_hook


def held(accelerator: str) -> dict[str, int]:
    """How many tensors there are, and how many bytes on the GPU."""
    gc.collect()
    tensors = sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
    return {
        "tensors": tensors,
        "bytes": torch.cuda.memory_allocated() if accelerator == "gpu" else 0,
    }


@pytest.mark.parametrize("amp", ["off", "fp16", "bf16"])
def test_it_is_the_same_after_every_epoch(amp, accelerator, train, monkeypatch):
    import train as train_script

    after_epochs = []
    monkeypatch.setattr(
        train_script.summary, "print_epoch", lambda *_: after_epochs.append(held(accelerator))
    )
    flags = ["--num-datas", "1280", "--max-epochs", "6", "--save-top-k", "1"]
    train(*TINY, *flags, "--accelerator", accelerator, "--amp", amp)
    assert len(after_epochs) == 6
    # One tensor an update left over would be 160, each of 512 bytes or more.
    assert after_epochs[-1]["tensors"] - after_epochs[1]["tensors"] < 40
    assert after_epochs[-1]["bytes"] - after_epochs[1]["bytes"] < 40 * 512


def take_all_memory() -> list[torch.Tensor]:
    """Let this process have no more memory of the GPU. -> what fills all that it has."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-6)
    taken = []
    for size in (2**20, 2**16, 2**12, 2**9):
        with contextlib.suppress(torch.OutOfMemoryError):
            while True:
                taken.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
    return taken


def test_out_of_memory_is_one_line_and_the_state_is_whole(accelerator, train, capsys):
    """On the CPU, whose memory cannot be taken away, PyTorch's error is raised instead."""
    flags = [*TINY, "--dropout", "0", "--accelerator", accelerator, "--save-every", "3"]
    train(*flags, "--run-dir", "whole")
    count, taken = iter(range(1, 10**6)), []

    def after_update(*_: object) -> None:
        if next(count) == 8:
            if accelerator == "cpu":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
            taken.extend(take_all_memory())

    hook = register_optimizer_step_post_hook(after_update)
    capsys.readouterr()
    try:
        with pytest.raises(SystemExit) as ended:
            train(*flags, "--run-dir", "run")
    finally:
        hook.remove()
        taken.clear()
        if accelerator == "gpu":
            torch.cuda.set_per_process_memory_fraction(1.0)
    assert ended.value.code == 1
    printed = capsys.readouterr().err
    assert printed.count("error: out of memory") == 1 and "Traceback" not in printed
    assert torch.load("run/last.pt", map_location="cpu", weights_only=True)["step"] == 6

    train("--resume", "run")
    losses = step_losses(Path("run"))
    assert len(losses) == 20
    assert losses == pytest.approx(step_losses(Path("whole")), rel=1e-3)
