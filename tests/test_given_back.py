"""What a program changes for the whole process is as before when its main function ends."""

import random
import subprocess
import sys

import pytest
import torch
from conftest import PROJECT, TINY

import train as train_script
from transformer_scratch.errors import BadInput, exits_cleanly
from transformer_scratch.hardware import choose_device


def random_numbers() -> tuple:
    return random.getstate(), torch.get_rng_state().tolist()


@pytest.mark.parametrize("flags", [[], ["--run-dir", "/proc/run"], ["--lr", "1e9"]])
def test_the_random_numbers(capsys, flags):
    """After a training that ends well, one that is refused, and one whose numbers go bad."""
    random.seed(5)
    torch.manual_seed(5)
    before = random_numbers()
    try:
        train_script.main([*TINY, "--wandb", "disabled", "--warmup-steps", "0", *flags])
    except SystemExit as end:
        assert end.code == (2 if "--run-dir" in flags else 1)
    assert random_numbers() == before


@pytest.mark.parametrize("ends_well", [True, False])
def test_the_current_gpu(monkeypatch, ends_well):
    """A notebook on a machine with several GPUs goes on with its own."""
    current = [3]
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, device: zeros(*size))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: current.insert(0, device))

    @exits_cleanly
    def main() -> None:
        choose_device("gpu", 1)
        assert torch.device(current[0]).index == 1
        if not ends_well:
            raise BadInput("something else")

    if ends_well:
        main()
    else:
        with pytest.raises(SystemExit):
            main()
    assert current[0] == 3


@pytest.mark.slow
def test_memory_that_was_kept():
    """A notebook that has trained holds no more of the machine than before."""
    code = """
import torch
from transformer_scratch.errors import exits_cleanly
from transformer_scratch.hardware import keep_freed_memory

def megabytes():
    with open("/proc/self/statm", encoding="utf-8") as file:
        return int(file.read().split()[1]) * 4096 // 2**20

@exits_cleanly
def main():
    keep_freed_memory()
    blocks = [torch.ones(2**18) for _ in range(300)]
    del blocks
    return megabytes()

before = megabytes()
print(before, main(), megabytes())
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, encoding="utf-8", check=True)
    before, during, after = map(int, done.stdout.split())
    assert during > before + 250 and after < before + 50
