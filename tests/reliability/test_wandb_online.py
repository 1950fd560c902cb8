"""W&B online while its server fails: training goes on, the end comes soon, and nothing is lost.

Trainings here are real processes of train.py, in the current folder.
"""

import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.reliability.outages import (
    EPOCH,
    OUTAGE,
    PROJECT,
    RESULT,
    TRAINING,
    Watched,
    train_through,
    watch,
)
from tests.reliability.trainings import fingerprint, steps_done
from tests.wandb_server import Run, WandbServer
from transformer_scratch.checkpoint import load_checkpoint
from transformer_scratch.run_folder import read_metrics

pytestmark = pytest.mark.slow

FLAGS = [*TRAINING, "--log-every", "1"]
TRAIN = [sys.executable, str(PROJECT / "train.py")]
RUN = Path("run")
# Per update, per epoch, and at the end.
CURVES = ["train/loss_step", "lr", "grad_norm", "train/loss_epoch", "val/loss_epoch"]
CURVES += ["val/exact_match", "test/loss_epoch", "test/exact_match"]
PICTURES = {"pictures/answers", "pictures/attention_cross", "pictures/attention_self"}


@pytest.fixture
def server():
    with WandbServer() as server:
        yield server


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> tuple[Watched, dict]:
    """The same training without W&B: when it did what, and what it has come to, bit for bit."""
    folder = tmp_path_factory.mktemp("alone")
    seen = watch([*TRAIN, *FLAGS, "--wandb", "disabled"], folder, {})
    assert seen.exit_code == 0, seen.output
    return seen, fingerprint(folder / "run")


def train(
    server: WandbServer, *flags: str, on_line: Callable = lambda line, process: None
) -> Watched:
    return watch([*TRAIN, *flags], Path.cwd(), server.environment(Path("home").absolute()), on_line)


def run_id() -> str:
    return load_checkpoint(RUN / "last.pt")["wandb_id"]


def has_numbers(run: Run) -> bool:
    """Whether a run at the server has each row of metrics.jsonl once, without gaps."""
    metrics = read_metrics(RUN)
    for key in CURVES:
        assert run.curve(key) == [(row["step"], row[key]) for row in metrics if key in row], key
    steps = [row["_step"] for row in run.history]
    assert steps == sorted(set(steps))
    return True


def has_media(run: Run) -> bool:
    """Whether a run at the server has its tables, one an epoch and the last, and its pictures."""
    logged = [(key, entry) for row in run.history for key, entry in row.items()]
    media = [(key, entry["path"]) for key, entry in logged if isinstance(entry, dict)]
    epochs = len(run.curve("val/loss_epoch"))
    assert [key for key, _ in media].count("val/answers") == epochs
    assert {key for key, _ in media} == {*PICTURES, "val/answers", "test/answers"}
    assert {path for _, path in media} <= run.files.keys()
    return True


def has_all(server: WandbServer) -> bool:
    """Whether the server has one run and all of it, the best weights included."""
    assert list(server.runs) == [run_id()]
    [run] = server.runs.values()
    weights = [artifact for artifact in server.artifacts.values() if artifact.type == "model"]
    assert [artifact.files["best.pt"] for artifact in weights] == [(RUN / "best.pt").read_bytes()]
    assert all(artifact.committed for artifact in server.artifacts.values())
    assert len(run.alerts) == 1
    assert (run.complete, run.exit_code) == (True, 0)
    return has_numbers(run) and has_media(run)


def unharmed(seen: Watched, alone: tuple[Watched, dict]) -> bool:
    """Whether a training ended like one without W&B."""
    assert seen.exit_code == 0, seen.output
    assert "Traceback" not in seen.output and "panic" not in seen.output
    assert fingerprint(RUN) == alone[1]
    return True


def upload(server: WandbServer, output: str) -> None:
    """Do what a training has printed for a server that is back."""
    [command] = re.findall(
        r"^(?:warning: W&B .*|\s+upload it):\s+(\S*wandb sync .+)$", output, re.M
    )
    environment = server.environment(Path("home").absolute())
    done = watch(shlex.split(command), Path.cwd(), environment)
    assert done.exit_code == 0, done.output


