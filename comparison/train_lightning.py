"""The training of train.py as a user of PyTorch Lightning writes it: the same numbers, bit for bit.

    python -m comparison.train_lightning --dim 64       the flags of train.py

Settings, data, model, optimizer, schedule and decoding are those of transformer_scratch. What
differs is who runs the loop: here it is trainer.fit. Where Lightning would compute other numbers
than train.py, parity_hooks.py makes it compute the same, with one class for each difference.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import pytorch_lightning as pl
import torch
import wandb
from pytorch_lightning.callbacks import LearningRateMonitor, ModelCheckpoint, TQDMProgressBar
from pytorch_lightning.loggers import WandbLogger
from torch import Tensor
from torch.nn import functional as F

from comparison.parity_hooks import HOOKS, precision, with_hooks
from comparison.recorder import Recorder
from transformer_scratch.batches import Batch, make_loaders
from transformer_scratch.config import Config, load_config, run_name
from transformer_scratch.errors import BadInput, exits_cleanly
from transformer_scratch.evaluation import exact_match, predict
from transformer_scratch.hardware import (
    choose_device,
    choose_kernels,
    choose_threads,
    compile_model,
    keep_freed_memory,
)
from transformer_scratch.model import Transformer
from transformer_scratch.optimizer import can_fuse, make_optimizer, make_schedule
from transformer_scratch.processes import start_processes
from transformer_scratch.run_folder import RUNS
from transformer_scratch.task import Pair, Task
from transformer_scratch.tracking import choose_mode, define_axes, settings_of_run


class LitTransformer(pl.LightningModule):
    def __init__(self, config: Config, task: Task):
        super().__init__()
        self.save_hyperparameters(asdict(config))  # without it the W&B run has no configuration
        self.config, self.task = config, task
        self.model = Transformer.from_config(config, task)
        self.averaged = copy.deepcopy(self.model).requires_grad_(False) if config.average else None
        self.judged = [self.averaged or self.model]  # in a list: not a second part of this module
        if config.compile:
            compile_model(self.model)

    def configure_optimizers(self) -> dict:
        fused = can_fuse(self.config.amp, self.device)
        optimizer = make_optimizer(self.model, self.config.lr, self.config.weight_decay, fused)
        schedule = make_schedule(optimizer, self.config.warmup_steps, self.config.schedule)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step", "name": "lr"},
        }

    def token_loss(self, model: Transformer, batch: Batch, label_smoothing: float = 0.0) -> Tensor:
        logits = model(batch.source, batch.decoder_input, batch.source_is_padded)  # (B, T, V)
        return F.cross_entropy(
            logits.flatten(0, 1),
            batch.target.flatten(),
            ignore_index=self.task.pad_id,
            label_smoothing=label_smoothing,
        )

    def weight(self, batch: Batch) -> float:
        """Of a batch's mean loss in an update, so that every token of the epoch counts the same."""
        return batch.num_tokens / batch.mean_update_tokens

    # Lightning calls the three steps under autocast, with a batch that is on the device already.
    # It divides the loss by accumulate_grad_batches, scales it, runs backward, unscales and clips;
    # then come optimizer, scaler and schedule. train.py has a line for each.
    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        loss = self.token_loss(self.model, batch, self.config.label_smoothing)
        self.log_loss("train", loss, batch, prog_bar=True)
        return {"loss": loss * self.weight(batch), "token_loss": loss.detach()}

    # Before these steps Lightning switches to eval mode and gradients off, and back after them.
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log_loss("val", self.token_loss(self.judged[0], batch), batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.log_loss("test", self.token_loss(self.judged[0], batch), batch)

    def log_loss(self, split: str, loss: Tensor, batch: Batch, prog_bar: bool = False) -> None:
        """One call, two curves: <split>/loss_step, and <split>/loss_epoch, their weighted mean."""
        self.log(
            f"{split}/loss",
            loss,
            on_step=True,
            on_epoch=True,
            prog_bar=prog_bar,
            batch_size=batch.num_tokens,
            sync_dist=self.trainer.world_size > 1,
        )

    def on_validation_epoch_end(self) -> None:
        self.log_exact_match("val", self.task.splits.val[: self.task.most_answers])

    def on_test_epoch_end(self) -> None:
        self.log_exact_match("test", self.task.splits.test)

    def log_exact_match(self, split: str, pairs: list[Pair]) -> None:
        # Lightning lays autocast around the steps, and around nothing else.
        with self.trainer.precision_plugin.forward_context():
            share = exact_match(predict(self.judged[0], self.task, pairs))
        # In float64, because Lightning turns a plain number into float32.
        self.log(f"{split}/exact_match", torch.tensor(share, dtype=torch.float64))


class SameAxes(WandbLogger):
    """Draws the curves over the axes of train.py, so that W&B lays those of both on each other.

    Lightning numbers the updates from 0 while it trains, and gives the test their count.
    """

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        metrics = dict(metrics)
        split = next((name for name in ("val", "test") if f"{name}/loss_step" in metrics), None)
        if split:
            metrics[f"{split}/batch"] = step
        else:
            metrics["step"] = step if "test/loss_epoch" in metrics else step + 1
        super().log_metrics(metrics, step)


@exits_cleanly
def main(
    arguments: list[str] | None = None,
    hooks: Sequence[type] = HOOKS,
    callbacks: Sequence[pl.Callback] | None = None,
) -> Path:
    """Train and test. -> the run's folder. hooks, callbacks: what tests leave out or put in."""
    processes = start_processes()
    config, task, _, checkpoint = load_config(arguments, processes)
    if checkpoint:
        raise BadInput("--resume: the comparison trains from the start; leave it out")
    device, _ = choose_device(config.accelerator, processes.local_rank)
    choose_threads(config.dim, config.batch_size)
    keep_freed_memory()
    pl.seed_everything(config.seed)

    train_loader, val_loader, test_loader = make_loaders(config, task, processes, device)
    choose_kernels()

    module = with_hooks(LitTransformer, hooks)(config, task)
    folder = Path(config.run_dir or RUNS / f"{run_name(config)}-lightning")
    folder.mkdir(parents=True, exist_ok=True)
    recorder = Recorder(folder, processes)
    logger = SameAxes(**settings_of_run(config, folder), mode=choose_mode(config.wandb)[0])
    if processes.is_main:
        define_axes(logger.experiment)
    trainer = pl.Trainer(
        accelerator=config.accelerator,
        devices=config.devices,
        strategy="ddp" if processes.world_size > 1 else "auto",
        use_distributed_sampler=False,  # otherwise Lightning replaces our sampler with its own
        max_epochs=config.max_epochs,
        accumulate_grad_batches=config.accumulate,
        gradient_clip_val=config.clip_norm,
        log_every_n_steps=config.log_every,
        logger=logger,
        callbacks=[
            ModelCheckpoint(
                folder, "{epoch}", monitor="val/loss_epoch", save_top_k=config.save_top_k
            ),
            LearningRateMonitor(logging_interval="step"),
            TQDMProgressBar(refresh_rate=config.log_every),
            *([recorder] if callbacks is None else callbacks),
        ],
        **precision(config.amp, device.type),
    )
    trainer.fit(module, train_loader, val_loader)
    # Given a module, Lightning would test its last weights, were it not for ckpt_path.
    (results,) = trainer.test(module, test_loader, ckpt_path="best")
    if callbacks is None:
        recorder.append({"step": trainer.global_step, "epoch": config.max_epochs, **results})
    wandb.finish()  # Lightning leaves the run open
    return folder


if __name__ == "__main__":
    main()
