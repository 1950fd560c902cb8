"""Bad numbers, broken data, dead workers, too little memory, a full disk, a lock.

Each ends with the right exit code and one clear message, and the run can be resumed undisturbed.
"""

import functools
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import PROJECT
from plants import (
    bad_number_at_batch,
    chain,
    in_a_worker,
    kill,
    little_memory,
    raise_at_step,
    raise_in_dataset,
    signal_at_step,
    small_files,
)
from test_signals import wait_for
from trainings import NEW, RESUME, SMALL, fingerprint

from transformer_scratch import batches
from transformer_scratch.checkpoint import load_checkpoint
from transformer_scratch.run_folder import read_metrics

SAVING = [*NEW, "--save-every", "2"]
TWO_WORKERS = ["--num-workers", "2"]
slow = pytest.mark.slow


def resumes_undisturbed(run, undisturbed) -> None:
    assert run(*RESUME)[0] == 0
    assert fingerprint(Path("run")) == undisturbed(*SMALL)


@pytest.mark.parametrize("number", [math.nan, pytest.param(math.inf, marks=slow)])
def test_a_loss_that_is_no_number_stops_before_it_is_saved(run, undisturbed, number):
    code, output = run(*SMALL, *SAVING, plant=functools.partial(bad_number_at_batch, 4, number))
    assert code == 1
    assert "bad numbers at step 4" in output
    assert "learning rate" in output
    assert "last.pt" in output
    assert "Traceback" not in output
    last = load_checkpoint(Path("run/last.pt"))
    assert last["step"] == 2
    assert all(torch.isfinite(weight).all() for weight in last["model"].values())
    steps = [row["step"] for row in read_metrics(Path("run"))]
    assert steps == [1, 2, 3], "what was good is written"
    resumes_undisturbed(run, undisturbed)


@slow
def test_a_validation_loss_that_is_no_number_is_not_saved_either(run):
    """One update so large that the next forward pass overflows; its own loss is still a number."""
    one_update = "--num-datas 128 --batch-size 128 --lr 1e30 --warmup-steps 0"
    code, output = run(*SMALL, *one_update.split(), *NEW)
    assert code == 1
    assert "bad numbers at step 1: val/loss_epoch is nan" in output
    assert "Traceback" not in output
    assert sorted(file.name for file in Path("run").glob("*.pt")) == ["last.pt"]
    weights = load_checkpoint(Path("run/last.pt"))["model"].values()
    assert all(torch.isfinite(weight).all() for weight in weights)
    assert not any("val/loss_epoch" in row for row in read_metrics(Path("run")))


@pytest.mark.parametrize(
    ("flags", "plant", "message"),
    [
        pytest.param(
            [],
            functools.partial(raise_at_step, 9, ValueError("a bug")),
            "ValueError: a bug",
            id="in a step",
        ),
        pytest.param(
            [],
            functools.partial(raise_in_dataset, 9),
            "ValueError: a damaged sample",
            id="in the dataset",
            marks=slow,
        ),
        pytest.param(
            TWO_WORKERS,
            functools.partial(raise_in_dataset, 3),
            "a damaged sample",
            id="in a worker",
            marks=slow,
        ),
        pytest.param(
            TWO_WORKERS,
            functools.partial(in_a_worker, 2, kill),
            "is killed by signal: Killed",
            id="worker killed",
            marks=slow,
        ),
        pytest.param(
            TWO_WORKERS,
            functools.partial(in_a_worker, 2, signal.pause),
            "no data from a worker for",
            id="worker hangs",
            marks=slow,
        ),
    ],
)
def test_a_crash_keeps_its_traceback_and_the_run(run, undisturbed, flags, plant, message):
    code, output = run(*SMALL, *SAVING, *flags, plant=plant)
    assert code == 1
    assert "Traceback" in output
    assert message in output
    resumes_undisturbed(run, undisturbed)


def test_too_little_memory_says_what_needs_less(run):
    flags = ["--batch-size", "20000", "--num-datas", "20000", "--dim", "256"]
    code, output = run(*SMALL, *flags, *NEW, plant=little_memory)
    assert code == 1
    assert "out of memory. A smaller --batch-size needs less" in output
    assert "Traceback" not in output
    load_checkpoint(Path("run/last.pt"))


