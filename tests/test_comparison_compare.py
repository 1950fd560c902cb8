"""The side-by-side command itself: both programs, the table, the last line, the exit code."""

import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from conftest import PROJECT, TINY

from comparison import compare

pytestmark = pytest.mark.comparison
FORM = r"max \|loss difference\| = (\S+), weights equal = (True|False), steps = (\d+)"


def test_the_command_proves_equality_and_notices_a_difference(monkeypatch, capsys):
    command = [
        sys.executable,
        "-m",
        "comparison.compare",
        *TINY,
        "--run-dir",
        str(Path("both").absolute()),
    ]
    finished = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=240)
    assert finished.returncode == 0, finished.stderr
    assert re.fullmatch(FORM, finished.stdout.splitlines()[-1]).groups() == ("0.0", "True", "20")
    for row in (
        "milliseconds a step",
        "peak memory",
        "lines of code",
        "in the checkpoint",
        "optimizer state",
    ):
        assert row in finished.stdout
    assert Path("both/losses.png").stat().st_size > 1000

    def run_both(folder: Path, *_) -> tuple[dict, dict]:
        """What has just run, with the last bit of one weight another."""
        for side in compare.SIDES:
            shutil.copytree(Path("both") / side, folder / side, dirs_exist_ok=True)
        content = torch.load(folder / "lightning/final.pt", weights_only=True)
        weight = next(iter(content["model"].values()))
        weight.view(torch.int32)[0, 0] ^= 1
        torch.save(content, folder / "lightning/final.pt")
        return {side: defaultdict(lambda: None) for side in compare.SIDES}, {
            side: {"lines": 0, "files": 0} for side in compare.SIDES
        }

    monkeypatch.setattr(compare, "run_both", run_both)
    with pytest.raises(SystemExit) as stopped:
        compare.main([*TINY, "--run-dir", "again"])
    assert stopped.value.code == 1
    assert re.fullmatch(FORM, capsys.readouterr().out.splitlines()[-1]).groups() == (
        "0.0",
        "False",
        "20",
    )
