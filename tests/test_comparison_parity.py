"""train.py and its Lightning twin compute the same numbers, to the last bit.

Faults planted in the twin show that these tests would notice if they did not.
"""

import contextlib
import multiprocessing
import os
import socket
from functools import partialmethod
from pathlib import Path
from unittest import mock

import pytest
import pytorch_lightning as pl
import torch
import wandb
from torch.amp import GradScaler

import train
from comparison import parity_hooks, train_lightning
from comparison.parity import Parity, compare_optimizers, compare_runs, split_metrics
from comparison.recorder import Recorder
from transformer_scratch.batches import BatchSampler

pytestmark = pytest.mark.comparison

SMALL = "--dim 16 --num-layers 1 --batch-size 32 --num-datas 192 --max-epochs 2"
# The first updates overflow in any model: see run_both.
OVERFLOWS = "--amp fp16 --dim 64 --batch-size 1 --num-datas 24 --lr 0.02 --warmup-steps 40"
OVERSHOOTS = (
    # The last epoch is not the best.
    "--lr 8 --warmup-steps 100 --num-datas 320 --max-epochs 3 --average 0"
)

# Configurations in which the two must agree. The batch size divides the data or does not.
QUICK = {
    "float32": "",
    "fp16 with skipped updates": OVERFLOWS,
    "bf16, accumulation": "--amp bf16 --accumulate 4",
    "the paper's recipe": "--label-smoothing 0.1 --schedule inverse-sqrt --warmup-steps 4",
    "a file of pairs": "--pairs {pairs}",
}
MORE = {
    "clipping, accumulation, a short last window": "--clip-norm 0.1 --accumulate 4 --num-datas 224",
    "much dropout, separate embeddings": "--dropout 0.5 --no-tie-embeddings",
    "no averaging": "--average 0",
    "a long average, smoothing, bf16": "--average 0.999 --label-smoothing 0.3 --amp bf16",
    "inverse square root without warm-up": "--schedule inverse-sqrt --warmup-steps 0",
    "three files, accumulation of 3": "--pairs {pairs} --val-pairs {val} --test-pairs {test} "
    "--accumulate 3 --batch-size 8",
    "bf16": "--amp bf16",
    "fp16": "--amp fp16",
    "fp16, accumulation, clipping": "--amp fp16 --accumulate 2 --clip-norm 0.1 --num-datas 224",
    "accumulation of 2": "--accumulate 2",
    "accumulation of 3": "--accumulate 3 --num-datas 320",
    "accumulation of 4": "--accumulate 4 --num-datas 256",
    "clipping": "--clip-norm 0.05",
    "no clipping": "--clip-norm 0",
    "warm-up": "--warmup-steps 15",
    "no warm-up, no weight decay": "--warmup-steps 0 --weight-decay 0",
    "no dropout": "--dropout 0",
    "separate embeddings, bf16": "--no-tie-embeddings --amp bf16",
    "workers": "--num-workers 2",
    "nothing held out": "--holdout 0 --batch-size 96",
    "30 digits": "--num-categories 30 --num-heads 2",
    "a batch size that does not divide the data": "--batch-size 48 --num-datas 200",
    "another seed, more layers": "--seed 7 --num-layers 2 --num-heads 4",
    "the best k of many epochs": "--max-epochs 5 --save-top-k 2 --lr 0.03 --num-datas 160",
}


@pytest.fixture(autouse=True)
def quiet(monkeypatch, recwarn):
    """Without W&B, and Lightning's warnings are not ours."""
    monkeypatch.setenv("WANDB_MODE", "disabled")


def write_files(folder: Path) -> dict[str, Path]:
    """Words and their letters backwards, some with a second answer; the last batch is smaller."""
    words = [f"{a}{b}{c}" for a in "abcd" for b in "efgh" for c in "ijkl"]
    lines = [f"{word}\t{' '.join(reversed(word))}\n" for word in words]
    lines += [f"{word}\t{' '.join(word)}\n" for word in words[::9]]
    # Unknown tokens in both columns, which only the other two files have.
    parts = {"pairs": lines[:71], "val": [*lines[60:65], "axe\tx a\n"], "test": lines[66:70]}
    parts["lengths"] = [f"{word}\t{'z' * (1 + number % 9)}\n" for number, word in enumerate(words)]
    for name, part in parts.items():
        (folder / f"{name}.tsv").write_text("".join(part), encoding="utf-8")
    return {name: folder / f"{name}.tsv" for name in parts}


