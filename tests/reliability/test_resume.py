"""A run that is stopped anywhere and resumed ends as the run that was never stopped: every bit of it."""

import functools
import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from plants import chain, leave_out, overflow_in_fp16, signal_at_step
from trainings import SMALL, Training, fingerprint

from transformer_scratch.checkpoint import load_checkpoint

NEW = ["--run-dir", "run"]
RESUME = ["--resume", "run"]


def terminated_at(step: int):
    return functools.partial(signal_at_step, step, signal.SIGTERM)


@pytest.mark.parametrize(
    ("flags", "plant"),
    [
        pytest.param([], None, id="float32"),
        pytest.param(["--amp", "bf16"], None, id="bf16"),
        pytest.param(["--amp", "fp16"], overflow_in_fp16, id="fp16"),
        pytest.param(["--num-workers", "2"], None, id="two workers"),
        pytest.param(["--accumulate", "4"], None, id="accumulation"),  # 6 batches are 2 updates, one of them short
        pytest.param(["--holdout", "0", "--dropout", "0.5"], None, id="shared pairs"),
    ],
)
def test_a_stop_in_the_middle_of_an_epoch_leaves_no_trace(run, undisturbed, flags, plant):
    step = 1 if "--accumulate" in flags else 4
    code, _ = run(*SMALL, *flags, *NEW, plant=chain(terminated_at(step), *[plant] * bool(plant)))
    assert code == 143
    last = load_checkpoint(Path("run/last.pt"))
    assert (last["epoch"], last["step"]) == (0, step)
    assert run(*RESUME, plant=plant)[0] == 0
    assert fingerprint(Path("run")) == undisturbed(*SMALL, *flags, plant=plant)


def test_stopped_and_resumed_twice_with_other_logging_and_workers(run, undisturbed):
    assert run(*SMALL, *NEW, plant=terminated_at(2))[0] == 143
    assert run(*RESUME, "--log-every", "1", "--num-workers", "2", plant=terminated_at(6))[0] == 143  # step 8
    assert run(*RESUME, "--save-every", "3", "--num-workers", "0")[0] == 0
    assert fingerprint(Path("run")) == undisturbed(*SMALL)


def test_a_stop_at_the_last_update_of_an_epoch_still_validates_it(run, undisturbed):
    assert run(*SMALL, *NEW, plant=terminated_at(6))[0] == 143
    assert "val/loss_epoch" not in Path("run/metrics.jsonl").read_text()
    assert run(*RESUME)[0] == 0
    assert fingerprint(Path("run")) == undisturbed(*SMALL)


def test_a_finished_run_says_so_and_goes_on_when_told_more_epochs(run, undisturbed):
    assert run(*SMALL, *NEW)[0] == 0
    before = {file.name: file.read_bytes() for file in Path("run").glob("*.*")}
    code, output = run(*RESUME)
    assert code == 0
    assert "has finished its 2 epochs already" in output
    assert {file.name: file.read_bytes() for file in Path("run").glob("*.*")} == before
    assert run(*RESUME, "--max-epochs", "4")[0] == 0
    longer = [*SMALL, "--max-epochs", "4"]
    assert fingerprint(Path("run")) == undisturbed(*longer)


@pytest.mark.parametrize("part", ["model", "optimizer", "scheduler", "scaler", "rng", "position", "metrics"])
def test_each_part_of_the_state_is_needed(run, undisturbed, stopped_in_fp16, part):
    """These comparisons can fail: without restoring any one part the resumed run ends differently."""
    shutil.copytree(stopped_in_fp16, "run")
    code, output = run(*RESUME, plant=chain(overflow_in_fp16, functools.partial(leave_out, part)))
    assert code == 0, output
    assert fingerprint(Path("run")) != undisturbed(*SMALL, "--amp", "fp16", plant=overflow_in_fp16)


@pytest.fixture(scope="module")
def stopped_in_fp16(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopped")
    plant = chain(functools.partial(signal_at_step, 11, signal.SIGKILL), overflow_in_fp16)
    training = Training([*SMALL, "--amp", "fp16", "--save-every", "3", "--log-every", "1", *NEW], plant, folder)
    training.start()
    assert training.wait()[0] == -signal.SIGKILL  # the last state is of step 9, in the middle of the second epoch
    return folder / "run"


def test_an_overflow_skips_the_update_halves_the_scale_and_keeps_the_schedule(run):
    assert run(*SMALL, "--amp", "fp16", *NEW, plant=overflow_in_fp16)[0] == 0
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "lr" in row]
    skipped = [row["step"] for row in rows if row.get("skipped")]
    assert len(rows) > len(skipped) > 0
    assert all(row["grad_norm"] is None for row in rows if row.get("skipped"))
    rates = [row["lr"] for row in rows]
    for before, row, rate in zip(rows, rows[1:], rates[1:], strict=False):
        assert (rate == before["lr"]) == bool(before.get("skipped")), row

    last = load_checkpoint(Path("run/last.pt"))
    done = len(rows) - len(skipped)
    assert last["scheduler"]["last_epoch"] == done
    assert {int(state["step"]) for state in last["optimizer"]["state"].values()} == {done}
    grown = (done - last["scaler"]["_growth_tracker"]) // 3
    assert last["scaler"]["scale"] == 2.0 ** (19 - len(skipped) + grown)


def test_another_number_of_threads_is_warned_of(run):
    assert run(*SMALL, *NEW, plant=terminated_at(4))[0] == 143
    assert "no longer bit for bit" not in run(*RESUME, plant=terminated_at(1))[1]
    code, output = run(*RESUME, plant=functools.partial(torch.set_num_threads, 2))
    assert code == 0
    assert "warning: trained with threads 1 so far, now 2" in output
