"""With deterministic kernels the Lightning twin computes what train.py does, to the last bit."""

import shlex
from pathlib import Path

import pytest

pytestmark = pytest.mark.comparison

FLAGS = shlex.split(
    "--dim 32 --num-heads 2 --num-layers 2 --num-datas 640 --batch-size 128 --max-epochs 2 "
    "--accumulate 2"
)


@pytest.mark.parametrize("amp", ["off", "fp16", "bf16"])
def test_same_numbers(amp, accelerator, deterministic, train):
    from comparison import train_lightning
    from comparison.parity import compare_runs

    flags = [*FLAGS, "--accelerator", accelerator, "--amp", amp]
    train(*flags, "--run-dir", "plain")
    train_lightning.main([*flags, "--run-dir", "lightning", "--wandb", "disabled"])
    parity = compare_runs(Path("plain"), Path("lightning"))
    assert parity.differences == []
    assert parity.holds and len(parity.losses) == 6
