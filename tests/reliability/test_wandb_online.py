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
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
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


@dataclass
class Case:
    """A training that has ended, the server that it met, and the folder where it was started."""

    server: WandbServer
    folder: Path
    seen: Watched


def cases(
    make_folder: Callable[[str], Path],
    modes: list,
    run: Callable[[WandbServer, Path, str | int], Watched],
) -> Iterator[dict[str | int, Case]]:
    """A training for each mode, four at a time: most of what they take is waiting."""

    def one(mode: str | int) -> Case:
        server, folder = WandbServer(), make_folder("case")
        return Case(server, folder, run(server, folder, mode))

    with ThreadPoolExecutor(4) as pool:
        found = dict(zip(modes, pool.map(one, modes), strict=True))
    yield found
    for case in found.values():
        case.server.mode = "refused"


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
    server: WandbServer,
    *flags: str,
    on_line: Callable = lambda line, process: None,
    folder: Path | None = None,
) -> Watched:
    folder = folder or Path.cwd()
    return watch([*TRAIN, *flags], folder, server.environment(folder / "home"), on_line)


def run_id() -> str:
    return load_checkpoint(RUN / "last.pt")["wandb_id"]


def check_numbers(run: Run, resumed: bool = False) -> None:
    """A run at the server has each row of metrics.jsonl once, without gaps.

    A resumed one may have the rows of the update that was its last twice.
    """
    metrics = read_metrics(RUN)
    for key in CURVES:
        points = list(dict.fromkeys(run.curve(key))) if resumed else run.curve(key)
        assert points == [(row["step"], row[key]) for row in metrics if key in row], key
    steps = [row["_step"] for row in run.history]
    assert steps == sorted(set(steps))


def check_media(run: Run) -> None:
    """It has its tables, one an epoch and the last, and its pictures."""
    logged = [(key, entry) for row in run.history for key, entry in row.items()]
    media = [(key, entry["path"]) for key, entry in logged if isinstance(entry, dict)]
    epochs = len(run.curve("val/loss_epoch"))
    assert [key for key, _ in media].count("val/answers") == epochs
    assert {key for key, _ in media} == {*PICTURES, "val/answers", "test/answers"}
    assert {path for _, path in media} <= run.files.keys()


def check_all(server: WandbServer, resumed: bool = False) -> None:
    """The server has one run and all of it, the best weights included."""
    assert list(server.runs) == [run_id()]
    [run] = server.runs.values()
    weights = [artifact for artifact in server.artifacts.values() if artifact.type == "model"]
    assert [artifact.files["best.pt"] for artifact in weights] == [(RUN / "best.pt").read_bytes()]
    assert all(artifact.committed for artifact in server.artifacts.values())
    assert len(run.alerts) == 1
    assert (run.complete, run.exit_code) == (True, 0)
    check_numbers(run, resumed)
    check_media(run)


def check_unharmed(seen: Watched, alone: tuple[Watched, dict]) -> None:
    """A training has ended like one without W&B."""
    assert seen.exit_code == 0, seen.output
    assert "Traceback" not in seen.output and "panic" not in seen.output
    assert fingerprint(RUN) == alone[1]


def upload(server: WandbServer, output: str) -> None:
    """Do what a training has printed for a server that is back."""
    [command] = re.findall(
        r"^(?:warning: W&B .*|\s+upload it):\s+(\S*wandb sync .+)$", output, re.M
    )
    environment = server.environment(Path("home").absolute())
    done = watch(shlex.split(command), Path.cwd(), environment)
    assert done.exit_code == 0, done.output


def check_what_is_uploaded_later(case: Case) -> None:
    """What the training has printed gives a server that is back all rows, tables and pictures."""
    case.server.mode = "healthy"
    upload(case.server, case.seen.output)
    assert list(case.server.runs) == [run_id()]
    run = case.server.runs[run_id()]
    check_numbers(run)
    check_media(run)


# ------------------------------------------------------------------- from the middle of a training


OUTAGES = ["refused", "hanging", 403]
HEALED = ["refused", "hanging", 500]
SHORT_EPOCHS = "refused, with short epochs"


