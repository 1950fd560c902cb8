"""Exercise 5: the training loop. What `trainer.fit` does in an epoch, in your own lines.

Check it with: python -m pytest exercises/check_loop.py
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn  # noqa: F401 - for you

from train import token_loss  # noqa: F401 - token_loss(model, batch) is the loss of a batch, on its own graph
from transformer_scratch.data import Batch


def train_epoch(
    model: nn.Module,
    batches: Iterable[Batch],
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    clip_norm: float,
) -> list[float]:
    """Train on each batch once: one update and one move of the schedule for each. -> the loss of each batch.

    Dropout must be on, the gradient's norm is clipped to clip_norm, and no gradient is left for the next batch.
    """
    raise NotImplementedError("train_epoch is yours to write: mode, loss, backward, clip, step, schedule, zero_grad")