@slow
def test_too_little_memory_on_a_gpu_is_the_same(run, undisturbed):
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
    code, output = run(*SMALL, *SAVING, plant=functools.partial(raise_at_step, 5, error))
    assert code == 1
    assert "out of memory. A smaller --batch-size needs less" in output
    resumes_undisturbed(run, undisturbed)


@pytest.mark.parametrize("size", [60_000, pytest.param(2_000, marks=slow)])
def test_a_full_disk_leaves_what_was_saved_before(run, undisturbed, size):
    """No file may grow beyond a size that is too small for the weights, or even the metrics."""
    plant = functools.partial(signal_at_step, 2, signal.SIGTERM)
    assert run(*SMALL, *SAVING, plant=plant)[0] == 143
    whole = (Path("run") / "last.pt").read_bytes()
    code, output = run(*RESUME, plant=functools.partial(small_files, size))
    assert code == 1
    assert "could not be written" in output
    assert "Traceback" not in output
    assert (Path("run") / "last.pt").read_bytes() == whole
    assert not list(Path("run").glob("*.tmp"))
    resumes_undisturbed(run, undisturbed)


@slow
def test_a_disk_without_room_for_the_first_state(run):
    code, output = run(*SMALL, *SAVING, plant=functools.partial(small_files, 20_000))
    assert code == 1
    assert "run/last.pt could not be written" in output
    assert "Make room and try again" in output


def test_two_trainings_in_one_folder(start, run, undisturbed):
    first = start(*SMALL, *SAVING, plant=functools.partial(signal_at_step, 5, signal.SIGSTOP))
    last = Path("run/last.pt")
    wait_for(lambda: last.exists() and load_checkpoint(last)["step"] == 4)
    code, output = run(*RESUME)
    assert code == 2
    assert "run is in use by another training process" in output
    os.kill(first.pid, signal.SIGCONT)
    assert first.wait()[0] == 0
    assert fingerprint(Path("run")) == undisturbed(*SMALL)


@slow
def test_neither_a_dead_owner_nor_its_orphaned_worker_holds_the_lock(start, run, undisturbed):
    # The worker hangs at its last batch, so that it outlives its main process.
    hang = functools.partial(in_a_worker, 6, sleep_in_the_worker)
    plant = chain(hang, patience, functools.partial(signal_at_step, 5, signal.SIGKILL))
    main = start(*SMALL, *SAVING, "--num-workers", "1", plant=plant)
    wait_for(lambda: Path("worker").exists() and Path("worker").read_bytes())
    wait_for(lambda: not Path(f"/proc/{main.pid}").exists())
    worker = int(Path("worker").read_bytes())
    try:
        os.kill(worker, 0)  # it lives
        resumes_undisturbed(run, undisturbed)
    finally:
        os.kill(worker, signal.SIGKILL)


def sleep_in_the_worker() -> None:
    Path("worker").write_text(str(os.getpid()), encoding="utf-8")
    time.sleep(3600)


def patience() -> None:
    batches.WORKER_TIMEOUT = 600


@slow
@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONHASHSEED": "1", "TZ": "Asia/Tokyo"},
        {
            "PYTHONHASHSEED": "2",
            "LC_ALL": "C",
            "PYTHONUTF8": "0",
            "PYTHONCOERCECLOCALE": "0",
            "PYTHONIOENCODING": "ascii",
        },
    ],
)
def test_hash_seed_clock_and_locale_change_nothing(script, undisturbed, environment):
    Path("学習").mkdir()
    done = script("train.py", *SMALL, "--run-dir", "学習/run", **environment)
    assert done.returncode == 0, done.stderr
    assert fingerprint(Path("学習/run")) == undisturbed(*SMALL)
    assert script("train.py", "--help", **environment).returncode == 0
    evaluated = script("evaluate.py", "--run", "学習/run", "--no-pictures", **environment)
    assert evaluated.returncode == 0, evaluated.stderr


@pytest.mark.root
@pytest.mark.parametrize("run_dir", ["closed", "closed/run"])
def test_a_folder_without_permission_is_refused_before_training(run_dir):
    """Root may write everywhere, so the right to do so is given up first."""
    Path("closed").mkdir(mode=0o555)
    command = ["setpriv", "--bounding-set=-dac_override", sys.executable, str(PROJECT / "train.py")]
    command += [*SMALL, "--run-dir", run_dir]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 2, done.stderr
    assert "Permission denied" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(Path("closed").iterdir())
