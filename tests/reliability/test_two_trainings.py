"""Several trainings in one process, as in a notebook: each leaves the process as it found it."""

import faulthandler
import gc
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import wandb
from trainings import NEW, SMALL, fingerprint

import train as train_script
from transformer_scratch.errors import TrainingFault
from transformer_scratch.run_folder import read_metrics

FLAGS = [*SMALL, "--max-epochs", "1"]
MASKS = ("SigBlk", "SigIgn", "SigCgt")
slow = pytest.mark.slow


def process_wide() -> dict[str, object]:
    """What a program may change for the whole process."""
    status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return {
        "signals": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "signals, as the system has them": [line for line in status if line[:6] in MASKS],
        "environment": dict(os.environ),
        "threads of PyTorch": torch.get_num_threads(),
        "precision of matrix products": torch.get_float32_matmul_precision(),
        "random numbers": (random.getstate(), bytes(torch.get_rng_state())),
        "streams": (sys.stdin, sys.stdout, sys.stderr),
        "hooks": (sys.exit, sys.excepthook, sys.unraisablehook, threading.excepthook),
        "folder": os.getcwd(),
        "open files": open_files(),
        "run of W&B": wandb.run,
    }


def open_files() -> list[str]:
    files = []
    for descriptor in Path("/proc/self/fd").iterdir():
        if descriptor.is_symlink():  # not the one that lists the folder
            files.append(os.readlink(descriptor))
    # matplotlib keeps its fonts open.
    return sorted(file for file in files if not file.endswith(".ttf"))


def changed_since(before: dict[str, object]) -> dict[str, tuple]:
    now = process_wide()
    return {name: (before[name], now[name]) for name in before if now[name] != before[name]}


@pytest.fixture(scope="module", autouse=True)
def imported(tmp_path_factory):
    """What PyTorch and W&B import late is there, and what they set then."""
    train_script.main([*FLAGS, "--run-dir", str(tmp_path_factory.mktemp("first") / "run")])


@pytest.fixture(autouse=True)
def settings_of_a_user(monkeypatch):
    """Other than main chooses."""
    monkeypatch.delenv("OMP_NUM_THREADS")
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(2)
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)


@pytest.fixture
def at_step(monkeypatch):
    """Do something in the middle of an update of the next training."""

    def at_step(step: int, act) -> None:
        original, updates = torch.nn.utils.clip_grad_norm_, iter(range(1, 10**6))

        def clip_grad_norm_(*arguments: object) -> torch.Tensor:
            if next(updates) == step:
                act()
            return original(*arguments)

        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip_grad_norm_)

    return at_step


def send(number: int):
    return lambda: os.kill(os.getpid(), number)


def fail(error: BaseException):
    def act() -> None:
        raise error

    return act


@pytest.mark.parametrize("mode", ["disabled", pytest.param("offline", marks=slow)])
@pytest.mark.parametrize(
    ("flags", "act", "code"),
    [
        pytest.param([], None, None, id="done"),
        pytest.param([], send(signal.SIGINT), 130, id="Ctrl-C"),
        pytest.param([], send(signal.SIGTERM), 143, id="SIGTERM"),
        pytest.param([], send(signal.SIGHUP), 129, id="SIGHUP"),
        pytest.param([], send(signal.SIGUSR1), 138, id="SIGUSR1"),
        pytest.param([], fail(KeyboardInterrupt()), 130, id="interrupted by another handler"),
        pytest.param([], fail(ZeroDivisionError()), 1, id="a bug"),
        pytest.param([], fail(SystemExit(5)), 5, id="sys.exit"),
        pytest.param([], fail(TrainingFault("bad numbers")), 1, id="bad numbers"),
        pytest.param(["--dim", "0"], None, 2, id="a refused flag"),
        pytest.param(["--run-dir", "taken"], None, 2, id="a refused folder"),
        pytest.param(["--help"], None, 0, id="help"),
    ],
)
def test_what_is_process_wide_is_given_back(at_step, tmp_path, capsys, mode, flags, act, code):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").touch()
    if act:
        at_step(3, act)
    before = process_wide()
    if code is None:
        train_script.main([*FLAGS, "--wandb", mode])
        assert changed_since(before) == {}
        return
    with pytest.raises(SystemExit) as end:
        train_script.main([*FLAGS, "--wandb", mode, *flags])
    assert changed_since(before) == {}, "while the traceback of the run is alive"
    assert end.value.code == code


