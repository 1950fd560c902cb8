"""What is chosen for a GPU, as far as a machine without one can show it."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import PROJECT, TINY

import evaluate
import train as train_script
from transformer_scratch import processes, run_folder
from transformer_scratch.errors import BadInput, exits_cleanly
from transformer_scratch.hardware import choose_kernels, choose_precision
from transformer_scratch.optimizer import can_fuse
from transformer_scratch.random_state import RandomState

GPU = torch.device("cuda", 0)


@pytest.fixture(params=[True, False], ids=["with bf16", "without"])
def has_bf16(request, monkeypatch) -> bool:
    """A GPU with or without units for bf16; those that have them have TF32 as well."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: request.param)
    return request.param


def test_half_precision_is_chosen_where_it_pays(has_bf16):
    assert choose_precision("auto", GPU, dim=32)[0] == "off"
    assert choose_precision("auto", GPU, dim=128)[0] == "off"
    assert choose_precision("auto", GPU, dim=256)[0] == ("bf16" if has_bf16 else "fp16")
    assert choose_precision("bf16", GPU, dim=32) == ("bf16", "as asked")


@pytest.mark.parametrize("amp, dim", [("auto", 32), ("off", 512)])
def test_float32_is_called_tf32_where_it_is(has_bf16, amp, dim):
    chosen, reason = choose_precision(amp, GPU, dim)
    assert chosen == "off" and ("TF32" in reason) == has_bf16


def test_a_cpu_has_no_tf32():
    assert "TF32" not in choose_precision("off", torch.device("cpu"), 512)[1]


@pytest.mark.parametrize("ends_well", [True, False])
def test_the_choice_of_kernels_is_given_back(ends_well):
    def kernels() -> tuple:
        return torch.get_float32_matmul_precision(), torch.backends.cuda.cudnn_sdp_enabled()

    @exits_cleanly
    def main() -> None:
        choose_kernels()
        assert kernels() == ("high", False)
        if not ends_well:
            raise BadInput("something else")

    torch.set_float32_matmul_precision("highest")  # whatever a test before has left
    torch.backends.cuda.enable_cudnn_sdp(True)
    before = kernels()
    try:
        main()
    except SystemExit:
        assert not ends_well
    assert kernels() == before


def test_training_chooses_the_kernels(train, tiny, monkeypatch, capsys):
    def choose() -> None:
        raise BadInput("they are chosen here")

    monkeypatch.setattr(train_script, "choose_kernels", choose)
    with pytest.raises(SystemExit):
        train(*tiny)
    assert "they are chosen here" in capsys.readouterr().err


def test_a_training_on_the_cpu_leaves_the_gpu_alone(train, tiny, monkeypatch):
    """It would take some hundred MiB of it, and a GPU that is full would end the run."""

    def started(*_, **__):
        raise AssertionError("CUDA is started")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("_lazy_init", "get_rng_state", "set_rng_state", "set_device", "current_device"):
        monkeypatch.setattr(torch.cuda, name, started)
    run = train(*tiny, "--accelerator", "cpu")
    train_script.main(["--wandb", "disabled", "--resume", str(run), "--max-epochs", "3"])
    evaluate.main(["--run", str(run), "--accelerator", "cpu", "--no-pictures"])
    state = torch.load(run / "last.pt", weights_only=True)["rng"][0]
    assert "cuda" not in state


def test_only_a_gpu_in_use_has_its_random_state_saved(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: torch.tensor([7]))
    restored = []
    monkeypatch.setattr(torch.cuda, "set_rng_state", restored.append)
    generators = RandomState()
    generators.load_state_dict(generators.state_dict())
    assert [state.tolist() for state in restored] == [[7]]


def test_an_exact_resume_needs_the_same_gpu(monkeypatch):
    assert run_folder.environment()["GPU"] is None
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    assert run_folder.environment()["GPU"] == "NVIDIA H100"


def test_apples_fused_kernel_is_left_alone_in_fp16():
    mps, cpu = torch.device("mps"), torch.device("cpu")
    assert [can_fuse(amp, mps) for amp in ("off", "bf16", "fp16")] == [True, True, False]
    assert can_fuse("fp16", cpu) and can_fuse("fp16", GPU)


@pytest.mark.parametrize("gpu_in_use", [True, False])
@pytest.mark.parametrize(
    "error, done",
    [
        (None, ["destroy"]),
        (BadInput("the same on all processes"), ["destroy at exit"]),
        (RuntimeError("of this process alone"), ["abort NCCL", "destroy at exit"]),
    ],
    ids=["ends well", "refused", "fault"],
)
def test_leaving_the_other_processes(error, done, gpu_in_use, monkeypatch):
    """After a fault NCCL is aborted: it would wait for what the other processes are to send."""
    calls = []
    nccl = SimpleNamespace(abort=lambda: calls.append("abort NCCL"))
    world = SimpleNamespace(_get_backend=lambda device: {"cuda": nccl}[device.type])
    stand_in = SimpleNamespace(
        destroy_process_group=lambda: calls.append("destroy"),
        group=SimpleNamespace(WORLD=world),
    )
    monkeypatch.setattr(processes, "dist", stand_in)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: gpu_in_use)
    at_exit = SimpleNamespace(register=lambda _: calls.append("destroy at exit"))
    monkeypatch.setattr(processes, "atexit", at_exit)
    try:
        if error:
            raise error
        processes.leave_process_group()
    except type(error or Exception()):
        processes.leave_process_group()
    assert calls == [call for call in done if gpu_in_use or call != "abort NCCL"]


BROADCASTS = """
import sys, torch.distributed as dist, train
calls, broadcast = [], dist._broadcast_coalesced
def count(group, tensors, *rest):
    calls.append(len(tensors))
    return broadcast(group, tensors, *rest)
dist._broadcast_coalesced = count
train.main(sys.argv[1:])
print("broadcasts:", len(calls))
"""


@pytest.mark.slow
def test_processes_do_not_send_each_other_the_table_of_positions(tmp_path):
    (tmp_path / "counted.py").write_text(BROADCASTS, encoding="utf-8")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc-per-node", "2", "counted.py", *TINY, "--wandb", "disabled"]
    done = subprocess.run(
        command,
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("broadcasts: 1\n") == 2, "of the weights, before the first update"
