"""train.py and its Lightning twin compute the same numbers, to the last bit; the tests would notice if they did not."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
import wandb
from conftest import PROJECT

import train
from comparison import parity_hooks, train_lightning
from comparison.parity import Parity, compare_runs, read_metrics
from comparison.recorder import Recorder
from transformer_scratch.data import BatchSampler

pytestmark = pytest.mark.comparison

SMALL = ["--dim", "16", "--num-layers", "1", "--batch-size", "32", "--num-datas", "192", "--max-epochs", "3"]
FP16_OVERFLOW = [
    "--amp", "fp16", "--dim", "64", "--batch-size", "1", "--num-datas", "40", "--lr", "0.02", "--warmup-steps", "60",
    "--max-epochs", "2",
]  # fmt: skip

OVERSHOOTS = ["--lr", "8", "--warmup-steps", "100", "--num-datas", "320"]  # so that the last epoch is not the best

# Every configuration in which the two have to agree, over three epochs. The batch size divides the data or does not.
MATRIX = {
    "float32": [],
    "bf16": ["--amp", "bf16"],
    "fp16": ["--amp", "fp16"],
    "fp16 with skipped updates": FP16_OVERFLOW,
    "fp16, accumulation, clipping": ["--amp", "fp16", "--accumulate", "2", "--clip-norm", "0.1", "--num-datas", "224"],
    "bf16, accumulation": ["--amp", "bf16", "--accumulate", "4"],
    "accumulation of 2": ["--accumulate", "2"],
    "accumulation of 4": ["--accumulate", "4", "--num-datas", "256"],
    "clipping": ["--clip-norm", "0.05"],
    "no clipping": ["--clip-norm", "0"],
    "accumulation, clipping, a short last window": ["--accumulate", "4", "--clip-norm", "0.1", "--num-datas", "224"],
    "warm-up": ["--warmup-steps", "15"],
    "no warm-up, no weight decay": ["--warmup-steps", "0", "--weight-decay", "0"],
    "much dropout": ["--dropout", "0.5"],
    "no dropout": ["--dropout", "0"],
    "embeddings of their own": ["--no-tie-embeddings"],
    "embeddings of their own, bf16": ["--no-tie-embeddings", "--amp", "bf16"],
    "workers": ["--num-workers", "2", "--max-epochs", "2"],
    "nothing held out": ["--holdout", "0", "--max-epochs", "2", "--batch-size", "96"],
    "30 digits": ["--num-categories", "30", "--num-heads", "2"],
    "a batch size that does not divide the data": ["--batch-size", "48", "--num-datas", "200"],
    "another seed, more layers": ["--seed", "7", "--num-layers", "2", "--num-heads", "4"],
    "the best k of many epochs": ["--max-epochs", "5", "--save-top-k", "2", "--lr", "0.03", "--num-datas", "160"],
}


@pytest.fixture(autouse=True)
def quiet(monkeypatch, recwarn):
    """Signal handlers and W&B as they were; Lightning's warnings are not ours."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def run_both(*flags: str, **twin) -> Parity:
    """Both programs one after the other in this process, which is what two processes would do."""
    flags = [*SMALL, *flags]
    train.main([*flags, "--run-dir", "plain"])
    train_lightning.main([*flags, "--run-dir", "lightning"], **twin)
    return compare_runs(Path("plain"), Path("lightning"))


@pytest.mark.parametrize("name", MATRIX)
def test_same_numbers(name):
    parity = run_both(*MATRIX[name])
    assert parity.differences == []
    assert parity.max_loss_difference == 0.0 and parity.weights_equal
    steps, epochs = read_metrics(Path("plain"))
    assert len(parity.losses) == len(steps) > 0 and len(parity.epoch_figures) == 3 * (len(epochs) - 1) + 2
    assert len({loss for loss, _ in parity.losses}) > len(steps) / 2  # they do train, and are not all alike
    assert (parity.skipped[0] > 0) == (name == "fp16 with skipped updates")


def test_plain_lightning_needs_no_hooks_in_the_simple_case():
    parity = run_both(hooks=())
    assert set(parity.differences) == {"gradient norms"}  # Lightning throws them away


# What each departure from plain Lightning is for: without it, this configuration parts the two.
WITHOUT_HOOK = {
    "TokenWeightedUpdates": (["--accumulate", "2"], "loss of step 1"),
    "ScheduleWaitsForSkippedUpdates": (FP16_OVERFLOW, "learning rates"),
}


