"""What a training step costs around the model: fetching the batch, bookkeeping, logging, the progress bar.

    python -m benchmarks.overhead           (needs comparison/requirements.txt: Lightning)

A model so small that it hardly counts is trained by train.py, by its Lightning twin and by a Trainer with everything
switched off, in turn, in one process. The time of forward, backward, clipping and optimizer alone is taken away from
each. train.py and the twin write W&B's files (offline), unless --wandb disabled is given.
"""

import time
from dataclasses import dataclass
from typing import Literal

import torch
import tyro
from torch import nn

from benchmarks.measure import Options, interleave, number, print_table, save_json, save_picture
from benchmarks.programs import run_barebones_lightning, run_lightning, run_train, update_seconds
from train import token_loss
from transformer_scratch.data import BatchSampler, Task, make_datasets, make_loader, split_pairs
from transformer_scratch.model import Transformer
from transformer_scratch.optimizer import make_optimizer
from transformer_scratch.runtime import keep_freed_memory


@dataclass
class Arguments(Options):
    """Microseconds a step around the model: train.py, a bare Trainer, the Lightning twin."""

    updates: int = 300
    """Training steps in each run."""
    rounds: int = 9
    """Runs of each program."""
    wandb: Literal["offline", "disabled"] = "offline"
    """W&B in train.py and the twin."""


FLAGS = ["--dim", "16", "--num-layers", "1", "--batch-size", "8", "--accelerator", "cpu", "--amp", "off"]


def bare_step_seconds(updates: int) -> list[float]:
    """The same model and batches, with nothing around forward, backward, clipping and optimizer."""
    keep_freed_memory()
    task = Task()
    data = make_datasets(task, split_pairs(task, 0.2, 42), 8 * (updates + 1), 42)[0]
    batches = list(make_loader(BatchSampler(data, 8, True, 42)))
    model = Transformer(task.vocab_size, 16, 1, 1)
    parameters = list(model.parameters())
    optimizer = make_optimizer(model, 1e-3, 0.1, fused=True)
    seconds = []
    for batch in batches:
        started = time.perf_counter()
        token_loss(model, batch).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - started)
    return seconds[1:]


def typical(seconds: list[float]) -> float:
    """The median over windows of ten updates: one update in ten logs."""
    return torch.tensor(seconds).unfold(0, min(10, len(seconds)), 1).mean(dim=1).median().item()


def main(arguments: list[str] | None = None) -> None:
    options = tyro.cli(Arguments, args=arguments)
    torch.set_num_threads(options.threads or 1)  # steps this small only lose by a second thread
    updates, rounds = (5, 1) if options.quick else (options.updates, options.rounds)
    programs = {
        "train.py, all of it": lambda: typical(update_seconds(run_train, FLAGS, updates, options.wandb)),
        "Lightning, barebones": lambda: typical(update_seconds(run_barebones_lightning, FLAGS, updates)),
        "Lightning, as the twin": lambda: typical(update_seconds(run_lightning, FLAGS, updates, options.wandb)),
        "the model alone": lambda: typical(bare_step_seconds(updates)),
    }
    timings = interleave(programs, rounds, "overhead")
    alone = timings["the model alone"].median
    around = {name: (timing.median - alone) * 1e6 for name, timing in timings.items() if name != "the model alone"}
    ours = around["train.py, all of it"]
    whole = timings["train.py, all of it"].median
    rows = [
        {"program": name, "step, µs (middle half)": timing.show(1e6), "x train.py's": f"{timing.median / whole:.2f}",
         "around the model, µs": around.get(name, "-"),
         "ours is": "-" if name not in around or around[name] == ours else f"{ours / around[name]:.1f} of it"}
        for name, timing in timings.items()
    ]  # fmt: skip
    print_table("Microseconds a training step", rows)
    save_json(options, "overhead", {"step seconds": {k: v.seconds for k, v in timings.items()}, "around, µs": around})
    draw(options, around)


def draw(options: Options, around: dict[str, float]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 2.2), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(list(around), list(around.values()), color=["#2a7", "#bbb", "#888"])
    axes.bar_label(bars, [number(value) for value in around.values()], padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("microseconds a step around the model")
    save_picture(options, "overhead", figure)


if __name__ == "__main__":
    main()