@pytest.fixture(scope="module")
def outages(tmp_path_factory, alone):
    """Trainings whose server fails in the middle, and never recovers."""

    def run(server: WandbServer, folder: Path, mode: str | int) -> Watched:
        if mode == SHORT_EPOCHS:
            short = ["--num-datas", "64", "--max-epochs", "300", "--save-top-k", "1"]
            return train_through(server, "refused", folder, "--log-every", "1", *short)
        return train_through(server, mode, folder, "--log-every", "1")

    yield from cases(tmp_path_factory.mktemp, [*OUTAGES, SHORT_EPOCHS], run)


@pytest.mark.parametrize("mode", OUTAGES)
def test_an_outage_costs_no_update_and_the_rest_can_be_uploaded(outages, alone, mode, monkeypatch):
    case = outages[mode]
    monkeypatch.chdir(case.folder)
    check_unharmed(case.seen, alone)

    def training_seconds(seen: Watched) -> float:
        return seen.times(RESULT)[0] - seen.times(OUTAGE)[0]

    assert training_seconds(case.seen) <= training_seconds(alone[0]) + 20
    assert case.seen.seconds_to_the_end <= 75
    check_what_is_uploaded_later(case)


@pytest.fixture(scope="module")
def healed(tmp_path_factory, alone):
    """Trainings whose server fails in the middle and is back 25 seconds later, after their end."""

    def run(server: WandbServer, folder: Path, mode: str | int) -> Watched:
        recovery = threading.Timer(25, setattr, (server, "mode", "healthy"))

        def fail_for_a_while(line: str, process: subprocess.Popen) -> None:
            if line.startswith(OUTAGE):
                server.mode = mode
                recovery.start()

        seen = train(server, *FLAGS, on_line=fail_for_a_while, folder=folder)
        recovery.cancel()
        return seen

    yield from cases(tmp_path_factory.mktemp, HEALED, run)


@pytest.mark.parametrize("mode", HEALED)
def test_after_an_outage_that_heals_all_arrives(healed, alone, mode, monkeypatch):
    case = healed[mode]
    monkeypatch.chdir(case.folder)
    check_unharmed(case.seen, alone)
    check_all(case.server)
    assert "sync" not in case.seen.output


def test_after_an_outage_in_the_middle_all_arrives(server):
    """Training takes so long that the server is back before its end."""

    def fail_for_a_while(line: str, process: subprocess.Popen) -> None:
        if line.startswith(OUTAGE):
            server.mode = "refused"
        if line.startswith("epoch 25:"):
            server.mode = "healthy"

    seen = train(server, *FLAGS, "--max-epochs", "40", on_line=fail_for_a_while)
    assert seen.exit_code == 0, seen.output
    check_all(server)
    assert "sync" not in seen.output


def test_an_outage_of_hundreds_of_short_epochs_loses_no_row(outages, monkeypatch):
    """What waits for the server, such as the tables, must not hold up the numbers behind it."""
    case = outages[SHORT_EPOCHS]
    monkeypatch.chdir(case.folder)
    assert case.seen.exit_code == 0, case.seen.output
    assert case.seen.seconds_to_the_end <= 75
    case.server.mode = "healthy"
    upload(case.server, case.seen.output)
    check_numbers(case.server.runs[run_id()])


# -------------------------------------------------------------------------------- from the start


def test_a_key_that_the_server_does_not_know(server, alone):
    server.mode = "bad key"
    seen = train(server, *FLAGS)
    check_unharmed(seen, alone)
    [line] = [line for _, line in seen.lines if line.startswith("wandb  ")]
    assert "offline" in line and "refused" in line and "key" in line
    assert "wandb login --relogin" in line
    assert not server.runs
    server.mode = "healthy"
    upload(server, seen.output)
    check_numbers(server.runs[run_id()])


FAILS_AT_THE_START = ["refused", "hanging", "slow start"]


@pytest.fixture(scope="module")
def started(tmp_path_factory, alone):
    """Trainings whose server fails from the start."""

    def run(server: WandbServer, folder: Path, mode: str | int) -> Watched:
        server.mode = mode
        return train(server, *FLAGS, folder=folder)

    yield from cases(tmp_path_factory.mktemp, FAILS_AT_THE_START, run)


