"""Where Lightning computes other numbers than train.py: each difference is one class, and a lesson.

With one process, --accumulate 1, --average 0 and float32 none of them is needed: Lightning then
gives the same bits. A test leaves each one out in turn, and sees the numbers differ or Lightning
refuse.
"""

from collections.abc import Sequence

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins import MixedPrecision
from torch import Tensor, nn

from transformer_scratch.batches import Batch
from transformer_scratch.optimizer import average_weights
from transformer_scratch.random_state import seed_everything


class TokenWeightedUpdates:
    """Every token counts the same, whichever batch or process it is in.

    Lightning divides the loss of a batch by accumulate_grad_batches, also where the last update of
    an epoch has fewer batches, and averages over the processes: a mean of means, in which a token
    counts more the fewer tokens its batch has.
    """

    def weight(self, batch: Batch) -> float:
        return super().weight(batch) * self.trainer.world_size

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        outputs = super().training_step(batch, batch_idx)
        # The backward pass divides by this and multiplies again: exact for up to 40 batches.
        return {**outputs, "loss": outputs["loss"] * self.trainer.accumulate_grad_batches}


class ScheduleWaitsForSkippedUpdates:
    """The schedule counts the updates that happened.

    Lightning's also counts those that fp16 skipped, so a part of the warm-up is spent on nothing.
    """

    def on_train_start(self) -> None:
        super().on_train_start()
        self.scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        self.scale = self.scaler.get_scale() if self.scaler else 1.0

    def lr_scheduler_step(
        self, scheduler: torch.optim.lr_scheduler.LRScheduler, metric: None
    ) -> None:
        scale_before, self.scale = self.scale, self.scaler.get_scale() if self.scaler else 1.0
        if self.scale >= scale_before:
            scheduler.step()


class UnscalesBeforeClipping:
    """In fp16 the gradients are divided by the scale before they are clipped.

    A fused optimizer could divide them in its kernel, so Lightning leaves it to that: after the
    clipping, which then measures gradients that are 65,536 times too large.
    """

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        super().on_before_optimizer_step(optimizer)
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler and optimizer.defaults.get("fused"):
            scaler.unscale_(optimizer)


class ClipsAndKeepsTheNorm:
    """Clipping works with the fused optimizer, and the norm it computes is logged.

    In mixed precision Lightning refuses to clip for a fused optimizer: in fp16 because it has not
    unscaled the gradients, and in bf16, where nothing is scaled, too. And it throws the norm away:
    the number that shows trouble first.
    """

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None,
        gradient_clip_algorithm: str | None,
    ) -> None:
        parameters = self.trainer.precision_plugin.main_params(optimizer)
        self.grad_norm = nn.utils.clip_grad_norm_(parameters, gradient_clip_val or torch.inf)
        self.log("grad_norm", self.grad_norm)


class AveragesWeights:
    """The moving average of the weights: it is what is validated, tested and kept as best.

    Lightning has a callback for it, EMAWeightAveraging. Its decay is the same from the first update
    on, and it puts the last weights back before the exact match is counted.
    """

    updates_averaged = 0

    def on_train_batch_end(self, outputs, batch, batch_idx) -> None:
        schedule = self.lr_schedulers()
        if self.averaged and schedule.last_epoch > self.updates_averaged:
            self.updates_averaged = schedule.last_epoch
            average_weights(self.averaged, self.model, self.config.average, self.updates_averaged)


class OneSeedForEachProcess:
    """Dropout differs between processes.

    With strategy="ddp" Lightning gives all of them the same seed again when fit starts, so that
    all processes drop the same elements.
    """

    def on_train_start(self) -> None:
        super().on_train_start()
        if self.trainer.world_size > 1:
            seed_everything(self.config.seed + self.trainer.global_rank)


class EpochMeansOverProcesses:
    """The epoch's mean over several processes is exact.

    sync_dist averages the token counts of the processes as whole numbers and drops the remainder.
    Counts that are multiples of the number of processes have none. The last bit may still differ
    where that number is no power of two, as 3: the sum of the losses is divided by it, and rounded.
    """

    def log_loss(self, split: str, loss: Tensor, batch: Batch, prog_bar: bool = False) -> None:
        counted = batch._replace(num_tokens=batch.num_tokens * self.trainer.world_size)
        super().log_loss(split, loss, counted, prog_bar)


HOOKS = (
    TokenWeightedUpdates,
    ScheduleWaitsForSkippedUpdates,
    UnscalesBeforeClipping,
    ClipsAndKeepsTheNorm,
    AveragesWeights,
    OneSeedForEachProcess,
    EpochMeansOverProcesses,
)


def with_hooks(
    module_class: type[pl.LightningModule], hooks: Sequence[type]
) -> type[pl.LightningModule]:
    """The module with the hooks laid over it."""
    return type(module_class.__name__, (*hooks, module_class), {})


def precision(amp: str, device_type: str) -> dict:
    """The Trainer's arguments for --amp.

    On a CPU, asked for 16-mixed, Lightning runs bf16 with a warning; given a scaler, it runs fp16.
    """
    if amp == "fp16" and device_type == "cpu":
        return {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]}
    return {"precision": {"off": "32-true", "fp16": "16-mixed", "bf16": "bf16-mixed"}[amp]}
