"""What a person reads before, during and after training. Only the main process speaks."""

import sys
from shlex import quote

import torch
from tqdm import tqdm

from transformer_scratch.config import Config
from transformer_scratch.data import Splits
from transformer_scratch.evaluation import Prediction, exact_match
from transformer_scratch.model import Transformer
from transformer_scratch.run_folder import RunFolder
from transformer_scratch.runtime import typed


def print_start(
    config: Config, reasons: dict[str, str], model: Transformer, splits: Splits, run: RunFolder, tracking: str
) -> None:
    """Everything that was set or chosen, with its reason."""
    if not run.is_main:
        return

    def why(name: str) -> str:
        return f" ({reasons[name]})" if name in reasons else ""

    parameters = sum(parameter.numel() for parameter in model.parameters())
    pairs = len({*splits.train, *splits.val, *splits.test})
    if splits.val == splits.train:
        data = f"{pairs} pairs, shared by training, validation and test, as in the article"
    else:
        data = f"{pairs} pairs: {len(splits.train)} trained, {len(splits.val)} validation, {len(splits.test)} test"
    heads = "1 head" if config.num_heads == 1 else f"{config.num_heads} heads"
    warmup = f", reached after {config.warmup_steps} updates" if config.warmup_steps else ""
    precision = {"off": "float32"}.get(config.amp, config.amp)
    global_batch = config.batch_size * config.accumulate * config.devices
    rows = {
        "device": f"{config.accelerator} x {config.devices}{why('device')}",
        "threads": f"{torch.get_num_threads()}{why('threads')}",
        "precision": f"{precision}{why('precision')}",
        "model": f"{parameters:,} parameters: dim {config.dim}, {heads}, "
        f"{config.num_layers} + {config.num_layers} layers, ffn_dim {config.ffn_dim}{why('ffn_dim')}",
        "data": f"{data}; seq_len {config.seq_len}{why('seq_len')}",
        "epochs": f"{config.max_epochs} of {config.num_datas:,} samples, {global_batch} an update",
        "lr": f"{config.lr:g}{why('lr')}{warmup}",
        "chance": f"a token guessed at random is right one time in {model.output.out_features}",
        "run": f"{run.path}{' (resumed)' if config.resume is not None else ''}",
        "wandb": tracking,
    }
    if "compile" in reasons:
        rows["compile"] = reasons["compile"]
    for name, value in rows.items():
        print(f"{name:<11}  {value}")
    sys.stdout.flush()


def progress_bar(total: int, done: int, run: RunFolder) -> tqdm:
    """A bar over all updates of the run, with the time left; in a pipe a line now and then, not a flicker."""
    interval = 0.2 if sys.stderr.isatty() else 15.0
    return tqdm(
        total=total, initial=done, desc="training", unit="step", disable=not run.is_main, mininterval=interval,
        dynamic_ncols=True,
    )  # fmt: skip


def print_epoch(bar: tqdm, row: dict) -> None:
    if not bar.disable:
        bar.write(
            f"epoch {row['epoch']}: train loss {row['train/loss_epoch']:.4f}, val loss {row['val/loss_epoch']:.4f}, "
            f"val exact match {row['val/exact_match']:.1%}"
        )


def print_stopped(run: RunFolder, step: int) -> None:
    if run.is_main:
        print(f"stopped after step {step}; nothing is lost. Go on with: {resume_command(run)}", flush=True)


def print_finished(run: RunFolder, config: Config) -> None:
    if run.is_main:
        epochs = "epoch" if config.max_epochs == 1 else f"{config.max_epochs} epochs"
        print(
            f"{run.path} has finished its {epochs} already. "
            f"Go further with: {resume_command(run)} --max-epochs {config.max_epochs + 4}"
        )


def resume_command(run: RunFolder) -> str:
    number = run.processes.world_size
    starter = f"{typed('torchrun')} --standalone --nproc-per-node {number}" if number > 1 else typed("python")
    return f"{starter} train.py --resume {quote(str(run.path))}"


def print_end(run: RunFolder, row: dict, predictions: dict[str, list[Prediction]]) -> None:
    """The result, where it is, and what to type next."""
    if not run.is_main:
        return
    matches = ", ".join(f"{name} {exact_match(answers):.1%}" for name, answers in predictions.items())
    print(f"exact match  {matches} of the pairs (test loss {row['test/loss_epoch']:.4f})")
    print(f"best         {run.path / 'best.pt'}")
    print(f"next         {typed('python')} evaluate.py --run {quote(str(run.path))}", flush=True)
