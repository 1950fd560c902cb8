"""The command itself: both programs, the table, the last line, the exit code."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import PROJECT, TINY

import train
from comparison import compare, train_lightning

pytestmark = pytest.mark.comparison
FORM = r"max \|loss difference\| = (\S+), weights equal = (True|False), steps = (\d+)"


def verdict(output: str) -> tuple[str, ...]:
    return re.fullmatch(FORM, output.splitlines()[-1]).groups()


@pytest.fixture
def in_this_process(monkeypatch):
    """Both programs without a start of their own, which takes longer than the training."""
    mains = {"plain": train.main, "lightning": train_lightning.main}

    def run(side: str, folder: Path, flags: list[str], devices: int) -> None:
        mains[side]([*flags, "--run-dir", str(folder / side)])

    monkeypatch.setattr(compare, "run", run)
    return run


def test_equal_runs_are_called_equal(in_this_process, capsys):
    compare.main([*TINY, "--page", "--run-dir", "both"])
    output = capsys.readouterr().out
    assert verdict(output) == ("0.0", "True", "20")
    assert "DIFFERENT" not in output
    for row in ("val/loss_epoch, epoch 1", "loss of every step", "weights at the end"):
        assert row in output
    assert "optimizer state" in output and "in the checkpoint written last" in output
    assert "20" in Path("both/page.html").read_text(encoding="utf-8")


def test_one_bit_in_one_weight_is_a_difference(in_this_process, monkeypatch, capsys):
    def run_and_flip(side: str, folder: Path, *others: object) -> None:
        in_this_process(side, folder, *others)
        if side == "lightning":
            content = torch.load(folder / "lightning/final.pt", weights_only=True)
            weight = next(iter(content["model"].values()))
            weight.view(torch.int32)[0, 0] ^= 1
            torch.save(content, folder / "lightning/final.pt")

    monkeypatch.setattr(compare, "run", run_and_flip)
    with pytest.raises(SystemExit) as stopped:
        compare.main([*TINY, "--max-epochs", "1"])
    assert stopped.value.code == 1
    assert verdict(capsys.readouterr().out) == ("0.0", "False", "10")


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--resume", "runs/some"], "--resume"),
        (["--devices", "none"], "--devices none"),
        (["--devices", "0"], "--devices 0"),
        (["--run-dir", "full"], "not an empty folder"),
        (["--dim", "7", "--num-heads", "2"], "not divisible"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(flags, reason, monkeypatch, capsys):
    monkeypatch.setattr(compare, "run", lambda *_: pytest.fail("a program was started"))
    Path("full").mkdir()
    Path("full/file").touch()
    with pytest.raises(SystemExit) as stopped:
        compare.main(flags)
    assert stopped.value.code == 2 and reason in capsys.readouterr().err
    assert os.listdir() == ["full"]


def test_a_program_that_fails_ends_the_comparison(monkeypatch, capsys):
    monkeypatch.setitem(compare.PROGRAMS, "plain", ["-c", "import sys; sys.exit(3)"])
    with pytest.raises(SystemExit) as stopped:
        compare.main(TINY)
    assert stopped.value.code == 3


@pytest.mark.slow
@pytest.mark.parametrize("devices", ["1", "2"])
def test_the_command_as_typed(devices, tmp_path):
    command = [sys.executable, "-m", "comparison.compare", *TINY, "--devices", devices]
    finished = subprocess.run(
        [*command, "--run-dir", str(tmp_path / "both")],
        cwd=PROJECT,
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr
    assert verdict(finished.stdout) == ("0.0", "True", str(20 // int(devices)))
