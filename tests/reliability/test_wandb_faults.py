"""Weights & Biases dying, unreachable or misconfigured: one warning, and the same weights as without it."""

import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from plants import raise_at_step, signal_at_step
from test_signals import PROJECT, wait_for
from trainings import SMALL, fingerprint

pytestmark = pytest.mark.slow
FLAGS = [*SMALL, "--run-dir", "run", "--log-every", "1"]
QUIET = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}


def train_with(wandb: str, **environment: str) -> subprocess.CompletedProcess:
    home = Path("home").absolute()
    home.mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, str(PROJECT / "train.py"), *FLAGS, "--wandb", wandb],
        env={**QUIET, "HOME": str(home), **environment}, capture_output=True, text=True, timeout=200, check=False,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip


def test_its_process_killed_in_the_middle(undisturbed):
    """The service that wandb starts is a child process; the kernel may choose it when memory runs out."""
    flags = [*FLAGS, "--wandb", "offline", "--max-epochs", "40"]
    with open("output.txt", "w") as output:
        process = subprocess.Popen(
            [sys.executable, str(PROJECT / "train.py"), *flags],
            stdout=output, stderr=output, env={**QUIET, "HOME": str(Path.cwd())},
        )  # fmt: skip
    wait_for(lambda: Path("run/metrics.jsonl").exists() and b'"step": 8,' in Path("run/metrics.jsonl").read_bytes())
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    [service] = found.stdout.split()
    os.kill(int(service), signal.SIGKILL)
    assert process.wait(120) == 0
    text = Path("output.txt").read_text()
    assert text.count("warning: W&B failed") == 1
    training, end = text.split("exact match  ")
    assert "Traceback" not in training
    assert "python evaluate.py --run run" in end  # wandb itself complains once more when the interpreter ends
    assert fingerprint(Path("run")) == undisturbed(*SMALL, "--max-epochs", "40")


@pytest.mark.parametrize("mode", ["auto", "online"])
def test_no_network_at_the_start(undisturbed, mode):
    started = time.monotonic()
    done = train_with(mode, WANDB_API_KEY="0" * 40, WANDB_BASE_URL="http://127.0.0.1:9")
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - started < 120
    assert "offline" in done.stdout
    assert "Traceback" not in done.stderr
    assert list(Path("run/wandb").glob("offline-run-*"))
    assert fingerprint(Path("run")) == undisturbed(*SMALL)


@pytest.mark.parametrize("key", ["", "your-key-here"])
def test_a_key_that_is_none(undisturbed, key):
    done = train_with("auto", WANDB_API_KEY=key)
    assert done.returncode == 0, done.stderr
    assert "offline" in done.stdout
    assert fingerprint(Path("run")) == undisturbed(*SMALL)


@pytest.mark.parametrize(
    ("plant", "code"),
    [
        (functools.partial(raise_at_step, 3, ValueError("a bug")), 1),
        (functools.partial(signal_at_step, 3, signal.SIGTERM), 143),
    ],
)
def test_a_crash_and_a_stop_are_recorded_as_such(plant, code):
    """Under the real interpreter, whose end tells wandb how it went."""
    Path("driver.py").write_text(
        "import pickle, sys, torch\n"
        f"sys.path[:0] = {[str(PROJECT), str(Path(__file__).parent)]}\n"
        "import train\n"
        "from transformer_scratch.errors import exit_codes\n"
        f"pickle.loads({pickled(plant)!r})()\n"
        "with exit_codes():\n"
        f"    train.main({[*FLAGS, '--wandb', 'offline']!r})\n"
    )
    done = subprocess.run([sys.executable, "driver.py"], env=QUIET, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert ("ValueError: a bug" in done.stderr) == (code == 1)
    [tracked] = Path("run/wandb").glob("offline-run-*")
    inspect = [Path(sys.executable).with_name("wandb"), "leet", "inspect", "--json", "--summary", tracked]
    summary = subprocess.run(inspect, capture_output=True, text=True, check=True).stdout
    assert f'"exit_code":{code}' in summary.replace(" ", ""), summary


def pickled(plant: functools.partial) -> bytes:
    import pickle

    return pickle.dumps(plant)
