"""Several processes with a GPU each, over NCCL; and what one GPU can show of that."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import PROJECT
from metrics import step_losses
from trainings import NEW, SMALL, start_two

from transformer_scratch.errors import when_main_ends
from transformer_scratch.processes import Processes

NO_DROPOUT = [*SMALL, "--dropout", "0"]
HALF = [*NO_DROPOUT, "--batch-size", "16"]  # the updates of SMALL, shared by two
FAULTY = """
import os, sys
import plants, train
if os.environ["RANK"] == "1":
    plants.raise_at_step(4, ValueError("a fault in one process"))
train.main(sys.argv[1:])
"""


def as_one_of_two(accelerator: str) -> Processes:
    """Start a group of one process that takes itself for one of two.

    So one GPU sees all that several processes do: DDP, sums over NCCL, objects over gloo.
    """
    backend = "cpu:gloo,cuda:nccl" if accelerator == "gpu" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    when_main_ends(dist.destroy_process_group)
    return Processes(rank=0, local_rank=0, world_size=2)


def test_one_process_goes_the_way_of_several(accelerator, train, monkeypatch):
    import train as train_script

    runs = []
    for name in ("cpu", accelerator):
        monkeypatch.setattr(train_script, "start_processes", lambda name=name: as_one_of_two(name))
        flags = ["--devices", "2", "--accelerator", name, "--amp", "off", "--accumulate", "2"]
        runs.append(train(*HALF, *flags, "--run-dir", f"runs/{len(runs)}"))
    on_cpu, elsewhere = map(step_losses, runs)
    assert len(on_cpu) == 6
    assert elsewhere == pytest.approx(on_cpu, rel=0.01)


def torchrun(script: object, *flags: str) -> subprocess.CompletedProcess[str]:
    """Run a script in two processes, as the README does."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    search = os.pathsep.join([str(PROJECT), str(PROJECT / "tests/reliability")])
    return subprocess.run(
        [*command, "--nproc-per-node", "2", str(script), *flags],
        capture_output=True,
        encoding="utf-8",
        timeout=120,
        env={**os.environ, "PYTHONPATH": search},
    )


def test_a_process_without_a_gpu_of_its_own_is_refused(accelerator, monkeypatch):
    """A CPU is shared."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    done = torchrun(PROJECT / "train.py", *HALF, "--accelerator", accelerator)
    refused = "process 2 of this machine has no GPU of its own" in done.stderr
    assert refused == (done.returncode != 0) == (accelerator == "gpu"), done.stderr


@pytest.mark.two_gpus
def test_two_make_the_updates_of_one(accelerator, train):
    flags = ["--accelerator", accelerator, "--amp", "off"]
    one = train(*NO_DROPOUT, *flags)
    pair = start_two([*HALF, *flags, "--run-dir", "two"])
    codes, outputs = zip(*(training.wait() for training in pair), strict=True)
    assert codes == (0, 0), outputs
    assert step_losses(Path("two")) == pytest.approx(step_losses(one), rel=0.01)


@pytest.mark.two_gpus
def test_a_fault_in_one_of_two_ends_both(accelerator):
    """The one that fails must not wait for the other, which waits for it."""
    Path("faulty.py").write_text(FAULTY, encoding="utf-8")
    flags = [*HALF, *NEW, "--accelerator", accelerator, "--save-every", "2"]
    done = torchrun("faulty.py", *flags)
    assert done.returncode == 1
    assert "a fault in one process" in done.stderr
    assert torch.load("run/last.pt", map_location="cpu", weights_only=True)["step"] == 2