@pytest.fixture(scope="module")
def run_both(tmp_path_factory):
    """Both programs in this process, one after the other; train.py once for the same flags."""
    plain: dict[str, Path] = {}
    init = GradScaler.__init__
    files = write_files(tmp_path_factory.mktemp("files"))

    def run(flags: str = "", **twin: object) -> Parity:
        both = [*SMALL.split(), *flags.format(**files).split()]
        if "--pairs" in flags:
            both.remove("--num-datas")
            both.remove("192")
        scale = 2.0**28 if flags == OVERFLOWS else 2.0**16  # PyTorch's default is the latter
        with mock.patch.object(GradScaler, "__init__", partialmethod(init, init_scale=scale)):
            if flags not in plain:
                folder = tmp_path_factory.mktemp("plain")
                train.main([*both, "--run-dir", str(folder)])
                plain[flags] = folder
            twins = train_lightning.main([*both, "--run-dir", "lightning"], **twin)
        return compare_runs(plain[flags], twins)

    return run


@pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)]
)
def test_same_numbers(name, run_both):
    parity = run_both({**QUICK, **MORE}[name])
    assert not parity.other_optimizer, parity.other_optimizer
    assert parity.differences == []
    assert parity.holds and parity.max_loss_difference == 0.0 and parity.weights_equal
    # Both did train, and what is said to be equal was compared.
    losses = [ours for ours, _ in parity.losses]
    assert len(set(losses)) > len(losses) / 2 > 1
    for figure in ("train/loss_epoch, epoch 1", "val/exact_match, epoch 1", "test/loss_epoch"):
        assert figure in parity.epoch_figures
    assert {"averaged weights", "optimizer state", "random state"} <= parity.others.keys()
    assert (parity.skipped[0] > 0) == (name == "fp16 with skipped updates")


def test_a_twin_with_another_optimizer_is_named():
    weights = [torch.zeros(1)]
    adamw = torch.optim.AdamW(weights, lr=0.1, weight_decay=0.5).state_dict()
    sgd = torch.optim.SGD(weights, lr=0.1, weight_decay=0.5, momentum=0.9).state_dict()
    message = compare_optimizers(sgd, adamw)
    assert "the twin has another optimizer: train.py's has dampening 0" in message
    assert "momentum 0.9" in message and "betas (0.9, 0.999)" in message
    assert "weight_decay 0.5" not in message, "which both have"
    later = torch.optim.AdamW(weights, lr=0.2, weight_decay=0.5).state_dict()
    assert compare_optimizers(adamw, later) == "", "the schedule has moved on"


# ------------------------------------------------------------------- what each hook is there for


def all_hooks_but(name: str) -> list[type]:
    hooks = [hook for hook in parity_hooks.HOOKS if hook.__name__ != name]
    assert len(hooks) == len(parity_hooks.HOOKS) - 1
    return hooks


def test_plain_lightning_needs_no_hook_in_the_simple_case(run_both):
    parity = run_both("--average 0", hooks=())
    assert set(parity.differences) == {"gradient norms"}  # Lightning throws them away


def test_without_its_hook_lightning_weighs_batches_instead_of_tokens(run_both):
    flags = "--pairs {lengths} --batch-size 8 --accumulate 2 --max-epochs 2"
    parity = run_both(flags, hooks=all_hooks_but("TokenWeightedUpdates"))
    assert parity.max_loss_difference > 1e-4 and "weights" in parity.differences


@pytest.mark.slow
def test_without_its_hook_lightnings_schedule_counts_skipped_updates(run_both):
    parity = run_both(OVERFLOWS, hooks=all_hooks_but("ScheduleWaitsForSkippedUpdates"))
    assert "learning rates" in parity.differences


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_without_its_hook_lightning_refuses_to_clip_for_a_fused_optimizer(amp, capsys):
    flags = [*SMALL.split(), "--amp", amp, "--run-dir", "lightning"]
    with pytest.raises(SystemExit):
        train_lightning.main(flags, hooks=all_hooks_but("ClipsAndKeepsTheNorm"))
    assert "does not allow for gradient clipping" in capsys.readouterr().err


