"""What can go wrong around a training: bad numbers, broken data, dead workers, too little memory, a full disk, a lock.

Each ends with the right exit code and one clear message, and with a state from which the run ends undisturbed.
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
from test_signals import PROJECT, wait_for
from trainings import SMALL, fingerprint

from transformer_scratch.checkpoint import load_checkpoint

NEW = ["--run-dir", "run", "--save-every", "2"]


def resumes_undisturbed(run, undisturbed) -> None:
    assert run("--resume", "run")[0] == 0
    assert fingerprint(Path("run")) == undisturbed(*SMALL)


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops_before_it_is_saved(run, undisturbed, number):
    code, output = run(*SMALL, *NEW, plant=functools.partial(bad_number_at_batch, 4, number))
    assert code == 1
    assert "bad numbers at step 4" in output
    assert "learning rate" in output
    assert "last.pt" in output
    assert "Traceback" not in output
    last = load_checkpoint(Path("run/last.pt"))
    assert last["step"] == 2
    assert all(torch.isfinite(weight).all() for weight in last["model"].values())
    lines = Path("run/metrics.jsonl").read_text()
    assert "NaN" not in lines and '"step": 3,' in lines and '"step": 4,' not in lines, "what was good is written"
    resumes_undisturbed(run, undisturbed)


def test_a_validation_loss_that_is_no_number_is_not_saved_either(run):
    """One update so large that the weights overflow in the next forward pass; its own loss is still a number."""
    one_update = ["--num-datas", "128", "--batch-size", "128", "--lr", "1e30", "--warmup-steps", "0"]
    code, output = run(*SMALL, *one_update, "--run-dir", "run")
    assert code == 1
    assert "the val loss is nan after step 1" in output
    assert "Traceback" not in output
    assert sorted(file.name for file in Path("run").glob("*.pt")) == ["last.pt"]
    assert all(torch.isfinite(weight).all() for weight in load_checkpoint(Path("run/last.pt"))["model"].values())
    assert "NaN" not in Path("run/metrics.jsonl").read_text()


@pytest.mark.parametrize(
    ("flags", "plant", "message"),
    [
        pytest.param([], functools.partial(raise_at_step, 9, ValueError("a bug")), "ValueError: a bug", id="in a step"),
        pytest.param([], functools.partial(raise_in_dataset, 9), "ValueError: a damaged sample", id="in the dataset"),
        pytest.param(
            ["--num-workers", "2"], functools.partial(raise_in_dataset, 3), "a damaged sample", id="in a worker"
        ),
        pytest.param(
            ["--num-workers", "2"],
            functools.partial(in_a_worker, kill),
            "is killed by signal: Killed",
            id="worker killed",
        ),
        pytest.param(
            ["--num-workers", "2"],
            functools.partial(in_a_worker, signal.pause),
            "timed out after 1 seconds",
            id="worker hangs",
        ),
    ],
)
def test_a_crash_keeps_its_traceback_and_the_run(run, undisturbed, flags, plant, message):
    code, output = run(*SMALL, *NEW, *flags, plant=plant)
    assert code == 1
    assert "Traceback" in output
    assert message in output
    resumes_undisturbed(run, undisturbed)


def test_too_little_memory_says_what_needs_less(run):
    flags = ["--batch-size", "20000", "--num-datas", "20000", "--dim", "256"]
    code, output = run(*SMALL, *flags, "--run-dir", "run", plant=little_memory)
    assert code == 1
    assert "out of memory. A smaller --batch-size needs less" in output
    assert "Traceback" not in output
    load_checkpoint(Path("run/last.pt"))


def test_too_little_memory_on_a_gpu_is_the_same(run, undisturbed):
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
    code, output = run(*SMALL, *NEW, plant=functools.partial(raise_at_step, 5, error))
    assert code == 1
    assert "out of memory. A smaller --batch-size needs less" in output
    resumes_undisturbed(run, undisturbed)


@pytest.mark.parametrize("size", [60_000, 2_000])
def test_a_full_disk_leaves_what_was_saved_before(run, undisturbed, size):
    """No file may grow beyond a size that is too small for the weights, or for the metrics already."""
    assert run(*SMALL, *NEW, plant=functools.partial(signal_at_step, 2, signal.SIGTERM))[0] == 143
    whole = (Path("run") / "last.pt").read_bytes()
    code, output = run("--resume", "run", plant=functools.partial(small_files, size))
    assert code == 1
    assert "could not be written" in output
    assert "Traceback" not in output
    assert (Path("run") / "last.pt").read_bytes() == whole
    assert not list(Path("run").glob("*.tmp"))
    resumes_undisturbed(run, undisturbed)


def test_a_disk_without_room_for_the_first_state(run):
    code, output = run(*SMALL, *NEW, plant=functools.partial(small_files, 20_000))
    assert code == 1
    assert "run/last.pt could not be written" in output
    assert "Make room and try again" in output


@pytest.mark.parametrize("kind", ["a file", "not empty"])
def test_a_folder_that_cannot_be_taken_is_refused_before_training(run, kind):
    if kind == "a file":
        Path("run").touch()
    else:
        Path("run").mkdir()
        (Path("run") / "notes.txt").touch()
    code, output = run(*SMALL, "--run-dir", "run")
    assert code == 2
    assert "--run-dir run is not an empty folder" in output


def test_a_file_where_runs_should_be(run):
    Path("runs").touch()
    code, output = run(*SMALL)
    assert code == 2
    assert "the run folder cannot be made" in output


def test_two_trainings_in_one_folder(start, run, undisturbed):
    first = start(*SMALL, *NEW, plant=functools.partial(signal_at_step, 5, signal.SIGSTOP))
    wait_for(lambda: Path("run/last.pt").exists() and load_checkpoint(Path("run/last.pt"))["step"] == 4)
    code, output = run("--resume", "run")
    assert code == 2
    assert "run is in use by another training process" in output
    os.kill(first.pid, signal.SIGCONT)
    assert first.wait()[0] == 0
    assert fingerprint(Path("run")) == undisturbed(*SMALL)


def test_neither_a_dead_owner_nor_its_orphaned_worker_holds_the_lock(start, run, undisturbed):
    plant = chain(keep_the_worker, functools.partial(signal_at_step, 5, signal.SIGKILL))
    main = start(*SMALL, *NEW, "--num-workers", "1", plant=plant)
    wait_for(lambda: Path("worker").exists() and Path("worker").read_text())
    wait_for(lambda: not Path(f"/proc/{main.pid}").exists())
    worker = int(Path("worker").read_text())
    try:
        os.kill(worker, 0)  # it lives
        resumes_undisturbed(run, undisturbed)
    finally:
        os.kill(worker, signal.SIGKILL)


def keep_the_worker() -> None:
    """Let the worker hang at its last batch, so that it outlives its main process."""
    from transformer_scratch import data

    fetch, main, count = data.PairDataset.__getitem__, os.getpid(), iter(range(1, 10**6))

    def stopped(dataset: data.PairDataset, item: tuple) -> data.Batch:
        batch = fetch(dataset, item)
        if os.getpid() != main and next(count) == 6:
            Path("worker").write_text(str(os.getpid()))
            time.sleep(3600)
        return batch

    data.PairDataset.__getitem__ = stopped


@pytest.mark.slow
@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONHASHSEED": "1", "TZ": "Asia/Tokyo"},
        {"PYTHONHASHSEED": "2", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"},
    ],
)
def test_hash_seed_clock_and_locale_change_nothing(script, undisturbed, environment):
    Path("学習").mkdir()
    done = script("train.py", *SMALL, "--run-dir", "学習/run", **environment)
    assert done.returncode == 0, done.stderr
    assert fingerprint(Path("学習/run")) == undisturbed(*SMALL)
    assert script("train.py", "--help", **environment).returncode == 0
    assert script("evaluate.py", "--run", "学習/run", "--no-pictures", **environment).returncode == 0


@pytest.mark.root
@pytest.mark.parametrize("run_dir", ["closed", "closed/run"])
def test_a_folder_without_permission_is_refused_before_training(run_dir):
    """Root may write everywhere, so the right to do so is given up first."""
    Path("closed").mkdir(mode=0o555)
    command = ["setpriv", "--bounding-set=-dac_override", sys.executable, str(PROJECT / "train.py"), *SMALL]
    done = subprocess.run([*command, "--run-dir", run_dir], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "Permission denied" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(Path("closed").iterdir())
