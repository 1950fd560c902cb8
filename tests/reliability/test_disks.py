"""A disk that is really full: a small file system in memory, mounted for the test."""

import functools
import signal
import subprocess
from pathlib import Path

import pytest
from plants import signal_at_step
from trainings import NEW, RESUME, SMALL, fingerprint

from transformer_scratch.checkpoint import load_checkpoint

pytestmark = pytest.mark.root
SAVING = ["--run-dir", "disk/run", "--save-every", "2"]


@pytest.fixture
def disk():
    """Mount a disk of some KiB on a folder, or resize it. All are gone after the test."""
    mounted = []

    def disk(kib: int, folder: str = "disk") -> None:
        options = f"size={kib}k"
        if folder in mounted:
            options = f"remount,{options}"
        Path(folder).mkdir(exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True)
        if folder not in mounted:
            mounted.append(folder)

    yield disk
    for folder in mounted:
        subprocess.run(["umount", "--lazy", folder], check=True)


def used() -> int:
    return sum(file.stat().st_blocks // 2 for file in Path("disk").rglob("*") if file.is_file())


def test_a_disk_that_fills_up_and_is_given_room_again(disk, run, undisturbed):
    """A little more room each time, so that another write is the first that fails."""
    disk(4000)
    plant = functools.partial(signal_at_step, 3, signal.SIGTERM)
    assert run(*SMALL, *SAVING, plant=plant)[0] == 143
    failures = 0
    for room in (0, 4, 8, 40, 100, 140, 180):
        disk(used() + room)
        code, output = run("--resume", "disk/run")
        if code == 0:
            break
        assert code in (1, 2)
        assert "written" in output or "disk is full" in output
        assert "Traceback" not in output
        load_checkpoint(Path("disk/run/last.pt"))
        assert not list(Path("disk/run").glob("*.pt.*"))
        failures += 1
    assert failures > 3
    disk(4000)
    assert run("--resume", "disk/run")[0] == 0
    assert fingerprint(Path("disk/run")) == undisturbed(*SMALL)


def test_no_room_for_wandb_changes_nothing(disk, run, undisturbed):
    plant = functools.partial(signal_at_step, 2, signal.SIGTERM)
    assert run(*SMALL, *NEW, plant=plant)[0] == 143
    disk(16, "run/wandb")
    code, output = run(*RESUME, "--wandb", "offline", "--log-every", "1")
    assert code == 0, output
    assert fingerprint(Path("run")) == undisturbed(*SMALL)