@pytest.mark.parametrize("name", WITHOUT_HOOK)
def test_without_a_hook_the_numbers_part(name):
    flags, difference = WITHOUT_HOOK[name]
    hooks = [hook for hook in parity_hooks.HOOKS if hook.__name__ != name]
    assert len(hooks) == len(parity_hooks.HOOKS) - 1
    assert difference in run_both(*flags, hooks=hooks).differences


def test_plain_lightning_cannot_clip_for_a_fused_optimizer_in_bf16():
    hooks = [hook for hook in parity_hooks.HOOKS if hook is not parity_hooks.ClipsAndKeepsTheNorm]
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        run_both("--amp", "bf16", hooks=hooks)


# Faults planted in the twin, and in the loop's surroundings. Each must be seen.
def plant_stray_draw(monkeypatch):
    class Stray(Recorder):
        def on_train_epoch_start(self, trainer, module):
            torch.rand(1)

    monkeypatch.setattr(train_lightning, "Recorder", Stray)


def plant_dropout_in_the_sanity_check(monkeypatch):
    """A sanity check that leaves its mark: it draws random numbers, and nothing puts the generator back."""
    from contextlib import nullcontext

    monkeypatch.setattr("pytorch_lightning.trainer.trainer.isolate_rng", nullcontext)

    class Draws(Recorder):
        def on_validation_batch_start(self, trainer, module, batch, batch_idx, dataloader_idx=0):
            if trainer.sanity_checking:
                torch.rand(1)

    monkeypatch.setattr(train_lightning, "Recorder", Draws)


def plant_same_order_every_epoch(monkeypatch):
    set_epoch = BatchSampler.set_epoch

    def from_train_alone(self, epoch, first_batch=None):
        if first_batch is not None:  # Lightning calls it with the epoch alone
            set_epoch(self, epoch, first_batch)

    monkeypatch.setattr(BatchSampler, "set_epoch", from_train_alone)


def plant_last_weights_in_the_test(monkeypatch):
    test = pl.Trainer.test
    monkeypatch.setattr(pl.Trainer, "test", lambda self, module, loader, ckpt_path: test(self, module, loader))


def plant_mean_of_batch_means(monkeypatch):
    log = pl.LightningModule.log
    monkeypatch.setattr(
        pl.LightningModule, "log", lambda self, *args, batch_size=1, **named: log(self, *args, batch_size=1, **named)
    )


def plant_eval_mode(monkeypatch):
    class Eval(Recorder):
        def on_train_start(self, trainer, module):
            module.eval()

    monkeypatch.setattr(train_lightning, "Recorder", Eval)


def plant_one_bit_in_the_weights(monkeypatch):
    on_train_end = Recorder.on_train_end

    def flip(self, trainer, module):
        weight = module.model.output.weight.data
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(torch.inf))
        on_train_end(self, trainer, module)

    monkeypatch.setattr(Recorder, "on_train_end", flip)


PLANTS = {
    "a stray random draw": (plant_stray_draw, [], "loss of step 1"),
    "a sanity check without isolation": (plant_dropout_in_the_sanity_check, [], "loss of step 1"),
    "the same order every epoch": (plant_same_order_every_epoch, ["--dropout", "0"], "loss of step 7"),
    "the last weights in the test": (plant_last_weights_in_the_test, OVERSHOOTS, "test/loss_epoch"),
    "a mean of batch means": (plant_mean_of_batch_means, [], "train/loss_epoch, epoch 0"),
    "eval mode in training": (plant_eval_mode, [], "loss of step 1"),
    "one bit in one weight": (plant_one_bit_in_the_weights, [], "weights"),
}


@pytest.mark.parametrize("name", PLANTS)
def test_a_planted_fault_is_seen(name, monkeypatch):
    plant, flags, difference = PLANTS[name]
    plant(monkeypatch)
    parity = run_both(*flags)
    assert parity.differences[0] == difference
    assert parity.holds == (difference.endswith(("loss_epoch", "epoch 0")))  # the loop is right, one figure is not


def test_accumulation_of_three_differs_in_the_last_digits_for_good():
    """Lightning divides the loss by three and the hook multiplies by three: not the same number in binary."""
    parity = run_both("--accumulate", "3")
    assert 0 < parity.max_loss_difference < 1e-5 and not parity.weights_equal


