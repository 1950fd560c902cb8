"""Where Lightning computes other numbers than train.py: each difference is one class here, and a lesson.

With one process, `--accumulate 1` and float32 none of them is needed: then plain Lightning gives the same bits.
A test takes each one out in turn and sees the numbers part, or Lightning refuse.

autocast keeps the weights that it has cast until it is left. That parts the two only where a weight is multiplied twice
inside it, and none is here: both programs leave it after each batch.
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
        parameters = self.trainer.precision_plugin.main_params(optimizer)  # what Lightning's own clipping takes
        self.grad_norm = nn.utils.clip_grad_norm_(parameters, gradient_clip_val or torch.inf)
        self.log("grad_norm", self.grad_norm)


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


HOOKS = (
    TokenWeightedUpdates,
    ScheduleWaitsForSkippedUpdates,
    ClipsAndKeepsTheNorm,
    OneSeedForEachProcess,
    EpochMeansOverProcesses,
)


def with_hooks(module_class: type[pl.LightningModule], hooks: Sequence[type]) -> type[pl.LightningModule]:
    """The module with the hooks laid over it."""
    return type(module_class.__name__, (*hooks, module_class), {})


def precision(amp: str, device_type: str) -> dict:
    """The Trainer's arguments for --amp. On a CPU Lightning runs bf16 when asked for 16-mixed, with a warning; given a
    scaler of its own, it runs fp16."""
    if amp == "fp16" and device_type == "cpu":
        return {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]}
    return {"precision": {"off": "32-true", "fp16": "16-mixed", "bf16": "bf16-mixed"}[amp]}
