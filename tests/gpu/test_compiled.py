"""--compile trains alike."""

import shlex
import shutil

import pytest
import torch
from metrics import step_losses

FLAGS = shlex.split(
    "--dim 32 --num-heads 2 --num-layers 2 --dropout 0 --num-datas 2560 --batch-size 128 "
    "--max-epochs 1 --warmup-steps 10"
)


@pytest.mark.parametrize(
    ("accelerator", "amp"),
    [
        *(pytest.param("gpu", amp, marks=pytest.mark.gpu) for amp in ("off", "fp16", "bf16")),
        pytest.param("cpu", "bf16", marks=pytest.mark.slow),  # compiling takes a CPU long
    ],
)
def test_near_the_run_that_is_not_compiled(amp, accelerator, train, capsys):
    """The compiled blocks keep numbers in float32 that otherwise are rounded to half precision."""
    torch.compiler.reset()  # so many compilations are allowed in one process
    flags = [*FLAGS, "--accelerator", accelerator, "--amp", amp]
    plain = step_losses(train(*flags))
    capsys.readouterr()
    compiled = step_losses(train(*flags, "--compile"))
    said = capsys.readouterr().out
    assert "yes: torch.compile" in said or (accelerator == "cpu" and not shutil.which("g++"))
    assert compiled[:10] == pytest.approx(plain[:10], rel=0.002)
    assert compiled == pytest.approx(plain, rel=0.02)