# ------------------------------------------------------------------- from the middle of a training


@pytest.mark.parametrize("mode", ["refused", "hanging", 500, 429, 403])
def test_an_outage_costs_one_wait_and_the_rest_can_be_uploaded(server, alone, mode):
    seen = train_through(server, mode, Path.cwd(), "--log-every", "1")
    assert unharmed(seen, alone)

    def training_seconds(seen: Watched) -> float:
        return seen.times(RESULT)[0] - seen.times(OUTAGE)[0]

    assert training_seconds(seen) <= training_seconds(alone[0]) + 20
    assert seen.seconds_to_the_end <= 75
    server.mode = "healthy"
    upload(server, seen.output)
    assert list(server.runs) == [run_id()]
    run = server.runs[run_id()]
    assert has_numbers(run) and has_media(run)


@pytest.mark.parametrize("mode", ["refused", "hanging", 500, 429])
def test_after_an_outage_that_heals_all_arrives(server, alone, mode):
    """It begins in the middle of the training, and the program waits for its end."""

    def fail_for_a_while(line: str, process: subprocess.Popen) -> None:
        if line.startswith(OUTAGE):
            server.mode = mode
            threading.Timer(25, setattr, (server, "mode", "healthy")).start()

    seen = train(server, *FLAGS, on_line=fail_for_a_while)
    assert unharmed(seen, alone)
    assert has_all(server)
    assert "sync" not in seen.output


def test_after_an_outage_in_the_middle_all_arrives(server):
    """Training takes so long that the server is back before its end."""

    def fail_for_a_while(line: str, process: subprocess.Popen) -> None:
        if line.startswith(OUTAGE):
            server.mode = "refused"
        if line.startswith("epoch 80:"):
            server.mode = "healthy"

    seen = train(server, *FLAGS, "--max-epochs", "100", on_line=fail_for_a_while)
    assert seen.exit_code == 0, seen.output
    assert has_all(server)
    assert "sync" not in seen.output


# -------------------------------------------------------------------------------- from the start


def test_a_key_that_the_server_does_not_know(server, alone):
    server.mode = "bad key"
    seen = train(server, *FLAGS)
    assert unharmed(seen, alone)
    [line] = [line for _, line in seen.lines if line.startswith("wandb  ")]
    assert "offline" in line and "refused" in line and "key" in line
    assert "wandb login --relogin" in line
    assert not server.runs
    server.mode = "healthy"
    upload(server, seen.output)
    assert has_numbers(server.runs[run_id()])


@pytest.mark.parametrize("mode", ["refused", "hanging", 500, 429, 403, "slow start"])
def test_a_server_that_fails_from_the_start_gets_the_same_run_later(server, alone, mode):
    """A slow one makes the run, but says so when nobody waits for it any more."""
    server.mode = mode
    seen = train(server, *FLAGS)
    assert unharmed(seen, alone)
    start = f"{EPOCH}0: "
    assert seen.times(start)[0] <= alone[0].times(start)[0] + 25
    [line] = [line for _, line in seen.lines if line.startswith("wandb  ")]
    assert "offline (W&B did not answer" in line
    server.mode = "healthy"
    upload(server, seen.output)
    assert list(server.runs) == [run_id()]
    run = server.runs[run_id()]
    assert has_numbers(run) and has_media(run)


def test_offline_and_then_uploaded(server, alone):
    seen = train(server, *FLAGS, "--wandb", "offline", "--debug")
    assert unharmed(seen, alone)
    assert not server.runs
    upload(server, seen.output)
    [run] = server.runs.values()
    assert has_numbers(run) and has_media(run)
    assert run.settings["tags"] == ["debug"] and run.settings["groupName"]
    assert run.config["num_datas"] == 960
    assert run.files["code/train.py"] == (PROJECT / "train.py").read_bytes()
    assert len(run.alerts) == 1 and (run.complete, run.exit_code) == (True, 0)


