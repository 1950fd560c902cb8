"""A training on the CPU leaves the machine's GPU alone: another program may need all of it."""

import os
import subprocess
import sys

import pytest
from conftest import PROJECT, TINY

CODE = """
import sys, torch, train, evaluate
train.main(sys.argv[1:])
evaluate.main(["--accelerator", "cpu", "--no-pictures"])
sys.exit(3 if torch.cuda.is_initialized() else 0)
"""


@pytest.mark.gpu
def test_cuda_is_not_started():
    command = [sys.executable, "-c", CODE, *TINY, "--accelerator", "cpu", "--wandb", "disabled"]
    done = subprocess.run(
        command,
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
    )
    assert done.returncode == 0, done.stderr
