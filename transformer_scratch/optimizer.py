"""The optimizer and its learning rate, shared by the plain loop and its Lightning twin."""

import torch
from torch import nn


def make_optimizer(model: nn.Module, lr: float, weight_decay: float, fused: bool) -> torch.optim.AdamW:
    """AdamW with the paper's betas (section 5.3).

    fused updates all weights in one kernel. It is left out with the loss scaler, where clipping has to see gradients
    that are unscaled already.
    """
    return torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.98), weight_decay=weight_decay, fused=fused)


def warmup_factor(update: int, warmup_steps: int) -> float:
    """What the learning rate is multiplied by at this update (from 0): a linear rise to 1, then constant."""
    return min(1.0, (update + 1) / max(warmup_steps, 1))  # + 1: the first update, too, moves the weights


def make_schedule(optimizer: torch.optim.Optimizer, warmup_steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: warmup_factor(update, warmup_steps))