@pytest.mark.parametrize("mode", FAILS_AT_THE_START)
def test_a_server_that_fails_from_the_start_gets_the_same_run_later(
    started, alone, mode, monkeypatch
):
    """A slow one makes the run, but says so when nobody waits for it any more."""
    case = started[mode]
    monkeypatch.chdir(case.folder)
    check_unharmed(case.seen, alone)
    waited = case.seen.times(EPOCH)[0] - alone[0].times(EPOCH)[0]
    assert waited <= 40, "20 seconds, and some to start three programs and W&B twice"
    [line] = [line for _, line in case.seen.lines if line.startswith("wandb  ")]
    assert "offline (W&B did not answer" in line
    check_what_is_uploaded_later(case)


def test_offline_and_then_uploaded(server, alone):
    seen = train(server, *FLAGS, "--wandb", "offline", "--debug")
    check_unharmed(seen, alone)
    assert not server.runs
    upload(server, seen.output)
    [run] = server.runs.values()
    check_numbers(run)
    check_media(run)
    assert run.settings["tags"] == ["debug"] and run.settings["groupName"]
    assert run.config["num_datas"] == 960
    assert run.files["code/train.py"] == (PROJECT / "train.py").read_bytes()
    assert len(run.alerts) == 1 and (run.complete, run.exit_code) == (True, 0)


# ----------------------------------------------------------------------------- SIGTERM and --resume


def stop(server: WandbServer, mode: str) -> tuple[Watched, float]:
    """A training that gets SIGTERM two epochs after a change of mode. -> and when, by the clock."""
    times = []

    def act(line: str, process: subprocess.Popen) -> None:
        if line.startswith(OUTAGE):
            server.mode = mode
        if line.startswith("epoch 3: "):
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
    check_unharmed(resumed, alone)
    check_all(server, resumed=True)


@pytest.mark.parametrize("mode", ["refused", "hanging"])
def test_sigterm_while_the_server_is_down(server, mode):
    """Whoever sends it soon kills."""
    seen, stopped_at = stop(server, mode)
    assert seen.ended_at - seen.times("epoch 3: ")[0] <= 10
    last = load_checkpoint(RUN / "last.pt")
    assert last["saved_at"] - stopped_at <= 2
    assert last["step"] == steps_done(RUN)


@pytest.mark.parametrize("before", ["refused", "healthy"])
def test_resumed_while_the_server_is_down_nothing_is_missing_in_the_end(server, alone, before):
    stop(server, before)
    server.mode = "hanging"
    resumed = train(server, "--resume", "run")
    check_unharmed(resumed, alone)
    assert "wandb        offline" in resumed.output
    server.mode = "healthy"
    upload(server, resumed.output)  # both parts: its command names them
    assert list(server.runs) == [run_id()]
    check_numbers(server.runs[run_id()])


# -------------------------------------------------------------------------- several, and the twin


def test_two_processes_are_one_run(server):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc-per-node", "2", *TRAIN[1:], *FLAGS]
    seen = watch(command, Path.cwd(), server.environment(Path("home").absolute()))
    assert seen.exit_code == 0, seen.output
    check_all(server)


def axes(run: Run) -> dict[str, str]:
    """What a run's curves are drawn over, as it told the server; * stands for all others."""
    # 1: a name, 2: a pattern, 5: the place of its axis in this list, from 1
    defined = run.config["_wandb"]["m"]
    names = [entry.get("1") or entry["2"] for entry in defined]
    return {
        name: names[entry["5"] - 1]
        for name, entry in zip(names, defined, strict=True)
        if "5" in entry
    }


@pytest.mark.comparison
def test_the_curves_of_the_lightning_twin_lie_on_ours(server):
    seen = train(server, *FLAGS, "--log-every", "10")
    assert seen.exit_code == 0, seen.output
    twin = [sys.executable, "-m", "comparison.train_lightning", *FLAGS, "--log-every", "10"]
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
