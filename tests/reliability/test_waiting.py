"""Waiting for a data worker: signals are heard, the wait is explained, no batch is lost."""

import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import PROJECT
from plants import chain, in_a_worker
from test_signals import wait_for
from trainings import NEW, RESUME, SMALL, fingerprint

from transformer_scratch import batches, output
from transformer_scratch.checkpoint import load_checkpoint
from transformer_scratch.digits import Digits

ONE_WORKER = ["--num-workers", "1"]
SIGINT, SIGTERM = (signal.SIGINT, 130), (signal.SIGTERM, 143)
SIGHUP = (signal.SIGHUP, 129)
slow = pytest.mark.slow


# ------------------------------------------------------------------- the wait, without a worker


class Workers:
    """A loader that gives these batches, and raises what is an error among them."""

    num_workers = 2

    def __init__(self, *events: object):
        self.events = iter(events)

    def __iter__(self) -> "Workers":
        return self

    def __next__(self) -> object:
        event = next(self.events)
        if isinstance(event, Exception):
            raise event
        return event


NOTHING_YET = RuntimeError("DataLoader timed out after 3 seconds")  # after a slice of waiting


def given(*events: object, received: int = 0) -> list:
    output.warned_of.clear()
    return list(batches.until_stopped(Workers(*events), SimpleNamespace(received=received)))


def test_a_batch_that_comes_late_is_not_lost():
    assert given("a", NOTHING_YET, NOTHING_YET, "b", NOTHING_YET, "c") == ["a", "b", "c"]


def test_a_signal_interrupts_the_wait_but_no_batch_that_is_there():
    assert given("a", NOTHING_YET, "b", received=signal.SIGTERM) == ["a", None, "b"]


def test_a_long_wait_is_explained_once(capsys):
    given("a", *[NOTHING_YET] * 9, "b")
    assert capsys.readouterr().err == ""
    given("a", *[NOTHING_YET] * 15, "b", *[NOTHING_YET] * 15, "c")
    said = "warning: no data from a worker for 30 seconds; --num-workers 0 needs none\n"
    assert capsys.readouterr().err == said


def test_a_wait_for_nothing_ends():
    with pytest.raises(RuntimeError, match="no data from a worker for 600 seconds"):
        given("a", *[NOTHING_YET] * 1000)


@pytest.mark.parametrize(
    "error", [RuntimeError("the connection to the server timed out"), TimeoutError("timed out")]
)
def test_an_error_of_the_data_is_never_taken_for_a_wait(error):
    with pytest.raises(type(error), match=str(error)):
        given("a", error, "b")


def test_only_our_loop_waits_in_slices(monkeypatch):
    """Lightning gets the same loader, and would end at the first timeout."""
    fetch = batches.PairDataset.__getitem__

    def slow_fetch(dataset: batches.PairDataset, item: batches.BatchIndices) -> batches.Batch:
        time.sleep(0.1)
        return fetch(dataset, item)

    monkeypatch.setattr(batches.PairDataset, "__getitem__", slow_fetch)
    monkeypatch.setattr(batches, "SLICE", 0.02)
    task = Digits(10, 16)
    dataset = batches.PairDataset(task, task.all_pairs()[:2])
    loader = batches.make_loader(batches.BatchSampler(dataset, 1), num_workers=1)
    assert len(list(loader)) == 2


# --------------------------------------------------------------------- trainings whose worker hangs


def patience(slices: float = 0.2, warning: float = 30, end: float = 600) -> None:
    """Wait in shorter slices, and until then."""
    batches.SLICE, batches.WARN_AFTER, batches.WORKER_TIMEOUT = slices, warning, end


def at_batch_4(fault, **patiently: float):
    """A plant: the fault happens in the data workers, and the run waits for their batches."""
    return chain(functools.partial(in_a_worker, 4, fault), functools.partial(patience, **patiently))


def hang() -> None:
    time.sleep(3600)


def hang_and_stop_the_run(number: int) -> None:
    """The signal comes when the run has done all batches before, and waits."""
    time.sleep(0.5)
    os.kill(os.getppid(), number)
    hang()


