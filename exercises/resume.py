"""Exercise 6: a checkpoint from which a run resumes as if it had never stopped, bit for bit.

Check it with: python -m pytest exercises/check_resume.py
"""

import torch
from torch import nn

# RandomState().state_dict() is the state of all random generators; load_state_dict() puts it back.
from transformer_scratch.random_state import RandomState  # noqa: F401 - for you


def state_to_save(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    step: int,
) -> dict:
    """Everything that decides what the next update does.

    Tensors, numbers and strings, and dicts, lists and tuples of these.
    """
    raise NotImplementedError(
        "state_to_save is yours to write. What changes with every update? What does dropout use?"
    )


def resume_from(
    state: dict,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
) -> int:
    """Put the saved state into newly made objects. -> the number of updates done before."""
    raise NotImplementedError("resume_from is yours to write: the reverse of state_to_save")
