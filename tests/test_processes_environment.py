"""What the environment says about other processes: a line where it is wrong, a wait that ends."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist
from conftest import PROJECT, TINY
from trainings import NEW, SMALL, Training

import train as train_script

SECOND_OF_TWO = {
    "WORLD_SIZE": "2",
    "RANK": "1",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29555",
}


@pytest.fixture
def refused(monkeypatch, capsys):
    """Train with these variables; -> the one line on stderr."""

    def run(**environment: str) -> str:
        for name in (*SECOND_OF_TWO, "TORCHELASTIC_RUN_ID"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit) as end:
            train_script.main([*TINY, "--wandb", "disabled"])
        text = capsys.readouterr().err
        assert end.value.code == 2 and len(text.splitlines()) == 1, text
        assert text.startswith("error: ") and not list(Path().iterdir())
        return text

    return run


@pytest.mark.parametrize("value", ["", "x", "0", "-1", "2.0", str(10**30), " "])
def test_a_number_of_processes_that_is_none(refused, value):
    message = refused(WORLD_SIZE=value)
    assert f"WORLD_SIZE is {value!r}" in message and "unset WORLD_SIZE" in message


@pytest.mark.parametrize("name", list(SECOND_OF_TWO)[1:])
def test_variables_that_are_missing(refused, name):
    others = {key: value for key, value in SECOND_OF_TWO.items() if key != name}
    assert name in refused(**others)
    assert "RANK is not set" in refused(TORCHELASTIC_RUN_ID="x", WORLD_SIZE="1")


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("RANK", ["", "x", "2", "-1", str(10**30)]),
        ("LOCAL_RANK", ["", "x", "2", "-1"]),
        ("MASTER_PORT", ["", "x", "0", "65536", "-1"]),
        ("MASTER_ADDR", [""]),
    ],
)
def test_values_outside_their_range(refused, name, values):
    for value in values:
        assert f"{name} " in refused(**{**SECOND_OF_TWO, name: value})


def test_a_port_that_is_taken(refused):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        message = refused(**{**SECOND_OF_TWO, "RANK": "0", "MASTER_PORT": port})
    assert f"MASTER_PORT={port}" in message


def test_one_process_needs_no_rank(monkeypatch):
    """As batch systems set it for a job of one process."""
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "7")
    train_script.main([*TINY, "--wandb", "disabled", "--max-epochs", "1"])


# ------------------------------------------------------------------- Ctrl-C ends every wait


@pytest.fixture
def port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        number = free.getsockname()[1]
    yield number


def interrupted(port: int, rank: int, seconds: float = 1.5) -> tuple[int, str, float]:
    """Press Ctrl-C while a process waits for another. -> exit code, output, seconds it took."""
    environment = {**SECOND_OF_TWO, "MASTER_PORT": port, "RANK": rank}
    training = Training([*SMALL, *NEW], **environment)
    training.start()
    while not training.output.exists():  # the first one takes long to start
        time.sleep(0.05)
    training.join(seconds)
    assert training.is_alive(), training.read_output()
    started = time.monotonic()
    os.kill(training.pid, signal.SIGINT)
    try:
        code, output = training.wait()
    finally:
        training.kill()
    return code, output, time.monotonic() - started


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_while_nobody_comes(port, rank):
    code, output, seconds = interrupted(port, rank)
    assert code == 130 and seconds < 5
    assert "interrupted" in output and "Traceback" not in output


@pytest.mark.slow
def test_while_the_main_process_does_not_answer(port):
    store = dist.TCPStore("127.0.0.1", port, 2, is_master=True, wait_for_workers=False)
    code, _, seconds = interrupted(port, 1)
    assert store.check(["transformer_scratch/requests"]) and code == 130 and seconds < 5


@pytest.mark.slow
def test_while_a_process_that_came_does_not_connect(port):
    """The second process answers up to the last step of the meeting, and does no more."""

    def come() -> None:
        store = dist.TCPStore("127.0.0.1", port, 2, is_master=False)
        store = dist.PrefixStore("transformer_scratch", store)
        name = store.get(f"answer {store.add('requests', 1)}").decode()
        store.add(f"{name} joined", 1)
        came.append(store)

    came = []
    threading.Thread(target=come, daemon=True).start()
    code, _, seconds = interrupted(port, 0, seconds=5)
    assert came and code == 130 and seconds < 5


@pytest.mark.slow
def test_the_wait_is_announced_and_the_script_ends_at_once(port):
    """The real script, where Python ends as well while PyTorch still waits."""
    command = [sys.executable, str(PROJECT / "train.py"), *SMALL]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        env={**os.environ, **SECOND_OF_TWO, "MASTER_PORT": str(port)},
    )
    line = process.stderr.readline()
    assert f"waiting for the other processes at MASTER_ADDR=127.0.0.1 MASTER_PORT={port}" in line
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 130 and "Traceback" not in process.stderr.read()
