"""Exercise 7: one update in fp16, from several batches. The loop's other half.

Half precision (fp16) knows no number between 0 and 6e-8, so small gradients would become zero, and
none above 65504, so large ones overflow to infinity. A GradScaler keeps them in between:

    scaler.scale(loss)         the loss times the scale: its gradients are that much larger
    scaler.unscale_(optimizer) divides the gradients by the scale, once an update
    scaler.step(optimizer)     optimizer.step(), unless a gradient is infinite or NaN
    scaler.update()            halves the scale after such an overflow; doubles it after a long
                               stretch without one
    scaler.get_scale()         the scale

An update that an overflow prevents is called skipped. You can tell by the scale: it has fallen.

Check it with: python -m pytest exercises/check_loss_scaler.py
"""

import torch
from torch import nn

from train import token_loss  # noqa: F401 - for you
from transformer_scratch.batches import Batch


def train_update(
    model: nn.Module,
    batches: list[Batch],
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    scaler: torch.amp.GradScaler,
    clip_norm: float,
    pad_id: int,
) -> tuple[float, bool]:
    """Make one update from the gradients of all these batches together. The model is in train mode.

    -> the norm of the gradient, unscaled and before clipping, as nn.utils.clip_grad_norm_ returns
    it, and whether the update was skipped.

    The loss is computed `with torch.amp.autocast("cpu", dtype=torch.float16)`. Each batch goes
    backward by itself, so that memory holds one at a time: as in exercise 5, token_loss(model,
    batch, pad_id) * (batch.num_tokens / batch.mean_update_tokens), but scaled. The gradients add
    up to that of the whole update. Its true norm is clipped to clip_norm. The schedule moves by
    one, but not after a skipped update. The next update starts without gradients.
    """
    raise NotImplementedError(
        "train_update is yours to write: scaled backward for each batch; then unscale, clip, step, "
        "update, schedule, zero_grad"
    )
