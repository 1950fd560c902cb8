"""A run that is stopped anywhere and resumed ends as the run that was never stopped: each bit."""

import functools
import itertools
import shutil
import signal
from pathlib import Path

import pytest
import torch
from plants import chain, leave_out, overflow_in_fp16, signal_at_step
from trainings import NEW, RESUME, SMALL, Training, fingerprint

from transformer_scratch.checkpoint import load_checkpoint
from transformer_scratch.run_folder import read_metrics

FP16 = [*SMALL, "--amp", "fp16"]
slow = pytest.mark.slow


def terminated_at(step: int):
    return functools.partial(signal_at_step, step, signal.SIGTERM)


@pytest.mark.parametrize(
    ("flags", "plant", "step"),
    [
        pytest.param("", None, 4, id="float32", marks=slow),
        pytest.param("--amp fp16", overflow_in_fp16, 4, id="fp16"),
        pytest.param("--amp bf16", None, 4, id="bf16", marks=slow),
        pytest.param("--num-workers 2", None, 4, id="two workers", marks=slow),
        # Six batches are two updates, one of them short.
        pytest.param("--accumulate 4", None, 1, id="accumulation", marks=slow),
        pytest.param("--holdout 0 --dropout 0.5", None, 4, id="shared pairs", marks=slow),
    ],
)
def test_a_stop_in_the_middle_of_an_epoch_leaves_no_trace(run, undisturbed, flags, plant, step):
    flags = [*SMALL, *flags.split()]
    stop = terminated_at(step)
    assert run(*flags, *NEW, plant=chain(stop, plant) if plant else stop)[0] == 143
    last = load_checkpoint(Path("run/last.pt"))
    assert (last["epoch"], last["step"]) == (0, step)
    assert run(*RESUME, plant=plant)[0] == 0
    assert fingerprint(Path("run")) == undisturbed(*flags, plant=plant)


@slow
def test_stopped_and_resumed_twice_with_other_logging_and_workers(run, undisturbed):
    assert run(*SMALL, *NEW, plant=terminated_at(2))[0] == 143
    others = ["--log-every", "1", "--num-workers", "2"]
    assert run(*RESUME, *others, plant=terminated_at(6))[0] == 143  # at step 8
    assert run(*RESUME, "--save-every", "3", "--num-workers", "0")[0] == 0
    assert fingerprint(Path("run")) == undisturbed(*SMALL)


def test_a_stop_at_the_last_update_of_an_epoch_still_validates_it(run, undisturbed):
    assert run(*SMALL, *NEW, plant=terminated_at(6))[0] == 143
    assert not any("val/loss_epoch" in row for row in read_metrics(Path("run")))
    assert run(*RESUME)[0] == 0
    assert fingerprint(Path("run")) == undisturbed(*SMALL)


@slow
def test_a_finished_run_says_so_and_continues_when_told_more_epochs(run, undisturbed):
    assert run(*SMALL, *NEW)[0] == 0
    before = {file.name: file.read_bytes() for file in Path("run").glob("*.*")}
    code, output = run(*RESUME)
    assert code == 0
    assert "has finished its 2 epochs already" in output
    assert {file.name: file.read_bytes() for file in Path("run").glob("*.*")} == before
    assert run(*RESUME, "--max-epochs", "4")[0] == 0
    assert fingerprint(Path("run")) == undisturbed(*SMALL, "--max-epochs", "4")


PARTS = ["model", "optimizer", "scheduler", "scaler", "batches done", "epoch_loss", "ranking"]


@pytest.mark.parametrize(
    "part", ["rng", *(pytest.param(part, marks=slow) for part in [*PARTS, "metrics"])]
)
def test_each_part_of_the_state_is_needed(run, undisturbed, stopped_in_fp16, part):
    """These comparisons can fail: without any one part the resumed run ends differently."""
    shutil.copytree(stopped_in_fp16, "run")
    plant = chain(overflow_in_fp16, functools.partial(leave_out, part))
    code, output = run(*RESUME, plant=plant)
    assert code == 0, output
    assert fingerprint(Path("run")) != undisturbed(*FP16, plant=overflow_in_fp16)


@pytest.fixture(scope="module")
def stopped_in_fp16(tmp_path_factory):
    """A run killed at step 11 with its last state from step 9, in the middle of epoch 1."""
    folder = tmp_path_factory.mktemp("stopped")
    plant = chain(functools.partial(signal_at_step, 11, signal.SIGKILL), overflow_in_fp16)
    flags = [*FP16, "--save-every", "3", "--log-every", "1", *NEW]
    training = Training(flags, plant, folder)
    training.start()
    assert training.wait()[0] == -signal.SIGKILL
    return folder / "run"


def test_an_overflow_skips_the_update_halves_the_scale_and_keeps_the_schedule(run):
    assert run(*FP16, *NEW, plant=overflow_in_fp16)[0] == 0
    rows = [row for row in read_metrics(Path("run")) if "lr" in row]
    skipped = [row["step"] for row in rows if row.get("skipped")]
    assert len(rows) > len(skipped) > 0
    assert all(row["grad_norm"] is None for row in rows if row.get("skipped"))
    for before, row in itertools.pairwise(rows):
        assert (row["lr"] == before["lr"]) == bool(before.get("skipped")), row

    last = load_checkpoint(Path("run/last.pt"))
    done = len(rows) - len(skipped)
    assert last["scheduler"]["last_epoch"] == done
    assert {int(state["step"]) for state in last["optimizer"]["state"].values()} == {done}
    grown = (done - last["scaler"]["_growth_tracker"]) // 3
    assert last["scaler"]["scale"] == 2.0 ** (19 - len(skipped) + grown)


@slow
def test_another_number_of_threads_is_warned_of(run):
    assert run(*SMALL, *NEW, plant=terminated_at(4))[0] == 143
    assert "no longer bit for bit" not in run(*RESUME, plant=terminated_at(1))[1]
    code, output = run(*RESUME, plant=functools.partial(torch.set_num_threads, 2))
    assert code == 0
    assert "warning: trained with threads 1 so far, now 2" in output