# ----------------------------------------------------------------------------- SIGTERM and --resume


def stop(server: WandbServer, mode: str | int, *, epochs_before: int = 2) -> tuple[Watched, float]:
    """A training that gets SIGTERM while the server is in a mode. -> and when, by the clock."""
    times = []

    def act(line: str, process: subprocess.Popen) -> None:
        if line.startswith(OUTAGE):
            server.mode = mode
        if line.startswith(f"{EPOCH}{1 + epochs_before}: "):
            times.append(time.time())
            process.send_signal(signal.SIGTERM)

    seen = train(server, *FLAGS, on_line=act)
    assert seen.exit_code == 143, seen.output
    assert "nothing is lost" in seen.output
    return seen, times[0]


def test_stopped_and_resumed_it_is_one_run(server, alone):
    stop(server, "healthy")
    [run] = server.runs.values()
    assert (run.complete, run.exit_code) == (True, 143)
    resumed = train(server, "--resume", "run")
    assert unharmed(resumed, alone)
    assert has_all(server)


@pytest.mark.parametrize("mode", ["refused", "hanging", 500])
def test_sigterm_while_the_server_is_down(server, mode):
    """Whoever sends it soon kills."""
    seen, stopped_at = stop(server, mode)
    assert seen.ended_at - seen.times("epoch 3: ")[0] <= 10
    last = load_checkpoint(RUN / "last.pt")
    assert last["saved_at"] - stopped_at <= 2
    assert last["step"] == steps_done(RUN)


@pytest.mark.parametrize("mode", ["refused", "hanging"])
@pytest.mark.parametrize("before", [True, False], ids=["down before the stop", "after it"])
def test_resumed_while_the_server_is_down_nothing_is_missing_in_the_end(
    server, alone, mode, before
):
    stopped, _ = stop(server, mode if before else "healthy")
    server.mode = mode
    resumed = train(server, "--resume", "run")
    assert unharmed(resumed, alone)
    assert "wandb        offline" in resumed.output
    server.mode = "healthy"
    if before:
        upload(server, stopped.output)
    upload(server, resumed.output)
    assert list(server.runs) == [run_id()]
    assert has_numbers(server.runs[run_id()])


# -------------------------------------------------------------------------- several, and the twin


def test_two_processes_are_one_run(server):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc-per-node", "2", *TRAIN[1:], *FLAGS]
    seen = watch(command, Path.cwd(), server.environment(Path("home").absolute()))
    assert seen.exit_code == 0, seen.output
    assert has_all(server)


def axes(run: Run) -> dict[str, str]:
    """What a run's curves are drawn over, as it told the server; * stands for all others."""
    defined = run.config["_wandb"][
        "m"
    ]  # 1: a name, 2: a pattern, 5: the number of its axis, from 1
    names = [entry.get("1") or entry["2"] for entry in defined]
    return {
        name: names[entry["5"] - 1]
        for name, entry in zip(names, defined, strict=True)
        if "5" in entry
    }


@pytest.mark.comparison
def test_the_curves_of_the_lightning_twin_lie_on_ours(server):
    seen = train(server, *FLAGS, "--log-every", "7")
    assert seen.exit_code == 0, seen.output
    twin = [sys.executable, "-m", "comparison.train_lightning", *FLAGS, "--log-every", "7"]
    environment = {**server.environment(Path("home").absolute()), "PYTHONPATH": str(PROJECT)}
    seen = watch([*twin, "--run-dir", "lightning"], Path.cwd(), environment)
    assert seen.exit_code == 0, seen.output

    ours, theirs = server.runs.values()
    assert axes(theirs) == axes(ours) and axes(ours)["*"] == "step"
    assert theirs.settings["groupName"] == ours.settings["groupName"]
    for key in CURVES:
        if key != "grad_norm":
            assert theirs.curve(key) == ours.curve(key), key
    for split in ("val", "test"):
        key, axis = f"{split}/loss_step", f"{split}/batch"
        assert theirs.curve(key, axis) == ours.curve(key, axis) != [], key
