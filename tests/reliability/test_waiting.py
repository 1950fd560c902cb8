"""Waiting for a data worker: signals are heard, it is said what the wait is for, no batch is lost."""

import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import PROJECT
from plants import chain, in_a_worker
from test_signals import wait_for
from trainings import NEW, RESUME, SMALL, fingerprint, steps_done

from transformer_scratch import batches
from transformer_scratch.checkpoint import load_checkpoint
from transformer_scratch.task import Task

ONE_WORKER = ["--num-workers", "1"]
SIGINT, SIGTERM = (signal.SIGINT, 130), (signal.SIGTERM, 143)
SIGHUP = (signal.SIGHUP, 129)
slow = pytest.mark.slow


def patience(slices: float = 0.2, warning: float = 30, end: float = 600) -> None:
    """Wait in shorter slices, and until then."""
    batches.SLICE, batches.WARN_AFTER, batches.WORKER_TIMEOUT = slices, warning, end


def hang() -> None:
    time.sleep(3600)


def hang_and_stop_the_run(number: int) -> None:
    """The signal comes when the run has done all batches before, and waits."""
    time.sleep(1)
    os.kill(os.getppid(), number)
    hang()


def at_batch_4(fault, **patiently: float):
    """A plant: the fault happens in the data worker, and the run waits for its batch."""
    return chain(
        functools.partial(in_a_worker, 4, fault), functools.partial(patience, **patiently)
    )


def seconds_to_die(training) -> float:
    """From the end of what it says until the process is gone."""
    started = time.monotonic()
    training.wait()
    return time.monotonic() - started


@pytest.mark.parametrize(
    "received", [SIGTERM, pytest.param(SIGINT, marks=slow), pytest.param(SIGHUP, marks=slow)]
)
def test_a_signal_ends_the_wait_and_nothing_is_lost(run, undisturbed, received):
    number, expected = received
    plant = at_batch_4(functools.partial(hang_and_stop_the_run, number))
    started = time.monotonic()
    code, output = run(*SMALL, *NEW, *ONE_WORKER, plant=plant)
    assert code == expected
    assert time.monotonic() - started < 15, "10 for the end, and the training before"
    assert "stopped: after step 3; nothing is lost. Resume with: " in output
    assert load_checkpoint(Path("run/last.pt"))["step"] == 3
    assert run(*RESUME, "--num-workers", "0")[0] == 0
    assert fingerprint(Path("run")) == undisturbed(*SMALL)


@pytest.mark.parametrize(
    ("flags", "said", "saved"),
    # Batch 4 is the second of the second update: its gradients are half there.
    [
        ([], "after step 1; saved is step 0, the others will be computed again", 0),
        pytest.param(["--save-every", "1"], "after step 1; nothing is lost", 1, marks=slow),
    ],
)
def test_within_an_update_it_is_said_what_is_saved(run, undisturbed, flags, said, saved):
    two_batches = [*SMALL, "--accumulate", "2"]
    plant = at_batch_4(functools.partial(hang_and_stop_the_run, signal.SIGTERM))
    code, output = run(*two_batches, *flags, *NEW, *ONE_WORKER, plant=plant)
    assert code == 143
    assert f"stopped: {said}" in output
    assert load_checkpoint(Path("run/last.pt"))["step"] == saved
    assert run(*RESUME, "--num-workers", "0")[0] == 0
    assert fingerprint(Path("run")) == undisturbed(*two_batches)


def test_a_worker_slower_than_a_slice_loses_no_batch(run, undisturbed):
    """And after a while it is said, once, what the waiting is for."""
    slow_at_4 = at_batch_4(functools.partial(time.sleep, 1), warning=0.5)
    code, output = run(*SMALL, *NEW, *ONE_WORKER, plant=slow_at_4)
    assert code == 0
    # Once in each epoch it waits.
    assert output.count("warning: no data worker has delivered for ") == 1
    assert "--num-workers 0 needs none" in output
    assert fingerprint(Path("run")) == undisturbed(*SMALL)


@slow
def test_workers_that_are_always_slower_than_a_slice_lose_no_batch(run, undisturbed):
    plant = chain(every_batch_takes_a_while, functools.partial(patience, 0.05))
    assert run(*SMALL, *NEW, "--num-workers", "2", plant=plant)[0] == 0
    assert fingerprint(Path("run")) == undisturbed(*SMALL)


def every_batch_takes_a_while() -> None:
    fetch = batches.PairDataset.__getitem__

    def slow_fetch(dataset: batches.PairDataset, item: batches.BatchIndices) -> batches.Batch:
        time.sleep(0.2)
        return fetch(dataset, item)

    batches.PairDataset.__getitem__ = slow_fetch


@slow
def test_a_worker_that_never_delivers_ends_the_run_in_the_end(run, undisturbed):
    plant = at_batch_4(hang, slices=1, end=3)
    code, output = run(*SMALL, *NEW, "--save-every", "1", *ONE_WORKER, plant=plant)
    assert code == 1
    assert "no data worker has delivered for 3 seconds; --num-workers 0 needs none" in output
    assert load_checkpoint(Path("run/last.pt"))["step"] == 3
    assert run(*RESUME, "--num-workers", "0")[0] == 0
    assert fingerprint(Path("run")) == undisturbed(*SMALL)


def test_an_error_of_the_data_is_never_taken_for_a_wait(run):
    """Data may lie on a server, and its errors speak of time, too."""
    code, output = run(*SMALL, *NEW, *ONE_WORKER, plant=at_batch_4(server_is_slow))
    assert code == 1
    assert "RuntimeError: the connection timed out" in output
    assert steps_done(Path("run")) <= 3


def server_is_slow() -> None:
    raise RuntimeError("the connection timed out")


def test_only_our_loop_waits_in_slices(monkeypatch):
    """Lightning gets the same loader, and would end at a timeout."""
    every_batch_takes_a_while_in(monkeypatch)
    monkeypatch.setattr(batches, "SLICE", 0.05)
    task = Task(10, 16)
    dataset = batches.PairDataset(task, task.all_pairs()[:3])
    loader = batches.make_loader(batches.BatchSampler(dataset, 1), num_workers=1)
    assert len(list(loader)) == 3


def every_batch_takes_a_while_in(monkeypatch) -> None:
    monkeypatch.setattr(batches.PairDataset, "__getitem__", batches.PairDataset.__getitem__)
    every_batch_takes_a_while()


@slow
@pytest.mark.parametrize("received", [SIGTERM, SIGINT])
def test_where_the_workers_cannot_speak_a_signal_is_heard(undisturbed, tmp_path, received):
    """The path of their socket has a hundred characters at most: a long TMPDIR leaves them mute."""
    number, expected = received
    long = tmp_path / ("x" * 80)
    long.mkdir()
    command = [sys.executable, str(PROJECT / "train.py"), *SMALL, *NEW, "--num-workers", "2"]
    with open("output.txt", "w", encoding="utf-8") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env={**os.environ, "TMPDIR": str(long)}
        )
    wait_for(lambda: "AF_UNIX path too long" in Path("output.txt").read_text(encoding="utf-8"))
    started = time.monotonic()
    process.send_signal(number)
    assert process.wait(60) == expected
    assert time.monotonic() - started < 10
    assert "after step 0; nothing is lost" in Path("output.txt").read_text(encoding="utf-8")
    command = [sys.executable, str(PROJECT / "train.py"), *RESUME, "--num-workers", "0"]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    assert fingerprint(Path("run")) == undisturbed(*SMALL)
