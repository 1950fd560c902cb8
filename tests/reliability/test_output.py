"""The state is saved before anything is shown."""

import functools
import signal
from pathlib import Path

import pytest
from plants import act_at_output, chain, kill, signal_at_step
from trainings import NEW, SMALL

from transformer_scratch.checkpoint import load_checkpoint

SIGTERM_AT_4 = functools.partial(signal_at_step, 4, signal.SIGTERM)
slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("flags", "stop", "output", "number", "saved"),
    # output: what is shown for the number-th time when the kill comes; saved: epoch and step
    [
        # The loss is read at updates 4 and 6, and 10 and 12.
        pytest.param([], None, "the epoch is printed", 1, (1, 6), id="epoch: print"),
        pytest.param([], None, "W&B gets a row", 2, (1, 6), id="epoch: W&B", marks=slow),
        pytest.param([], SIGTERM_AT_4, "the bar moves", 4, (0, 4), id="SIGTERM: bar", marks=slow),
        pytest.param([], SIGTERM_AT_4, "the bar shows the loss", 1, (0, 4), id="SIGTERM: loss"),
        pytest.param([], SIGTERM_AT_4, "W&B gets a row", 1, (0, 4), id="SIGTERM: W&B", marks=slow),
        pytest.param(
            ["--save-every", "4"], None, "the bar shows the loss", 1, (0, 4), id="save: loss"
        ),
    ],
)
def test_the_state_is_saved_before_anything_is_shown(run, flags, stop, output, number, saved):
    plant = functools.partial(act_at_output, output, number, kill)
    code, _ = run(*SMALL, *NEW, *flags, plant=chain(plant, stop) if stop else plant)
    assert code == -signal.SIGKILL
    last = load_checkpoint(Path("run/last.pt"))
    assert (last["epoch"], last["step"]) == saved
