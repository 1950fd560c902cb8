"""File systems without fsync, without hard links, without locks: network mounts, FUSE, 9p.

The training goes on, and one warning says what cannot be promised there. A disk that fails is
another matter: it ends the run, with one line.
"""

import errno
import fcntl
import functools
import os
import stat
from pathlib import Path

import pytest
import torch
from plants import chain, counter
from trainings import NEW, RESUME, SMALL, fingerprint

from transformer_scratch import output
from transformer_scratch.checkpoint import load_checkpoint, save_checkpoint
from transformer_scratch.errors import BadInput, exits_cleanly
from transformer_scratch.run_folder import lock_folder

NOT_THERE = [errno.EINVAL, errno.ENOSYS, errno.ENOTSUP]
CONTENT = {"model": {"weight": torch.zeros(3)}}
FSYNC, LOCK = "warning: this file system cannot force", "warning: this file system has no locks"
slow = pytest.mark.slow


@pytest.fixture(autouse=True)
def nobody_has_been_warned():
    output.warned_of.clear()


def is_folder(descriptor: int) -> bool:
    return stat.S_ISDIR(os.fstat(descriptor).st_mode)


def failing_fsync(number: int, fails=lambda descriptor: True):
    """-> an os.fsync that a file system answers with an error."""
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if fails(descriptor):
            raise OSError(number, os.strerror(number))
        real(descriptor)

    return fsync


def failing(number: int):
    """-> a function that always raises this error of the system."""

    def fail(*arguments: object, **others: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


# ---------------------------------------------------------------------------------- single files


@pytest.mark.parametrize("number", NOT_THERE)
@pytest.mark.parametrize("fails", [is_folder, lambda fd: not is_folder(fd), lambda fd: True])
def test_without_fsync_files_are_written_and_one_warning_says_so(
    monkeypatch, capsys, number, fails
):
    monkeypatch.setattr(os, "fsync", failing_fsync(number, fails))
    for _ in range(2):
        save_checkpoint(Path("last.pt"), CONTENT, keep_old_as=Path("previous.pt"))
    assert torch.equal(load_checkpoint(Path("last.pt"))["model"]["weight"], torch.zeros(3))
    load_checkpoint(Path("previous.pt"))
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith(FSYNC) and os.strerror(number) in said


@pytest.mark.parametrize("number", [errno.ENOLCK, *NOT_THERE])
def test_without_locks_one_warning_says_what_to_see_to(monkeypatch, capsys, number):
    monkeypatch.setattr(fcntl, "lockf", failing(number))
    lock_folder(Path())
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith(LOCK) and "no second process" in said


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EACCES])
def test_a_lock_that_another_process_holds_is_no_missing_lock(monkeypatch, number):
    monkeypatch.setattr(fcntl, "lockf", failing(number))
    with pytest.raises(BadInput, match="in use by another training process"):
        lock_folder(Path())


# -------------------------------------------------------------------------------- whole trainings


def no_fsync(number: int) -> None:
    os.fsync = failing_fsync(number)


def no_locks(number: int) -> None:
    fcntl.lockf = failing(number)


def no_links(number: int) -> None:
    os.link = failing(number)


def no_fsync_of_folders(number: int) -> None:
    os.fsync = failing_fsync(number, is_folder)


@pytest.mark.parametrize(
    ("plants", "warnings"),
    [
        pytest.param(
            [(no_fsync, errno.EINVAL), (no_locks, errno.ENOLCK), (no_links, errno.EPERM)],
            [FSYNC, LOCK],
            id="nothing of it",
        ),
        pytest.param([(no_fsync_of_folders, errno.EINVAL)], [FSYNC], id="folders", marks=slow),
        pytest.param([(no_locks, errno.ENOSYS)], [LOCK], id="locks", marks=slow),
        pytest.param([(no_links, errno.ENOTSUP)], [], id="links", marks=slow),
    ],
)
def test_a_training_goes_on_with_a_warning_each(run, undisturbed, plants, warnings):
    plant = chain(*(functools.partial(fault, number) for fault, number in plants))
    code, said = run(*SMALL, *NEW, plant=plant)
    assert code == 0, said
    assert said.count("warning: ") == len(warnings)
    assert all(said.count(warning) == 1 for warning in warnings)
    assert fingerprint(Path("run")) == undisturbed(*SMALL)


@pytest.mark.parametrize("number", [errno.EIO, errno.EROFS, errno.ESTALE])
def test_a_disk_that_fails_is_one_line_and_no_traceback(capsys, number):
    with pytest.raises(SystemExit) as end:
        exits_cleanly(failing(number))()
    assert end.value.code == 1
    said = capsys.readouterr().err
    assert said.startswith("error: the disk fails: ") and said.count("\n") == 1


def disk_fails_at(kind: str, number: int) -> None:
    """From the number-th time on, forcing this kind of file to the disk fails."""
    count = counter()

    def due(descriptor: int) -> bool:
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        kinds = {"a folder": is_folder(descriptor), "metrics": name.endswith("metrics.jsonl")}
        kinds["a checkpoint"] = ".pt." in name
        return kinds[kind] and count() >= number

    os.fsync = failing_fsync(errno.EIO, due)


@pytest.mark.parametrize(
    ("kind", "number"),
    [
        # After the first save, which is needed for resuming.
        pytest.param("a checkpoint", 2, marks=slow),
        pytest.param("metrics", 2, marks=slow),
        pytest.param("a folder", 2, marks=slow),
        pytest.param("a folder", 3, id="best.pt", marks=slow),
        pytest.param("a folder", 4, id="previous.pt", marks=slow),
    ],
)
def test_a_disk_that_fails_ends_the_run_with_one_line(run, undisturbed, kind, number):
    code, said = run(*SMALL, *NEW, plant=functools.partial(disk_fails_at, kind, number))
    assert code == 1
    assert "Traceback" not in said
    assert "Input/output error" in said.splitlines()[-1]
    assert "--resume" in said.splitlines()[-1]
    assert run(*RESUME)[0] == 0
    assert fingerprint(Path("run")) == undisturbed(*SMALL)
