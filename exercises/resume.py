"""Exercise 6: a checkpoint from which a run goes on as if it had never stopped, bit for bit.

Check it with: python -m pytest exercises/check_resume.py
"""

import torch
from torch import nn

from transformer_scratch.runtime import rng_state, set_rng_state  # noqa: F401 - the random generators, for you


def state_to_save(
    model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: torch.optim.lr_scheduler.LRScheduler, step: int
) -> dict:
    """All that decides what the next update does, as tensors, numbers, strings, lists and dicts of these."""
    raise NotImplementedError("state_to_save is yours to write. What changes with every update? What draws dropout?")


def go_on_from(
    state: dict, model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: torch.optim.lr_scheduler.LRScheduler
) -> int:
    """Put the saved state into freshly made objects. -> the number of updates done before."""
    raise NotImplementedError("go_on_from is yours to write: the other half of state_to_save")
