"""Fixtures that start trainings, see trainings.py."""

import functools
from collections.abc import Callable

import pytest
from trainings import Training, fingerprint, start_two

Plant = Callable[[], None] | None


@pytest.fixture
def start():
    """Start a training. -> Training, which has pid and wait()."""
    started = []

    def start(*flags: str, plant: Plant = None) -> Training:
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

    def run(*flags: str, plant: Plant = None) -> tuple[int, str]:
        return start(*flags, plant=plant).wait()

    return run


@pytest.fixture
def run_two():
    """Run a training of two processes to its end. -> their exit codes, their outputs."""
    started = []

    def run_two(
        *flags: str, plants: tuple = (None, None), folders: tuple = (None, None)
    ) -> tuple[list[int], list[str]]:
        pair = start_two(flags, plants, folders)
        started.extend(pair)
        codes, outputs = zip(*(training.wait() for training in pair), strict=True)
        return list(codes), list(outputs)

    yield run_two
    for training in started:
        if training.is_alive():
            training.kill()


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """The fingerprint of the same training when nothing happens to it, shared by all tests."""

    @functools.cache
    def undisturbed(*flags: str, plant: Plant = None, processes: int = 1) -> dict:
        folder = tmp_path_factory.mktemp("undisturbed")
        flags = [*flags, "--run-dir", "run"]
        if processes == 2:
            trainings = start_two(flags, folders=(folder, folder))
        else:
            trainings = [Training(flags, plant, folder)]
            trainings[0].start()
        for training in trainings:
            code, output = training.wait()
            assert code == 0, output
        return fingerprint(folder / "run")

    return undisturbed