def test_meanwhile_it_is_changed_indeed(at_step):
    during = {}
    at_step(3, lambda: during.update(changed_since(before)))
    before = process_wide()
    train_script.main(FLAGS)
    assert {"signals", "threads of PyTorch", "random numbers", "streams", "open files"} < set(
        during
    )


def test_ctrl_c_is_pythons_again(at_step):
    at_step(3, send(signal.SIGINT))
    with pytest.raises(SystemExit):
        train_script.main(FLAGS)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_that_was_ignored_at_the_start_stays_ignored(at_step, monkeypatch, number):
    """As `command &`, nohup and `trap '' USR1` start a program."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        at_step(3, send(number))
        train_script.main(FLAGS)
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_a_handler_of_a_library_in_c_stays_and_is_called(at_step, tmp_path):
    """Python cannot tell it from none. Debuggers of programs that hang are called so."""
    with open(tmp_path / "stacks.txt", "w+", encoding="utf-8") as stacks:
        faulthandler.register(signal.SIGUSR1, stacks)
        try:
            at_step(3, send(signal.SIGUSR1))
            train_script.main(FLAGS)
            os.kill(os.getpid(), signal.SIGUSR1)
        finally:
            faulthandler.unregister(signal.SIGUSR1)
        stacks.seek(0)
        assert stacks.read().count("most recent call first") >= 2


def test_a_handler_of_python_comes_back(at_step):
    heard = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        at_step(3, send(signal.SIGTERM))
        with pytest.raises(SystemExit):
            train_script.main(FLAGS)
        assert heard == []
        os.kill(os.getpid(), signal.SIGTERM)
        assert heard == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_in_another_thread_as_often_as_one_likes():
    for name in ("first", "second"):
        thread = threading.Thread(target=train_script.main, args=([*FLAGS, "--run-dir", name],))
        thread.start()
        thread.join()
    train_script.main([*FLAGS, "--run-dir", "third"])
    assert fingerprint(Path("first")) == fingerprint(Path("second")) == fingerprint(Path("third"))


LOCK = """
import fcntl, sys
fcntl.lockf(open(sys.argv[1], "a"), fcntl.LOCK_EX | fcntl.LOCK_NB)
"""


def test_a_failed_run_that_is_kept_alive_does_not_unlock_the_next(at_step):
    """A notebook keeps the last traceback, and with it all that the run had open."""
    at_step(3, fail(ZeroDivisionError()))
    kept = []
    try:
        train_script.main([*FLAGS, *NEW])
    except SystemExit as error:
        kept.append(error)
    refused = []

    def forget_and_look() -> None:
        kept.clear()
        gc.collect()
        command = [sys.executable, "-c", LOCK, "run/.lock"]
        refused.append(subprocess.run(command, stderr=subprocess.PIPE, check=False).stderr)

    at_step(3, forget_and_look)
    train_script.main(["--resume", "run"])
    assert b"BlockingIOError" in refused[0]


@slow
def test_the_rows_of_a_second_run_are_its_own(at_step):
    """The first was interrupted; W&B would go on with it."""
    at_step(3, send(signal.SIGINT))
    flags = [*FLAGS, "--wandb", "offline", "--log-every", "1"]
    with pytest.raises(SystemExit):
        train_script.main([*flags, "--run-dir", "first"])
    assert logged_steps(Path("first")) == [1, 2, 3]
    train_script.main([*flags, "--run-dir", "second"])
    assert logged_steps(Path("first")) == [1, 2, 3]
    rows = [row["step"] for row in read_metrics(Path("second")) if "train/loss_step" in row]
    assert logged_steps(Path("second")) == rows == [1, 2, 3, 4, 5, 6]


def logged_steps(run: Path) -> list[int]:
    """The updates whose loss W&B has got."""
    (folder,) = (run / "wandb").glob("offline-run-*")
    command = [Path(sys.executable).with_name("wandb"), "leet", "inspect", "--json", folder]
    lines = subprocess.run(command, capture_output=True, check=True).stdout.splitlines()
    rows = [json.loads(line).get("history", {}).get("item", {}) for line in lines]
    return [row["step"] for row in rows if "train/loss_step" in row]
