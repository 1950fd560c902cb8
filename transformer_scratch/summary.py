"""What a person reads before, during and after training. Only the main process speaks."""

import math
import sys

import torch
from tqdm import tqdm

from transformer_scratch.commands import path_argument, python_command, resume_command
from transformer_scratch.config import Config
from transformer_scratch.errors import Stopped, when_main_ends
from transformer_scratch.evaluation import Prediction, exact_match
from transformer_scratch.model import Transformer
from transformer_scratch.run_folder import RunFolder
from transformer_scratch.task import Task


def print_start(
    config: Config,
    reasons: dict[str, str],
    model: Transformer,
    task: Task,
    run: RunFolder,
    where_to_look: str,
) -> None:
    """Everything that was set or chosen, with its reason."""
    if not run.is_main:
        return

    def why(name: str) -> str:
        return f" ({reasons[name]})" if reasons.get(name) else ""

    parameters = sum(parameter.numel() for parameter in model.parameters())
    heads = "1 head" if config.num_heads == 1 else f"{config.num_heads} heads"
    loss = "cross-entropy"
    if config.label_smoothing:
        loss += f"; in training with label smoothing {config.label_smoothing:g}, which adds to it"
    samples_per_update = config.batch_size * config.accumulate * config.devices
    num_updates = config.max_epochs * math.ceil(task.num_samples / samples_per_update)
    lr = f"{config.lr:g}{why('lr')}"
    if config.warmup_steps:
        lr += f", reached after {config.warmup_steps} updates"
        if num_updates < config.warmup_steps:
            lr += f": never, as this run has about {num_updates}"
    if config.schedule == "inverse-sqrt":
        lr += ", then falling with the inverse square root of the updates"
    precision = "float32" if config.amp == "off" else config.amp
    rows = {
        "device": f"{config.accelerator} x {config.devices}{why('device')}",
        "threads": f"{torch.get_num_threads()}{why('threads')}",
        "precision": f"{precision}{why('precision')}",
        "model": f"{parameters:,} parameters: dim {config.dim}, {heads}, {config.num_layers} + "
        f"{config.num_layers} layers, ffn_dim {config.ffn_dim}{why('ffn_dim')}",
        **task.description(),
        "seq_len": f"{config.seq_len}{why('seq_len')}",
        "epochs": f"{config.max_epochs}{why('max_epochs')} of {task.num_samples:,} samples, "
        f"{samples_per_update} an update{why('batch_size')}",
        "lr": lr,
        "loss": loss,
        "judged": f"a moving average of the weights, of decay {config.average:g}"
        if config.average
        else "the weights as trained",
        "chance": f"a token guessed at random is right one time in {model.output.out_features}",
        "run": f"{run.path}{' (resumed)' if run.resumed else ''}",
        "wandb": where_to_look,
    }
    if "compile" in reasons:
        rows["compile"] = reasons["compile"]
    for name, value in rows.items():
        print(f"{name:<11}  {value}")
    sys.stdout.flush()


def progress_bar(total: int, done: int, run: RunFolder) -> tqdm:
    """A bar over all updates of the run, with the time left; in a pipe, a line now and then."""
    bar = tqdm(
        total=total,
        initial=done,
        desc="training",
        unit="step",
        disable=not run.is_main,
        mininterval=0.2 if sys.stderr.isatty() else 15.0,
        dynamic_ncols=True,
    )
    when_main_ends(bar.close)
    return bar


def print_epoch(run: RunFolder, bar: tqdm, row: dict) -> None:
    if run.is_main:
        bar.write(
            f"epoch {row['epoch']}: train loss {row['train/loss_epoch']:.4f}, "
            f"val loss {row['val/loss_epoch']:.4f}, "
            f"val exact match {row['val/exact_match']:.1%}"
        )


def stopped(signal_number: int, run: RunFolder, step: int) -> Stopped:
    """What to raise when a signal has stopped the run after a step."""
    kept = "nothing is lost"
    if run.saved_step < step:
        kept = f"saved is step {run.saved_step}, the others will be computed again"
    command = resume_command(run.path, run.processes.world_size)
    return Stopped(signal_number, f"after step {step}; {kept}. Resume with: {command}")


def print_finished(run: RunFolder, config: Config) -> None:
    """There is nothing left to resume."""
    if run.is_main:
        epochs = "epoch" if config.max_epochs == 1 else f"{config.max_epochs} epochs"
        command = resume_command(run.path, run.processes.world_size)
        print(
            f"{run.path} has finished its {epochs} already. "
            f"Train longer with: {command} --max-epochs {config.max_epochs + 1}"
        )


def print_end(run: RunFolder, row: dict, answers: dict[str, list[Prediction]]) -> None:
    """The result, where it is, and what to type next."""
    if not run.is_main:
        return
    shares = ", ".join(f"{name} {exact_match(given):.1%}" for name, given in answers.items())
    print(f"exact match  {shares} of the pairs (test loss {row['test/loss_epoch']:.4f})")
    print(f"best         {run.path / 'best.pt'}")
    evaluate = f"{python_command('evaluate.py')} --run {path_argument(run.path)}"
    print(f"next         {evaluate}", flush=True)
