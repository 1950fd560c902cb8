"""The host goes on while the GPU computes: what PyTorch's own debug mode counts as a wait."""

import pytest

from benchmarks.lib.waits import waits_of_training

FLAGS = ["--dim", "16", "--num-layers", "1", "--batch-size", "32", "--accelerator", "gpu"]


@pytest.mark.gpu
@pytest.mark.parametrize(("amp", "expected"), [("off", 0), ("bf16", 0), ("fp16", 1)])
def test_an_update_waits_for_nothing(amp, expected):
    """In fp16 once, for the scale: has this update overflowed?"""
    flags = [*FLAGS, "--amp", amp, "--log-every", "1000"]
    waits_an_update, waits = waits_of_training(flags, updates=10)
    assert waits_an_update == expected, waits.by_line
    assert waits.count > 0 or not expected
