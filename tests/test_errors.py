"""How a program ends: one way out, one line, its exit code."""

import signal

import pytest

from transformer_scratch.errors import (
    BadInput,
    Stopped,
    TrainingFault,
    exits_cleanly,
    when_main_ends,
)


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
