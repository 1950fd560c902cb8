"""Writes what the Lightning twin computes in the form of train.py's metrics.jsonl."""

import json
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch import Tensor

from transformer_scratch.processes import Processes

EPOCH_METRICS = ("train/loss_epoch", "val/loss_epoch", "val/exact_match")


class Recorder(pl.Callback):
    """Keeps the numbers of every update on the device, and writes them at the end of the epoch."""

    def __init__(self, folder: Path, processes: Processes):
        self.folder, self.processes = folder, processes
        self.step, self.update_loss = 0, 0.0
        self.waiting: list[dict] = []
        (folder / "metrics.jsonl").unlink(missing_ok=True)

    def append(self, row: dict) -> None:
        if self.processes.is_main:
            with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self.scale = loss_scale(trainer)
        self.lr = optimizer.param_groups[0]["lr"]

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs, batch, batch_idx
    ) -> None:
        share = batch.num_tokens / batch.update_tokens
        self.update_loss = self.update_loss + outputs["token_loss"] * share
        if trainer.global_step == self.step:
            return  # gradients are still being added up
        self.step = trainer.global_step
        row = {"step": self.step, "epoch": trainer.current_epoch}
        row |= {"train/loss_step": self.update_loss, "lr": self.lr}
        row["grad_norm"] = getattr(module, "grad_norm", None)
        if loss_scale(trainer) < self.scale:
            row |= {"grad_norm": None, "skipped": True}
        self.waiting.append(row)
        self.update_loss = 0.0

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        # Reading these makes Lightning sum over the processes. On the main process its progress bar
        # has asked already, so they must come before the sum below: the order is the same for all.
        metrics = {name: trainer.callback_metrics[name].item() for name in EPOCH_METRICS}
        losses = torch.stack([row["train/loss_step"] for row in self.waiting])
        losses = self.processes.sum(losses).tolist()
        for row, loss in zip(self.waiting, losses, strict=True):
            if isinstance(row["grad_norm"], Tensor):
                row["grad_norm"] = row["grad_norm"].item()
            self.append({**row, "train/loss_step": loss})
        self.waiting = []
        self.append({"step": self.step, "epoch": trainer.current_epoch, **metrics})

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        state = {
            "model": module.model.state_dict(),
            "averaged": module.averaged.state_dict() if module.averaged else None,
            "optimizer": trainer.optimizers[0].state_dict(),
            "scheduler": trainer.lr_scheduler_configs[0].scheduler.state_dict(),
            "scaler": scaler.state_dict() if scaler else {},
            "rng": torch.get_rng_state(),
        }
        if self.processes.is_main:
            torch.save(state, self.folder / "final.pt")


def loss_scale(trainer: pl.Trainer) -> float:
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler.get_scale() if scaler else 1.0