def test_without_its_hook_lightning_clips_the_scaled_gradients(run_both):
    parity = run_both("--amp fp16", hooks=all_hooks_but("UnscalesBeforeClipping"))
    assert parity.max_loss_difference > 1e-4
    assert {"gradient norms", "weights"} <= {*parity.differences}


def test_without_its_hook_the_twin_judges_the_weights_of_the_start(run_both):
    parity = run_both(hooks=all_hooks_but("AveragesWeights"))
    assert parity.holds  # of the loop itself nothing depends on the average
    assert {"averaged weights", "val/loss_epoch, epoch 0"} <= {*parity.differences}


@pytest.mark.slow
def test_lightnings_resume_is_not_the_same_run(monkeypatch):
    """Its checkpoint has no random state, so dropout starts over. (train.py's resume is exact.)"""
    flags = SMALL.split()
    whole = train_lightning.main([*flags, "--run-dir", "whole"])
    train_lightning.main([*flags, "--max-epochs", "1", "--run-dir", "first"])
    fit = pl.Trainer.fit
    checkpoint = Path("first/epoch=0.ckpt")
    monkeypatch.setattr(pl.Trainer, "fit", lambda *args: fit(*args, ckpt_path=checkpoint))
    second = train_lightning.main([*flags, "--run-dir", "second"])

    expected, found = split_metrics(whole)[0][6:], split_metrics(second)[0]
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    gaps = [
        abs(a["train/loss_step"] - b["train/loss_step"])
        for a, b in zip(expected, found, strict=True)
    ]
    assert max(gaps) > 0.01


# --------------------------------------------------------------------------------- planted faults


def plant_stray_draw(monkeypatch):
    class Stray(Recorder):
        def on_train_epoch_start(self, trainer, module):
            torch.rand(1)

    monkeypatch.setattr(train_lightning, "Recorder", Stray)


def plant_draw_in_the_sanity_check(monkeypatch):
    """A sanity check that draws a random number, and nothing that puts the generator back."""
    monkeypatch.setattr("pytorch_lightning.trainer.trainer.isolate_rng", contextlib.nullcontext)

    class Draws(Recorder):
        def on_validation_batch_start(self, trainer, *others):
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
    monkeypatch.setattr(
        pl.Trainer, "test", lambda self, module, loader, ckpt_path: test(self, module, loader)
    )


def plant_mean_of_batch_means(monkeypatch):
    log = pl.LightningModule.log
    monkeypatch.setattr(
        pl.LightningModule,
        "log",
        lambda self, *args, batch_size=1, **named: log(self, *args, batch_size=1, **named),
    )


def plant_eval_mode(monkeypatch):
    class Eval(Recorder):
        def on_train_start(self, trainer, module):
            module.eval()

    monkeypatch.setattr(train_lightning, "Recorder", Eval)


def plant_one_bit_in_one_weight(monkeypatch):
    on_train_end = Recorder.on_train_end

    def flip(self, trainer, module):
        weight = module.model.output.weight.data
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(torch.inf))
        on_train_end(self, trainer, module)

    monkeypatch.setattr(Recorder, "on_train_end", flip)


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("plant", "flags", "difference"),
    [
        (plant_stray_draw, "", "loss of step 1"),
        (plant_mean_of_batch_means, "", "train/loss_epoch, epoch 0"),
        (plant_one_bit_in_one_weight, "", "weights"),
        pytest.param(plant_eval_mode, "", "loss of step 1", marks=slow),
        pytest.param(plant_draw_in_the_sanity_check, "", "loss of step 1", marks=slow),
        pytest.param(plant_same_order_every_epoch, "--dropout 0", "loss of step 7", marks=slow),
        pytest.param(plant_last_weights_in_the_test, OVERSHOOTS, "test/loss_epoch", marks=slow),
    ],
)
def test_a_planted_fault_is_seen(plant, flags, difference, monkeypatch, run_both):
    run_both(flags)  # so that train.py has run without the fault
    plant(monkeypatch)
    parity = run_both(flags)
    assert parity.differences[0] == difference
    only_a_figure_is_wrong = "loss_epoch" in difference
    assert parity.holds == only_a_figure_is_wrong


