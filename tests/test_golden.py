"""The losses of 20 fixed updates: does this machine compute what it did when they were written?

    python tests/test_golden.py       write tests/golden_losses.txt anew, after a change that is
    meant to change them

All settings are given, so no default matters. There is no dropout: its random numbers depend on the
libraries that PyTorch was built with. Sums are rounded differently by different CPUs, which moves
these losses by 2e-7 (relative). The tolerance of 1e-4 leaves room for other libraries; a fault
leaves it at once, see below.
"""

import contextlib
import io
import sys
import tempfile
from pathlib import Path

import pytest
import torch

TOLERANCE = 1e-4
FILE = Path(__file__).with_name("golden_losses.txt")
SETTINGS = (
    "--accelerator cpu --amp off --seed 1 --dim 32 --num-heads 2 --num-layers 2 --ffn-dim 128 "
    "--dropout 0 --num-categories 10 --seq-len 16 --holdout 0.2 --num-datas 2560 "
    "--batch-size 128 --max-epochs 1 --lr 0.003 "
    "--warmup-steps 10 --weight-decay 0.1 --clip-norm 1 --accumulate 1 "
    "--label-smoothing 0 --average 0 --wandb disabled"
)


def compute() -> list[float]:
    from metrics import step_losses
    from samples import trained_on_counting

    import train

    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(io.StringIO()),
        trained_on_counting(),
    ):
        train.main([*SETTINGS.split(), "--run-dir", f"{folder}/run"])
        return step_losses(Path(folder) / "run")


def read() -> list[float]:
    return [
        float(line.split()[1])
        for line in FILE.read_text(encoding="utf-8").splitlines()
        if not line.startswith("#")
    ]


@pytest.fixture(scope="module")
def losses() -> list[float]:
    return compute()


def test_the_losses_are_the_golden_ones(losses):
    golden = read()
    assert len(golden) == len(losses) == 20
    assert losses == pytest.approx(golden, rel=TOLERANCE), (
        "this machine or this code computes something else: the model, the data or the loop"
    )


def test_the_golden_losses_tell_faults_apart(losses, monkeypatch):
    """Small faults that still train: each must leave the tolerance, or the check above would
    pass over it."""

    from transformer_scratch import optimizer

    def one_update_ahead(update, *others, **named):
        return factor(update + 1, *others, **named)

    def slightly_more(parameters, norm, *others, **named):
        return clip(parameters, 1.01 * norm, *others, **named)

    clip, factor = torch.nn.utils.clip_grad_norm_, optimizer.lr_factor
    for place, fault in (
        ("transformer_scratch.optimizer.lr_factor", one_update_ahead),
        ("torch.nn.utils.clip_grad_norm_", slightly_more),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, fault)
            assert compute() != pytest.approx(losses, rel=TOLERANCE)


if __name__ == "__main__":
    import conftest  # noqa: F401 - one thread, and the project on the path

    lines = [f"{step:2d} {loss!r}\n" for step, loss in enumerate(compute(), start=1)]
    head = f"# train.py {SETTINGS}\n# update and training loss\n"
    FILE.write_text(head + "".join(lines), encoding="utf-8")
    sys.stdout.write(FILE.read_text(encoding="utf-8"))
