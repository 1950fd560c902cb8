"""Shared by all tests: they run on one thread, without W&B, and never leave a file in the project.

Tests that need comparison/requirements.txt (Lightning) are in test_comparison*.py or carry the
marker `comparison`. Without Lightning they are left out, which the last line says; with
REQUIRE_COMPARISON=1 that is an error.
"""

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PROJECT = Path(__file__).resolve().parent.parent
TINY = ["--dim=16", "--num-layers=1", "--batch-size=32", "--num-datas=320", "--max-epochs=2"]

os.environ.setdefault("WANDB_MODE", "disabled")
os.environ["WANDB_SILENT"] = "true"
os.environ["WANDB_ERROR_REPORTING"] = "false"
# A notebook's, which need not exist here: Lightning imports matplotlib, which reads it.
os.environ.pop("MPLBACKEND", None)
# Exactness needs a fixed number of threads, in subprocesses too: another number adds up sums in
# another order.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
# Signals that a job in the background ignores stay ignored in train.py: here they are to be heard.
for number, handler in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGHUP, signal.SIG_DFL),
):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, handler)
sys.path.insert(0, str(PROJECT))

without_comparison = importlib.util.find_spec("pytorch_lightning") is None
collect_ignore_glob = ["test_comparison*.py"] if without_comparison else []


def pytest_configure(config):
    # What all other tests expect is a CPU's: its precision, its messages. PyTorch has not looked
    # for a GPU yet.
    if config.option.markexpr != "gpu":  # as in make test-gpu
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if without_comparison and os.environ.get("REQUIRE_COMPARISON") == "1":
        raise pytest.UsageError(
            "REQUIRE_COMPARISON=1, but Lightning is not installed: "
            "pip install -r comparison/requirements.txt"
        )


def pytest_collection_modifyitems(config, items):
    if without_comparison:
        left_out = [item for item in items if item.get_closest_marker("comparison")]
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)


def pytest_runtest_logreport(report):
    """What a machine lacks is deselected by a marker: a skipped test is a test that did not run."""
    if report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"


def pytest_terminal_summary(terminalreporter):
    if without_comparison:
        terminalreporter.write_line(
            "the comparison with Lightning was left out: "
            "it needs pip install -r comparison/requirements.txt"
        )


@pytest.fixture(autouse=True)
def in_temporary_folder(tmp_path, monkeypatch):
    """Every test starts in an empty folder, so runs/ is its own."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def tiny() -> list[str]:
    """Flags of a training that takes a second."""
    return list(TINY)


@pytest.fixture(scope="session")
def script():
    """Run a script of the project as its user does, in the current folder. -> the process."""

    def run(
        name: str,
        *arguments: object,
        timeout: float = 120,
        cwd: Path | None = None,
        **environment: str,
    ) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, str(PROJECT / name), *map(str, arguments)],
            capture_output=True,
            encoding="utf-8",
            timeout=timeout,
            stdin=subprocess.DEVNULL,
            cwd=cwd,
            env={**os.environ, **environment},
        )

    return run


@pytest.fixture
def train():
    """Run train.py inside this process, which is quicker. -> the folder of the new run."""
    import train as train_script

    def run(*arguments: object) -> Path:
        runs = set(Path("runs").glob("*"))
        train_script.main(["--wandb", "disabled", *map(str, arguments)])
        new_runs = set(Path("runs").glob("*")) - runs
        return new_runs.pop() if new_runs else None

    return run