@pytest.mark.parametrize(
    "received", [SIGTERM, pytest.param(SIGINT, marks=slow), pytest.param(SIGHUP, marks=slow)]
)
def test_a_signal_ends_the_wait_and_nothing_is_lost(run, undisturbed, received):
    number, expected = received
    plant = at_batch_4(functools.partial(hang_and_stop_the_run, number))
    code, said = run(*SMALL, *NEW, *ONE_WORKER, plant=plant)
    assert code == expected
    assert "stopped: after step 3; nothing is lost. Resume with: " in said
    assert load_checkpoint(Path("run/last.pt"))["step"] == 3
    assert run(*RESUME, "--num-workers", "0")[0] == 0
    assert fingerprint(Path("run")) == undisturbed(*SMALL)


@slow
@pytest.mark.parametrize(
    ("flags", "said", "saved"),
    # Batch 4 is the second of the second update: its gradients are half there.
    [
        ([], "after step 1; saved is step 0, the others will be computed again", 0),
        (["--save-every", "1"], "after step 1; nothing is lost", 1),
    ],
)
def test_within_an_update_it_is_said_what_is_saved(run, undisturbed, flags, said, saved):
    two_batches = [*SMALL, "--accumulate", "2"]
    plant = at_batch_4(functools.partial(hang_and_stop_the_run, signal.SIGTERM))
    code, text = run(*two_batches, *flags, *NEW, *ONE_WORKER, plant=plant)
    assert code == 143
    assert f"stopped: {said}" in text
    assert load_checkpoint(Path("run/last.pt"))["step"] == saved
    assert run(*RESUME, "--num-workers", "0")[0] == 0
    assert fingerprint(Path("run")) == undisturbed(*two_batches)


@slow
@pytest.mark.parametrize("workers", [1, 4])
def test_however_many_workers_hang_the_end_comes_soon(start, workers):
    """PyTorch alone would wait 5 seconds for each."""
    training = start(*SMALL, *NEW, "--num-workers", str(workers), plant=at_batch_1(hang))
    wait_for(lambda: Path("run/last.pt").exists())
    time.sleep(1)
    started = time.monotonic()
    os.kill(training.pid, signal.SIGTERM)
    assert training.wait()[0] == 143
    assert time.monotonic() - started < 4


def at_batch_1(fault):
    return chain(functools.partial(in_a_worker, 1, fault), patience)


@slow
def test_workers_that_are_always_slower_than_a_slice_change_no_number(run, undisturbed):
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
    code, said = run(*SMALL, *NEW, "--save-every", "1", *ONE_WORKER, plant=plant)
    assert code == 1
    assert "no data from a worker for 3 seconds; --num-workers 0 needs none" in said
    assert load_checkpoint(Path("run/last.pt"))["step"] == 3
    assert run(*RESUME, "--num-workers", "0")[0] == 0
    assert fingerprint(Path("run")) == undisturbed(*SMALL)


@slow
def test_a_worker_of_one_of_two_processes(run_two, run):
    """Both get the signal, as from torchrun: the one that waits leaves, the other then has to."""
    plant = at_batch_4(functools.partial(hang_and_stop_the_run, signal.SIGTERM))
    flags = [*SMALL, *NEW, "--save-every", "1", "--batch-size", "16"]
    codes, said = run_two(*flags, *ONE_WORKER, plants=(None, plant))
    assert codes == [1, 143]
    assert "another process has ended" in said[0]
    assert load_checkpoint(Path("run/last.pt"))["step"] == 3


@slow
@pytest.mark.parametrize("received", [SIGTERM, SIGINT])
def test_where_the_workers_cannot_speak_a_signal_is_heard(undisturbed, tmp_path, received):
    """The path of their socket has a hundred characters at most: a long TMPDIR leaves them mute."""
    number, expected = received
    long = tmp_path / ("x" * 80)
    long.mkdir()
    command = [sys.executable, str(PROJECT / "train.py"), *SMALL, *NEW, "--num-workers", "2"]
    with open("output.txt", "w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=file, env={**os.environ, "TMPDIR": str(long)}
        )
    wait_for(lambda: "AF_UNIX path too long" in Path("output.txt").read_text(encoding="utf-8"))
    started = time.monotonic()
    process.send_signal(number)
    assert process.wait(60) == expected
    assert time.monotonic() - started < 40
    assert "after step 0; nothing is lost" in Path("output.txt").read_text(encoding="utf-8")
    command = [sys.executable, str(PROJECT / "train.py"), *RESUME, "--num-workers", "0"]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    assert fingerprint(Path("run")) == undisturbed(*SMALL)
