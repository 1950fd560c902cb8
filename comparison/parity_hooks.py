"""Where Lightning computes other numbers than train.py: each difference is one class here, and a lesson.

With one process, `--accumulate 1` and float32 none of them is needed: then plain Lightning gives the same bits.
A test takes each one out in turn and sees the numbers part.
"""

from collections.abc import Sequence

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins import MixedPrecision
from torch import Tensor, nn

from transformer_scratch.data import Batch
from transformer_scratch.runtime import seed_everything


class TokenWeightedUpdates:
    """Every token of an update counts the same, in whichever batch or process it stands.

    Lightning divides each batch's loss by accumulate_grad_batches, a short last window included, and averages the
    processes: a mean of means, in which a token of a batch with little to predict counts more.
    """

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        share = batch.num_tokens / batch.update_tokens * self.trainer.world_size
        # Lightning is about to divide by accumulate_grad_batches: exact, there and back, for powers of two only.
        return super().training_step(batch, batch_idx) * (share * self.trainer.accumulate_grad_batches)


class ScheduleWaitsForSkippedUpdates:
    """The schedule counts updates that happened. Lightning's moves on even when fp16 overflowed and nothing was
    updated, so a warm-up is partly spent on updates that never were."""

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        self.scale = self.scaler.get_scale() if self.scaler else None

    def lr_scheduler_step(self, scheduler: torch.optim.lr_scheduler.LRScheduler, metric: None) -> None:
        if self.scaler is None or self.scaler.get_scale() >= self.scale:
            scheduler.step()


class ClipsAndKeepsTheNorm:
    """In mixed precision Lightning refuses to clip for a fused optimizer, also in bf16, where nothing is scaled.
    And it throws away the norm that clipping computes, the most telling number about a training in trouble."""

    def configure_gradient_clipping(
        self, optimizer: torch.optim.Optimizer, gradient_clip_val: float | None, gradient_clip_algorithm: str | None
    ) -> None:
        self.grad_norm = nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val or torch.inf)


class OneSeedForEachProcess:
    """Dropout differs between processes. With strategy="ddp" Lightning seeds all of them alike once more when fit
    starts, so that all processes drop the same elements."""

    def on_train_start(self) -> None:
        super().on_train_start()
        if self.trainer.world_size > 1:
            seed_everything(self.config.seed + self.trainer.global_rank)


class EpochMeansOverProcesses:
    """sync_dist averages the token counts of the processes as whole numbers and drops what is left over, so that the
    mean is off wherever the counts do not divide. Counts that are multiples of the number of processes do."""

    def log_loss(self, split: str, loss: Tensor, batch: Batch, prog_bar: bool = False) -> None:
        counted = batch._replace(num_tokens=batch.num_tokens * self.trainer.world_size)
        super().log_loss(split, loss, counted, prog_bar)


class CachedAutocast(MixedPrecision):
    """torch.autocast keeps the half-precision copy of a weight within one forward pass; Lightning 2.6.6 turns that
    off. A weight used twice, as tied embeddings are, then adds its two gradients in float32 instead of in half.

    Also: on a CPU Lightning runs bf16 when asked for fp16. With a scaler of its own it does run fp16.
    """

    def autocast_context_manager(self) -> torch.autocast:
        return torch.autocast(self.device, dtype=torch.half if self.scaler else torch.bfloat16)


HOOKS = (
    TokenWeightedUpdates,
    ScheduleWaitsForSkippedUpdates,
    ClipsAndKeepsTheNorm,
    OneSeedForEachProcess,
    EpochMeansOverProcesses,
    CachedAutocast,
)


def with_hooks(
    module_class: type[pl.LightningModule], hooks: Sequence[type], amp: str, device_type: str
) -> tuple[type[pl.LightningModule], dict]:
    """-> the module with the hooks laid over it, and the Trainer's arguments for the precision."""
    over = tuple(hook for hook in hooks if not issubclass(hook, MixedPrecision))
    module_class = type(f"Parity{module_class.__name__}", (*over, module_class), {})
    if amp == "off":
        return module_class, {"precision": "32-true"}
    precision = {"fp16": "16-mixed", "bf16": "bf16-mixed"}[amp]
    scaler = torch.amp.GradScaler(device_type) if amp == "fp16" else None
    plugin = CachedAutocast if CachedAutocast in hooks else MixedPrecision
    return module_class, {"plugins": [plugin(precision, device_type, scaler)]}
