"""How a program ends: one way out, and the process as it was before."""

import signal

import pytest
import torch

import train as train_script
from transformer_scratch.errors import (
    BadInput,
    Stopped,
    TrainingFault,
    exits_cleanly,
    when_main_ends,
)

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def process_wide() -> tuple:
    return [signal.getsignal(number) for number in NUMBERS], torch.get_num_threads()


@pytest.fixture
def two_threads(monkeypatch):
    """As a user has them, so that a change to one thread shows."""
    monkeypatch.delenv("OMP_NUM_THREADS")
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.mark.parametrize("flags", [[], ["--run-dir", "taken"], ["--lr", "1e30"]])
def test_what_is_process_wide_is_given_back(tiny, tmp_path, two_threads, capsys, flags):
    """After a training that ends well, one that is refused, and one whose numbers go bad."""
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").touch()
    before = process_wide()
    try:
        train_script.main([*tiny, "--wandb", "disabled", "--warmup-steps", "0", *flags])
    except SystemExit as end:
        assert flags and end.code == (2 if "taken" in flags else 1)
    else:
        assert not flags
    assert process_wide() == before


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (BadInput("no such flag"), 2, "error: no such flag\n"),
        (TrainingFault("bad numbers"), 1, "error: bad numbers\n"),
        (Stopped(signal.SIGTERM, "after step 3"), 143, "stopped: after step 3\n"),
        (MemoryError(), 1, "error: out of memory."),
    ],
)
def test_a_known_end_is_one_line_and_an_exit_code(capsys, error, code, said):
    undone = []

    @exits_cleanly
    def main():
        when_main_ends(undone.append, "this")
        raise error

    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == code and undone == ["this"]
    assert capsys.readouterr().err.startswith(said)


def test_an_unknown_fault_keeps_its_traceback(capsys):
    @exits_cleanly
    def main():
        raise ValueError("a bug")

    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 1
    assert "Traceback" in (text := capsys.readouterr().err) and "ValueError: a bug" in text


def test_what_main_returns_is_returned():
    assert exits_cleanly(lambda number: number + 1)(1) == 2
