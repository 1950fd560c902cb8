"""Exercise 5: the training loop. What Lightning's `fit` does in an epoch, in your lines.

token_loss(model, batch, pad_id) is the mean loss over the tokens of a batch. A mean gives each
token more weight the fewer there are in its batch. So that every token counts the same, the loss
that goes backward is

    loss * (batch.num_tokens / batch.mean_update_tokens)

where mean_update_tokens is the number of tokens in an update, on average over the epoch. The loss
to report is the plain mean.

Check it with: python -m pytest exercises/check_loop.py
"""

from collections.abc import Iterable

import torch
from torch import nn

from train import token_loss  # noqa: F401 - for you
from transformer_scratch.batches import Batch


def train_epoch(
    model: nn.Module,
    batches: Iterable[Batch],
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    clip_norm: float,
    pad_id: int,
) -> list[float]:
    """Train on each batch once. -> the loss of each batch, as token_loss gives it.

    A validation has left the model in eval mode; dropout must be on. Each batch makes one update,
    by its own gradient alone, whose norm is clipped to clip_norm (nn.utils.clip_grad_norm_). Then
    the schedule moves by one.
    """
    raise NotImplementedError(
        "train_epoch is yours to write: mode, loss, backward, clip, step, schedule, zero_grad"
    )
