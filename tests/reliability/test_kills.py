"""A run that is killed has only whole files, and resumed it ends as if nothing had been."""

import functools
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import PROJECT
from plants import kill_in_metrics, kill_in_ranking, kill_in_save, signal_at_step
from trainings import NEW, RESUME, SMALL, fingerprint

from transformer_scratch.checkpoint import load_checkpoint

SAVING = [*NEW, "--save-every", "2"]
KILLED = -signal.SIGKILL
slow = pytest.mark.slow


def files_are_whole() -> None:
    for file in Path("run").glob("*.pt"):
        load_checkpoint(file)


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param("before writing", marks=slow),
        "half written",
        pytest.param("after keeping the previous", marks=slow),
        pytest.param("before the rename", marks=slow),
        pytest.param("after the rename", marks=slow),
    ],
)
def test_a_kill_inside_a_save(run, undisturbed, moment):
    assert run(*SMALL, *SAVING, plant=functools.partial(kill_in_save, moment, 4))[0] == KILLED
    files_are_whole()
    assert any(Path("run").glob("last.pt.*.tmp")) == (moment != "after the rename")
    assert run(*RESUME)[0] == 0
    assert fingerprint(Path("run")) == undisturbed(*SMALL)
    assert not list(Path("run").glob("*.tmp"))


@pytest.mark.parametrize(
    "plant",
    [
        pytest.param(
            functools.partial(kill_in_ranking, "before", 2), id="before best.pt is set", marks=slow
        ),
        pytest.param(
            functools.partial(kill_in_ranking, "after", 2), id="after best.pt is set", marks=slow
        ),
        pytest.param(
            functools.partial(kill_in_metrics, 9), id="half a line of metrics", marks=slow
        ),
        pytest.param(
            functools.partial(signal_at_step, 9, signal.SIGKILL), id="in an update", marks=slow
        ),
    ],
)
def test_a_kill_elsewhere(run, undisturbed, plant):
    flags = [*SMALL, "--save-top-k", "1"]
    assert run(*flags, *SAVING, plant=plant)[0] == KILLED
    files_are_whole()
    assert run(*RESUME)[0] == 0
    assert fingerprint(Path("run")) == undisturbed(*flags)


@slow
@pytest.mark.parametrize("moment", ["before writing", "half written", "before the rename"])
def test_killed_before_the_first_state_it_can_be_begun_again(run, undisturbed, moment):
    assert run(*SMALL, *SAVING, plant=functools.partial(kill_in_save, moment, 1))[0] == KILLED
    code, output = run(*RESUME)
    assert code == 2
    assert "there is no last.pt in it" in output
    assert "Traceback" not in output
    assert run(*SMALL, *SAVING)[0] == 0
    assert fingerprint(Path("run")) == undisturbed(*SMALL)


@slow
def test_killed_again_and_again(run, undisturbed):
    """Three resumed runs in a row are killed in their first save."""
    plant = functools.partial(kill_in_save, "before the rename", 3)
    assert run(*SMALL, *SAVING, plant=plant)[0] == KILLED
    for moment in ("before writing", "half written", "after keeping the previous"):
        assert run(*RESUME, plant=functools.partial(kill_in_save, moment, 1))[0] == KILLED
        files_are_whole()
    assert run(*RESUME)[0] == 0
    assert fingerprint(Path("run")) == undisturbed(*SMALL)


@slow
@pytest.mark.parametrize("seed", range(10))
def test_a_kill_at_a_random_moment(start, run, undisturbed, seed):
    flags = [*SMALL, "--max-epochs", "20"]  # more than can be done before the kill
    training = start(*flags, *NEW, "--save-every", "1")
    while not Path("run/last.pt").exists():
        assert training.is_alive()
        time.sleep(0.001)
    time.sleep(random.Random(seed).uniform(0, 0.6))
    training.kill()
    assert training.wait()[0] == KILLED
    files_are_whole()
    assert run(*RESUME)[0] == 0
    assert fingerprint(Path("run")) == undisturbed(*flags)


@slow
def test_the_campaign_survives():
    command = [sys.executable, "-m", "tests.reliability.campaign"]
    command += ["--stops", "1", "--signals", "SIGKILL", "--flips", "20", "--cuts", "20"]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SIGKILL: 1, " in done.stdout and "1 survived" in done.stdout
    assert "all survived" in done.stdout
