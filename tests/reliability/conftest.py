"""Fixtures that start trainings, see trainings.py."""

import functools
from collections.abc import Callable

import pytest
from trainings import Training, fingerprint


@pytest.fixture
def start():
    """Start a training. -> Training, which has pid and wait()."""
    started = []

    def start(*flags: str, plant: Callable[[], None] | None = None) -> Training:
        training = Training(flags, plant)
        training.start()
        started.append(training)
        return training

    yield start
    for training in started:
        if training.is_alive():
            training.kill()


@pytest.fixture
def run(start):
    """Run a training to its end, whatever that is. -> exit code, output."""

    def run(*flags: str, plant: Callable[[], None] | None = None) -> tuple[int, str]:
        return start(*flags, plant=plant).wait()

    return run


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """The fingerprint of the same training when nothing happens to it; the runs are shared by all tests."""

    @functools.cache
    def undisturbed(*flags: str, plant: Callable[[], None] | None = None) -> dict:
        folder = tmp_path_factory.mktemp("undisturbed")
        training = Training([*flags, "--run-dir", "run"], plant, folder)
        training.start()
        code, output = training.wait()
        assert code == 0, output
        return fingerprint(folder / "run")

    return undisturbed