# --------------------------------------------------------------------------------- two processes

# Seed 3 holds out pairs with an odd number of tokens: Lightning alone halves it to a whole number.
PAIR = f"{SMALL} --devices 2 --batch-size 16 --seed 3 --accumulate 2 --num-datas 224"


class PlainSync:
    """self.log as its default is: without sync_dist."""

    def log(self, *args, sync_dist: bool = False, **named) -> None:
        super().log(*args, **named)


def on_processes(main, flags: list[str], count: int = 2, **options: object) -> None:
    """Call a main function in forks of this process, which have imported everything."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])

    def call(rank: int) -> None:
        world = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "GROUP_RANK": "0"}
        world |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        os.environ.update(world, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        main(flags, **options)

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=call, args=(rank,)) for rank in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=200)
        process.kill()
    assert [process.exitcode for process in processes] == [0] * count


@pytest.fixture(scope="module")
def plain_pair(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    on_processes(train.main, [*PAIR.split(), "--run-dir", str(folder)])
    return folder


def compare_pair(plain_pair: Path, hooks=parity_hooks.HOOKS) -> Parity:
    flags = [*PAIR.split(), "--run-dir", "lightning"]
    on_processes(train_lightning.main, flags, hooks=hooks)
    return compare_runs(plain_pair, Path("lightning"))


def test_same_numbers_on_processes(plain_pair):
    assert compare_pair(plain_pair).differences == []


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 3])
def test_same_numbers_on_three_processes(accumulate):
    """Where a factor of 3 is rounded, unlike one of 2: so are Lightning's means of an epoch."""
    flags = f"{SMALL} --devices 3 --batch-size 10 --seed 3 --accumulate {accumulate}".split()
    on_processes(train.main, [*flags, "--run-dir", "plain"], 3)
    on_processes(train_lightning.main, [*flags, "--run-dir", "lightning"], 3)
    parity = compare_runs(Path("plain"), Path("lightning"))
    assert not set(parity.differences) - set(parity.epoch_figures)
    for ours, theirs in parity.epoch_figures.values():
        assert theirs == pytest.approx(ours, rel=1e-6)


@pytest.mark.slow
def test_without_its_hook_lightning_gives_all_processes_the_same_dropout(plain_pair):
    parity = compare_pair(plain_pair, all_hooks_but("OneSeedForEachProcess"))
    assert parity.differences[0] == "loss of step 1"


@pytest.mark.slow
@pytest.mark.parametrize(
    "hooks",
    [
        pytest.param(all_hooks_but("EpochMeansOverProcesses"), id="token counts as whole numbers"),
        pytest.param((PlainSync, *parity_hooks.HOOKS), id="the mean of one process alone"),
    ],
)
def test_lightning_alone_logs_another_mean_over_processes(hooks, plain_pair):
    parity = compare_pair(plain_pair, hooks)
    assert {f"val/loss_epoch, epoch {epoch}" for epoch in range(2)} <= set(parity.differences)
    assert parity.holds  # the loop itself is right


# -------------------------------------------------------------------------------------------- W&B


def test_both_log_the_same_curves(monkeypatch, run_both):
    """So that the two runs lie over each other in W&B."""
    curves = {"step", "train/loss_step", "lr", "grad_norm", "train/loss_epoch", "val/exact_match"}
    curves |= {
        f"{split}/{loss}" for split in ("val", "test") for loss in ("loss_step", "loss_epoch")
    }
    curves |= {"val/batch", "test/batch", "test/exact_match"}
    logged, finish = [], wandb.finish

    def note_and_finish(*exit_code: int) -> None:
        logged.append({name for name in dict(wandb.run.summary) if name[0] != "_"})
        finish(*exit_code)

    monkeypatch.setattr(wandb, "finish", note_and_finish)
    run_both("--max-epochs 1 --log-every 2")
    ours, twins = logged
    # Ours may have a number more, of a reader's own: docs/changing.md.
    assert curves <= twins - {"trainer/global_step"} <= ours
