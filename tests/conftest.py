"""Shared by all tests: they run on one thread, without W&B, and never leave a file in the project."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PROJECT = Path(__file__).resolve().parent.parent
TINY = ["--dim", "16", "--num-layers", "1", "--batch-size", "32", "--num-datas", "320", "--max-epochs", "2"]

os.environ.setdefault("WANDB_MODE", "disabled")
os.environ["WANDB_SILENT"] = "true"
os.environ["WANDB_ERROR_REPORTING"] = "false"
# Exactness needs a fixed number of threads (sums are added up in another order with another number), also in subprocesses.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
sys.path.insert(0, str(PROJECT))


@pytest.fixture(autouse=True)
def in_temporary_folder(tmp_path, monkeypatch):
    """Every test starts in an empty folder, so runs/ is its own."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def tiny() -> list[str]:
    """Flags of a training that takes a second."""
    return list(TINY)


@pytest.fixture
def script():
    """Run a script of the project as its user does, in the current folder. -> the finished process, with its output as text."""

    def run(name: str, *arguments: str, timeout: float = 120, **environment: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, str(PROJECT / name), *map(str, arguments)],
            capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL,
            env={**os.environ, **environment},
        )  # fmt: skip

    return run
