"""How the checks run, and how they speak: they stop at the first mistake, and say it in full."""

import pytest
import torch


def pytest_configure(config):
    if not __debug__:
        raise pytest.UsageError(
            "the checks are assert statements: unset PYTHONOPTIMIZE, leave out -O"
        )
    config.option.maxfail = 1
    # The summary would repeat the message, cut off at the width of the terminal; a warning about
    # the same mistake would be a second message.
    config.option.reportchars = ""
    config.option.disable_warnings = True
    config.option.showcapture = "no"  # what other programs have logged meanwhile
    if config.option.tbstyle == "auto":
        config.option.tbstyle = "short"


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """For your lines and for train.py alike: another number of threads rounds sums differently."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # train.py then chooses none itself
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
