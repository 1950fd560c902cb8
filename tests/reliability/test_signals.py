"""Ctrl-C, SIGTERM, SIGHUP: the step is finished, the state saved, the exit code true."""

import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import PROJECT
from plants import chain, signal_at_step, signal_in_save, signal_while_answering
from trainings import NEW, RESUME, SMALL, fingerprint, steps_done

from transformer_scratch.checkpoint import load_checkpoint

STEP = functools.partial(signal_at_step, 4)
VALIDATION = functools.partial(signal_while_answering, 1)
TEST = functools.partial(signal_while_answering, 3)
SIGINT, SIGTERM = (signal.SIGINT, 130), (signal.SIGTERM, 143)
SIGHUP = (signal.SIGHUP, 129)  # the terminal was closed
SIGUSR1, SIGXCPU = (signal.SIGUSR1, 138), (signal.SIGXCPU, 152)  # a batch system warns
slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("plant", "received", "step"),  # step: the update at which the run then stops
    [
        pytest.param(STEP, SIGINT, 4, id="Ctrl-C in a step"),
        pytest.param(STEP, SIGTERM, 4, id="SIGTERM in a step", marks=slow),
        pytest.param(STEP, SIGHUP, 4, id="SIGHUP in a step", marks=slow),
        pytest.param(STEP, SIGUSR1, 4, id="SIGUSR1 in a step", marks=slow),
        pytest.param(STEP, SIGXCPU, 4, id="SIGXCPU in a step", marks=slow),
        pytest.param(VALIDATION, SIGTERM, 6, id="SIGTERM in validation"),
        pytest.param(VALIDATION, SIGINT, 6, id="Ctrl-C in validation", marks=slow),
        pytest.param(signal_in_save, SIGINT, 6, id="Ctrl-C in a save", marks=slow),
        pytest.param(signal_in_save, SIGTERM, 6, id="SIGTERM in a save", marks=slow),
        pytest.param(TEST, SIGINT, 12, id="Ctrl-C in the test", marks=slow),
        pytest.param(TEST, SIGTERM, 12, id="SIGTERM in the test", marks=slow),
    ],
)
def test_one_signal_saves_and_the_exit_code_says_which(run, undisturbed, plant, received, step):
    number, expected = received
    code, output = run(*SMALL, *NEW, plant=functools.partial(plant, number))
    assert code == expected
    assert load_checkpoint(Path("run/last.pt"))["step"] == step
    assert f"stopped: after step {step}; nothing is lost. Resume with: " in output
    assert "train.py --resume run\n" in output
    assert "Traceback" not in output
    assert run(*RESUME)[0] == 0
    assert fingerprint(Path("run")) == undisturbed(*SMALL)


def test_a_second_ctrl_c_leaves_at_once_with_the_last_good_file(run, undisturbed):
    code, output = run(*SMALL, *NEW, plant=functools.partial(signal_in_save, signal.SIGINT, 2))
    assert code == 130
    assert "stopped at once; --resume goes on" in output and "stopped: after" not in output
    # The save that it broke off left no trace.
    assert load_checkpoint(Path("run/last.pt"))["step"] == 0
    assert run(*RESUME)[0] == 0
    assert fingerprint(Path("run")) == undisturbed(*SMALL)


@slow
def test_a_second_sigterm_changes_nothing(run):
    plant = functools.partial(signal_at_step, 4, signal.SIGTERM, 2)
    assert run(*SMALL, *NEW, plant=plant)[0] == 143
    assert load_checkpoint(Path("run/last.pt"))["step"] == 4


@slow
def test_under_nohup_a_closed_terminal_changes_nothing(run, undisturbed):
    ignored = functools.partial(signal.signal, signal.SIGHUP, signal.SIG_IGN)
    closed = functools.partial(signal_at_step, 4, signal.SIGHUP)
    assert run(*SMALL, *NEW, plant=chain(ignored, closed))[0] == 0
    assert fingerprint(Path("run")) == undisturbed(*SMALL)


@slow
@pytest.mark.parametrize(("number", "expected"), [SIGINT, SIGTERM])
def test_a_signal_to_the_whole_group_as_a_terminal_sends_it(number, expected):
    """The real script, with two data workers, which get the signal, too."""
    flags = [*SMALL, *NEW, "--num-workers", "2", "--max-epochs", "1000"]
    command = [sys.executable, str(PROJECT / "train.py"), *flags]
    with open("output.txt", "w", encoding="utf-8") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, process_group=0)
    wait_for_step(20)
    started = time.monotonic()
    os.killpg(process.pid, number)
    assert process.wait(60) == expected, Path("output.txt").read_text(encoding="utf-8")
    assert time.monotonic() - started < 15
    assert "Traceback" not in Path("output.txt").read_text(encoding="utf-8")
    assert load_checkpoint(Path("run/last.pt"))["step"] == steps_done(Path("run"))


@slow
def test_a_limit_of_processor_time_saves_first():
    """From then on the system sends a SIGXCPU every second, the last ones while Python ends."""
    flags = [*SMALL, *NEW, "--max-epochs", "1000", "--save-every", "1"]
    command = f"ulimit -S -t 12; {sys.executable} {PROJECT / 'train.py'} {' '.join(flags)}; exit $?"
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, encoding="utf-8", check=False
    )
    assert done.returncode == 152, done.stderr
    assert "nothing is lost. Resume with: " in done.stderr
    assert load_checkpoint(Path("run/last.pt"))["step"] == steps_done(Path("run")) > 0


def wait_for(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def wait_for_step(step: int, run: Path = Path("run")) -> None:
    wait_for(lambda: steps_done(run) >= step)
