"""W&B dying, unreachable or misconfigured: one warning, and the same weights as without it."""

import functools
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PROJECT
from plants import raise_at_step, signal_at_step
from test_signals import wait_for_step
from trainings import NEW, SMALL, fingerprint

pytestmark = pytest.mark.slow
FLAGS = [*SMALL, *NEW, "--log-every", "1"]
# Without W&B's variables, so without an account.
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}


def train_with(wandb: str, **environment: str) -> subprocess.CompletedProcess:
    home = Path("home").absolute()
    home.mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, str(PROJECT / "train.py"), *FLAGS, "--wandb", wandb],
        env={**ENVIRONMENT, "HOME": str(home), **environment},
        capture_output=True,
        encoding="utf-8",
        timeout=200,
        check=False,
        stdin=subprocess.DEVNULL,
    )


def test_its_process_killed_in_the_middle(undisturbed):
    """W&B's service is a child process; the kernel may choose it when memory runs out."""
    flags = [*FLAGS, "--wandb", "offline", "--max-epochs", "40"]
    with open("output.txt", "w", encoding="utf-8") as output:
        process = subprocess.Popen(
            [sys.executable, str(PROJECT / "train.py"), *flags],
            stdout=output,
            stderr=output,
            env={**ENVIRONMENT, "HOME": str(Path.cwd())},
        )
    wait_for_step(8)
    command = ["pgrep", "-P", str(process.pid)]
    found = subprocess.run(command, capture_output=True, encoding="utf-8", check=True)
    [service] = found.stdout.split()
    os.kill(int(service), signal.SIGKILL)
    assert process.wait(120) == 0
    text = Path("output.txt").read_text(encoding="utf-8")
    assert text.count("warning: W&B failed") == 1
    training, end = text.split("exact match  ")
    assert "Traceback" not in training
    # W&B itself complains once more when the interpreter ends.
    assert "evaluate.py --run run" in end
    assert fingerprint(Path("run")) == undisturbed(*SMALL, "--max-epochs", "40")


@pytest.mark.parametrize("key", ["", "your-key-here"])
def test_an_unusable_key(undisturbed, key):
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
        "import pickle, sys\n"
        f"sys.path[:0] = {[str(PROJECT), str(Path(__file__).parent)]}\n"
        "import train\n"
        f"pickle.loads({pickle.dumps(plant)!r})()\n"
        f"train.main({[*FLAGS, '--wandb', 'offline']!r})\n",
        encoding="utf-8",
    )
    command = [sys.executable, "driver.py"]
    done = subprocess.run(
        command, env=ENVIRONMENT, capture_output=True, encoding="utf-8", check=False
    )
    assert done.returncode == code, done.stderr
    assert ("ValueError: a bug" in done.stderr) == (code == 1)
    [tracked] = Path("run/wandb").glob("offline-run-*")
    program = Path(sys.executable).with_name("wandb")
    command = [program, "leet", "inspect", "--json", "--summary", tracked]
    summary = subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout
    assert f'"exit_code":{code}' in summary.replace(" ", ""), summary