def test_a_resumed_run_goes_on_exactly_and_lightning_s_does_not(monkeypatch):
    flags = [*SMALL, "--max-epochs", "2"]
    train.main([*flags, "--run-dir", "whole"])
    train.main([*SMALL, "--max-epochs", "1", "--run-dir", "parts"])
    train.main(["--resume", "parts", "--max-epochs", "2"])
    assert read_metrics(Path("parts")) == read_metrics(Path("whole"))

    # The same with the twin: its checkpoint has no random state, so that dropout starts over.
    fit = pl.Trainer.fit
    train_lightning.main([*SMALL, "--max-epochs", "1", "--run-dir", "first"])
    monkeypatch.setattr(pl.Trainer, "fit", lambda *args: fit(*args, ckpt_path=Path("first/epoch=0.ckpt")))
    train_lightning.main([*flags, "--run-dir", "second"])
    whole, second = (read_metrics(Path(folder))[0][-6:] for folder in ("whole", "second"))
    assert [row["step"] for row in second] == list(range(7, 13))
    gaps = [abs(a["train/loss_step"] - b["train/loss_step"]) for a, b in zip(whole, second, strict=True)]
    assert max(gaps) > 0.01


TWO_PROCESSES = """
import os, sys, torch.distributed as dist
import train
from comparison import train_lightning
from comparison.parity_hooks import HOOKS
ports, flags = sys.argv[1].split(), sys.argv[2:]
world = dict(os.environ)  # Lightning takes some of it away when it ends
os.environ["MASTER_PORT"] = ports[0]
train.main([*flags, "--run-dir", "plain"])
for port, without in zip(ports[1:], ("", "OneSeedForEachProcess", "EpochMeansOverProcesses"), strict=True):
    dist.destroy_process_group()
    os.environ.update(world, MASTER_PORT=port)  # a start of its own: one after a fault would resume the run
    hooks = [hook for hook in HOOKS if hook.__name__ != without]
    train_lightning.main([*flags, "--run-dir", f"lightning{without}"], hooks=hooks)
"""


def free_ports(number: int) -> str:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = " ".join(str(free.getsockname()[1]) for free in sockets)
    for free in sockets:
        free.close()
    return ports


def test_same_numbers_on_two_processes():
    """Seed 3 holds out pairs whose tokens make an odd number, which Lightning alone halves to a whole one."""
    flags = [*SMALL, "--devices", "2", "--batch-size", "16", "--seed", "3", "--accumulate", "2", "--num-datas", "224"]
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    ports = free_ports(4)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, ports, *flags],
            env={**os.environ, **world, "RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": str(PROJECT)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=200)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs[0][-3000:]

    differences = {
        without: compare_runs(Path("plain"), Path(f"lightning{without}")).differences
        for without in ("", "OneSeedForEachProcess", "EpochMeansOverProcesses")
    }
    assert differences[""] == []
    assert differences["OneSeedForEachProcess"][0] == "loss of step 1"
    assert {f"val/loss_epoch, epoch {epoch}" for epoch in range(3)} <= set(differences["EpochMeansOverProcesses"])
    assert all("loss_epoch" in name for name in differences["EpochMeansOverProcesses"])  # the loop itself is right


def test_both_log_the_same_curves(monkeypatch):
    """So that the two runs lie over each other in W&B."""
    logged, finish = [], wandb.finish

    def note_and_finish() -> None:
        logged.append(set(wandb.run.summary.keys()))
        finish()

    monkeypatch.setattr(wandb, "finish", note_and_finish)
    run_both("--max-epochs", "1", "--log-every", "2")
    ours, twins = ({name for name in names if not name.startswith("_")} for names in logged)
    only_ours = {"step", "tokens/s", "val/answers", "test/answers", "val/batch", "test/batch"}
    assert {"train/loss_step", "lr", "grad_norm", "val/loss_step", "test/exact_match"} < ours - only_ours
    assert twins - {"trainer/global_step"} == ours - only_ours


@pytest.mark.slow  # the quick tests have the same through comparison.compare, in test_comparison_compare.py
def test_same_numbers_on_the_command_line():
    flags = [*SMALL, "--max-epochs", "2"]
    for program, folder in ((["train.py"], "plain"), (["-m", "comparison.train_lightning"], "lightning")):
        command = [sys.executable, *program, *flags, "--run-dir", str(Path(folder).absolute())]
        subprocess.run(command, cwd=PROJECT, check=True, capture_output=True, timeout=120)
    assert compare_runs(Path("plain"), Path("lightning")).differences == []
    assert json.loads(Path("plain/config.json").read_text())["max_epochs"] == 2
