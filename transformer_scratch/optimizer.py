"""The optimizer and its learning rate, shared by train.py and its Lightning twin."""

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR


def make_optimizer(
    model: nn.Module, lr: float, weight_decay: float, fused: bool = True
) -> torch.optim.AdamW:
    """AdamW with the paper's betas (section 5.3).

    fused: update all weights in one kernel. Not with the loss scaler: Lightning leaves unscaling to
    a fused optimizer, which is too late for clipping.
    """
    return torch.optim.AdamW(
        model.parameters(), lr, betas=(0.9, 0.98), weight_decay=weight_decay, fused=fused
    )


def warmup_factor(update: int, warmup_steps: int) -> float:
    """The factor of the learning rate at an update, from 0: a linear rise to 1, then constant."""
    return min(1.0, (update + 1) / max(warmup_steps, 1))  # + 1: the first update must move, too


def make_schedule(optimizer: torch.optim.Optimizer, warmup_steps: int) -> LambdaLR:
    return LambdaLR(optimizer, lambda update: warmup_factor(update, warmup_steps))
