"""Ctrl-C and SIGTERM: the step is finished, the state saved, the exit code true; a second Ctrl-C leaves at once."""

import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from plants import signal_at_step, signal_in_save, signal_while_answering
from trainings import SMALL, fingerprint

from transformer_scratch.checkpoint import load_checkpoint

PROJECT = Path(__file__).resolve().parents[2]
NEW = ["--run-dir", "run"]
MOMENTS = {  # and the update at which the run then stops
    "in a step": (functools.partial(signal_at_step, 4), 4),
    "in validation": (functools.partial(signal_while_answering, 1), 6),
    "in a save": (signal_in_save, 6),
    "in the test": (functools.partial(signal_while_answering, 3), 12),
}


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_one_signal_saves_and_the_exit_code_says_which(run, undisturbed, moment, number, code):
    plant, step = MOMENTS[moment]
    got, output = run(*SMALL, *NEW, plant=functools.partial(plant, number))
    assert got == code
    assert load_checkpoint(Path("run/last.pt"))["step"] == step
    assert f"stopped after step {step}; nothing is lost. Go on with: " in output
    assert "python train.py --resume run\n" in output
    assert "Traceback" not in output
    assert run("--resume", "run")[0] == 0
    assert fingerprint(Path("run")) == undisturbed(*SMALL)


def test_a_second_ctrl_c_leaves_at_once_with_the_last_good_file(run, undisturbed):
    got, output = run(*SMALL, *NEW, plant=functools.partial(signal_in_save, signal.SIGINT, 2))
    assert got == 130
    assert "stopped after" not in output
    assert load_checkpoint(Path("run/last.pt"))["step"] == 0  # the save that it broke off left no trace
    assert run("--resume", "run")[0] == 0
    assert fingerprint(Path("run")) == undisturbed(*SMALL)


def test_a_second_sigterm_changes_nothing(run):
    assert run(*SMALL, *NEW, plant=functools.partial(signal_at_step, 4, signal.SIGTERM, 2))[0] == 143
    assert load_checkpoint(Path("run/last.pt"))["step"] == 4


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_a_signal_to_the_whole_group_as_a_terminal_sends_it(number, code):
    """The real script, with two data workers, which get the signal, too."""
    script = [sys.executable, str(PROJECT / "train.py"), *SMALL, *NEW, "--num-workers", "2", "--max-epochs", "1000"]
    with open("output.txt", "w") as output:
        process = subprocess.Popen(script, stdout=output, stderr=output, process_group=0)
    wait_for(lambda: Path("run/metrics.jsonl").exists() and b'"step": 20' in Path("run/metrics.jsonl").read_bytes())
    started = time.monotonic()
    os.killpg(process.pid, number)
    assert process.wait(60) == code, Path("output.txt").read_text()
    assert time.monotonic() - started < 15
    assert "Traceback" not in Path("output.txt").read_text()
    steps = Path("run/metrics.jsonl").read_text().count('"train/loss_step"')
    assert load_checkpoint(Path("run/last.pt"))["step"] == steps


def wait_for(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)
