"""The optimizer, its learning rate and the average of the weights: train.py's and its twin's."""

import math

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import get_ema_multi_avg_fn


def make_optimizer(
    model: nn.Module, lr: float, weight_decay: float, fused: bool = True
) -> torch.optim.AdamW:
    """AdamW with the paper's betas (section 5.3).

    fused: update all weights in one kernel, which also skips the update where the loss scaler has
    found an overflow, without asking the host.
    """
    return torch.optim.AdamW(
        model.parameters(), lr, betas=(0.9, 0.98), weight_decay=weight_decay, fused=fused
    )


def can_fuse(amp: str, device: torch.device) -> bool:
    """Whether the fused kernel may be used: on Apple's GPUs it does not heed the loss scaler."""
    return (amp, device.type) != ("fp16", "mps")


def lr_factor(update: int, warmup_steps: int, schedule: str = "constant") -> float:
    """The factor of the learning rate at an update, counted from 0.

    A linear rise to 1 over the warm-up, then constant, or falling with the inverse square root of
    the number of updates: equation (3), whose peak is 1 here instead of (dim x warmup)^-0.5.
    """
    warmup, update = max(warmup_steps, 1), update + 1  # the first update must move, too
    if update < warmup:
        return update / warmup
    return math.sqrt(warmup / update) if schedule == "inverse-sqrt" else 1.0


def make_schedule(
    optimizer: torch.optim.Optimizer, warmup_steps: int, schedule: str = "constant"
) -> LambdaLR:
    return LambdaLR(optimizer, lambda update: lr_factor(update, warmup_steps, schedule))


def average_weights(averaged: nn.Module, model: nn.Module, decay: float, updates: int) -> None:
    """Move the averaged weights towards the model's (section 6.1 averages the last checkpoints).

    A moving average over about 1 / (1 - decay) updates. updates: those done so far. While they are
    few the decay is smaller, so that the first weights are soon forgotten.
    """
    average = get_ema_multi_avg_fn(min(decay, updates / (10 + updates)))
    average(list(averaged.parameters()), list(model.parameters()), updates)
