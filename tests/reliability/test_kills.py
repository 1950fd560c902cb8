"""A run that is killed, in the worst moments too, has only whole files and ends as if nothing had been."""

import functools
import random
import signal
import time
from pathlib import Path

import pytest
from plants import kill_in_metrics, kill_in_ranking, kill_in_save, signal_at_step
from trainings import SMALL, fingerprint

from transformer_scratch.checkpoint import load_checkpoint

NEW = ["--run-dir", "run", "--save-every", "2"]
KILLED = -signal.SIGKILL
MOMENTS = ["before writing", "half written", "after keeping the previous", "before the rename", "after the rename"]


def files_are_whole() -> None:
    for file in Path("run").glob("*.pt"):
        load_checkpoint(file)


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_kill_inside_a_save(run, undisturbed, moment):
    assert run(*SMALL, *NEW, plant=functools.partial(kill_in_save, moment, 4))[0] == KILLED
    files_are_whole()
    assert any(Path("run").glob("last.pt.*.tmp")) == (moment != "after the rename")
    assert run("--resume", "run")[0] == 0
    assert fingerprint(Path("run")) == undisturbed(*SMALL)
    assert not list(Path("run").glob("*.tmp"))


@pytest.mark.parametrize(
    "plant",
    [
        pytest.param(functools.partial(kill_in_ranking, "before", 2), id="before best.pt is set"),
        pytest.param(functools.partial(kill_in_ranking, "after", 2), id="after best.pt is set"),
        pytest.param(functools.partial(kill_in_metrics, 5), id="half a line of metrics"),
        pytest.param(functools.partial(signal_at_step, 9, signal.SIGKILL), id="in an update"),
    ],
)
def test_a_kill_elsewhere(run, undisturbed, plant):
    assert run(*SMALL, *NEW, "--save-top-k", "1", plant=plant)[0] == KILLED
    files_are_whole()
    assert run("--resume", "run")[0] == 0
    assert fingerprint(Path("run")) == undisturbed(*SMALL, "--save-top-k", "1")


def test_killed_before_the_first_state_there_is_nothing_to_resume(run):
    assert run(*SMALL, *NEW, plant=functools.partial(kill_in_save, "half written", 1))[0] == KILLED
    code, output = run("--resume", "run")
    assert code == 2
    assert "there is no last.pt in it" in output
    assert "Traceback" not in output


def test_killed_again_and_again(run, undisturbed):
    """Three resumed runs in a row are killed in their first save."""
    assert run(*SMALL, *NEW, plant=functools.partial(kill_in_save, "before the rename", 3))[0] == KILLED
    for moment in MOMENTS[:3]:
        assert run("--resume", "run", plant=functools.partial(kill_in_save, moment, 1))[0] == KILLED
        files_are_whole()
    assert run("--resume", "run")[0] == 0
    assert fingerprint(Path("run")) == undisturbed(*SMALL)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_a_kill_at_a_random_moment(start, run, undisturbed, seed):
    flags = [*SMALL, "--max-epochs", "20"]  # more than can be done before the kill
    training = start(*flags, "--run-dir", "run", "--save-every", "1")
    while not Path("run/last.pt").exists():
        assert training.is_alive()
        time.sleep(0.001)
    time.sleep(random.Random(seed).uniform(0, 0.6))
    training.kill()
    assert training.wait()[0] == KILLED
    files_are_whole()
    assert run("--resume", "run")[0] == 0
    assert fingerprint(Path("run")) == undisturbed(*flags)
