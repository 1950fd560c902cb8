"""The same training as train.py, the way a user of PyTorch Lightning writes it. Same flags, same numbers, bit for bit.

    python -m comparison.train_lightning --dim 64

What trains is shared: configuration, data, model, optimizer, schedule and decoding come from transformer_scratch.
What differs is who runs the loop: here it is `trainer.fit`. Where the two programs would compute different numbers,
parity_hooks.py makes Lightning do what train.py does, one class for each difference.
"""

from collections.abc import Sequence
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
from transformer_scratch.config import Config, load_config, run_name, settle_config
from transformer_scratch.data import Batch, BatchSampler, Splits, Task, make_datasets, make_loader, split_pairs
from transformer_scratch.errors import BadInput, exit_codes
from transformer_scratch.evaluation import exact_match, predict
from transformer_scratch.model import Transformer
from transformer_scratch.optimizer import make_optimizer, make_schedule
from transformer_scratch.runtime import RUNS, compile_model, prepare_cpu, start_processes
from transformer_scratch.tracking import choose_mode


class LitTransformer(pl.LightningModule):
    def __init__(self, config: Config, task: Task, splits: Splits):
        super().__init__()
        self.save_hyperparameters(asdict(config))  # without it the W&B run has no configuration
        self.config, self.task, self.splits = config, task, splits
        self.model = Transformer(
            task.vocab_size, config.dim, config.num_heads, config.num_layers, config.ffn_dim, config.dropout,
            config.tie_embeddings, task.pad_id,
        )  # fmt: skip
        if config.compile:
            compile_model(self.model)

    def configure_optimizers(self) -> dict:
        optimizer = make_optimizer(
            self.model, self.config.lr, self.config.weight_decay, fused=self.config.amp != "fp16"
        )
        schedule = make_schedule(optimizer, self.config.warmup_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step", "name": "lr"}}

    def token_loss(self, batch: Batch) -> Tensor:
        logits = self.model(batch.source, batch.decoder_input, batch.tokens)  # (N, V)
        return F.cross_entropy(logits, batch.target.flatten()[batch.tokens])

    # The three steps run under autocast, on a batch that is on the device already. What training_step returns is
    # divided by accumulate_grad_batches, scaled, sent backward, unscaled and clipped; then come optimizer, scaler
    # and schedule. train.py has a line for each.
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.token_loss(batch)
        self.log_loss("train", loss, batch, prog_bar=True)
        return loss

    # Before these, eval mode and no gradients; after them, every module's mode is put back as it was.
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log_loss("val", self.token_loss(batch), batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.log_loss("test", self.token_loss(batch), batch)

    def log_loss(self, split: str, loss: Tensor, batch: Batch, prog_bar: bool = False) -> None:
        """One call, two curves: <split>/loss_step, and <split>/loss_epoch, the mean weighted by batch_size."""
        self.log(
            f"{split}/loss", loss, on_step=True, on_epoch=True, prog_bar=prog_bar, batch_size=batch.num_tokens,
            sync_dist=self.trainer.world_size > 1,
        )  # fmt: skip

    def on_validation_epoch_end(self) -> None:
        self.log_exact_match("val", self.splits.val)

    def on_test_epoch_end(self) -> None:
        self.log_exact_match("test", self.splits.test)

    def log_exact_match(self, split: str, pairs: list) -> None:
        with self.trainer.precision_plugin.forward_context():  # autocast: outside of the steps nobody puts it on
            share = exact_match(predict(self.model, self.task, pairs))
        self.log(f"{split}/exact_match", torch.tensor(share, dtype=torch.float64))  # a plain number becomes float32


def main(
    arguments: list[str] | None = None, hooks: Sequence[type] = HOOKS, callbacks: Sequence[pl.Callback] | None = None
) -> Path:
    """Train and test; -> the folder of the run. hooks, callbacks: what tests leave out or put in."""
    processes = start_processes()
    config, _ = load_config(arguments, processes)
    if config.resume:
        raise BadInput("--resume: the comparison trains from the start; leave it out")
    config, device, _, _ = settle_config(config, processes)
    pl.seed_everything(config.seed)
    torch.set_float32_matmul_precision("high")
    prepare_cpu(config.dim, config.batch_size)

    task = Task(config.num_categories, config.seq_len)
    splits = split_pairs(task, config.holdout, config.seed)
    train_data, val_data, test_data = make_datasets(task, splits, config.num_datas, config.seed)
    shard = {"rank": processes.rank, "world_size": processes.world_size}
    sampler = BatchSampler(train_data, config.batch_size, True, config.seed, config.accumulate, **shard)
    train_loader = make_loader(sampler, config.num_workers, pin_memory=device.type == "cuda")
    val_loader, test_loader = (
        make_loader(BatchSampler(data, config.batch_size, **shard)) for data in (val_data, test_data)
    )

    module = with_hooks(LitTransformer, hooks)(config, task, splits)
    folder = Path(config.run_dir or RUNS / f"{run_name(config)}-lightning")
    folder.mkdir(parents=True, exist_ok=True)
    recorder = Recorder(folder, processes)
    trainer = pl.Trainer(
        accelerator=config.accelerator,
        devices=config.devices,
        strategy="ddp" if processes.world_size > 1 else "auto",
        use_distributed_sampler=False,  # otherwise Lightning puts a DistributedSampler in the place of ours
        max_epochs=config.max_epochs,
        accumulate_grad_batches=config.accumulate,
        gradient_clip_val=config.clip_norm,
        log_every_n_steps=config.log_every,
        logger=WandbLogger(
            name=run_name(config), group=run_name(config), project=config.wandb_project, save_dir=folder.absolute(),
            save_code=True, tags=["debug" if config.debug else "run"], mode=choose_mode(config.wandb)[0],
        ),
        callbacks=[
            ModelCheckpoint(folder, "{epoch}", monitor="val/loss_epoch", save_top_k=config.save_top_k),
            LearningRateMonitor(logging_interval="step"),
            TQDMProgressBar(refresh_rate=config.log_every),
            *([recorder] if callbacks is None else callbacks),
        ],
        **precision(config.amp, device.type),
    )  # fmt: skip
    trainer.fit(module, train_loader, val_loader)
    (results,) = trainer.test(module, test_loader, ckpt_path="best")  # the last weights, were it not for ckpt_path
    if callbacks is None:
        recorder.append({"step": trainer.global_step, "epoch": config.max_epochs, **results})
    wandb.finish()  # Lightning leaves the run open
    return folder


if __name__ == "__main__":
    with exit_codes():
        main()
