"""Lesson 4: what autocast computes in which type, why fp16 needs a scaled loss, what overflow does.

    python -m docs.lessons.mixed_precision
    python -m docs.lessons.mixed_precision --start 16     from the scale that PyTorch starts with

It runs on the CPU, which everybody has; on a GPU the same lines are only faster.
"""

import contextlib
import io
import math
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import tyro
from torch import nn

import train
from docs.lessons.small_training import one_batch, small_model, token_loss
from transformer_scratch.batches import PairDataset
from transformer_scratch.digits import Digits
from transformer_scratch.errors import BadInput, exits_cleanly
from transformer_scratch.hardware import choose_threads
from transformer_scratch.run_folder import read_metrics

TRAIN_FLAGS = ["--dim", "16", "--num-layers", "1", "--num-datas", "320", "--batch-size", "32"]
TRAIN_FLAGS += ["--amp", "fp16", "--max-epochs", "1", "--accelerator", "cpu", "--wandb", "disabled"]


@dataclass
class Arguments:
    """See what autocast and the loss scaler do."""

    start: int = 20
    """The scale starts with 2 to the power of this."""


def show_types() -> None:
    """Which operations autocast runs in half precision, and which stay in float32."""
    linear = nn.Linear(8, 8)
    print("1. under autocast(float16): matrix products in half precision, all else in float32")
    with torch.amp.autocast("cpu", dtype=torch.float16):
        product = linear(torch.randn(2, 8))
        loss = nn.functional.cross_entropy(product, torch.tensor([0, 1]))
    loss.backward()
    tensors = {
        "weights": linear.weight,
        "product": product,
        "loss": loss,
        "gradient": linear.weight.grad,
    }
    for name, tensor in tensors.items():
        print(f"   {name:<12}{str(tensor.dtype).removeprefix('torch.')}")


def show_small_gradients() -> None:
    """The smallest number above zero in fp16 is 6e-8: a smaller gradient becomes zero.

    The scaler multiplies the loss by its scale, and so every gradient.
    """
    print("\n2. one number, 1e-8, as a gradient in fp16")
    tiny = torch.tensor(1e-8)
    for scale in (1.0, 2.0**16):
        stored = (tiny * scale).half()
        unscaled = stored.float() / scale
        print(
            f"   loss scaled by {scale:<8g} stored {stored.item():<12.3g} "
            f"after unscaling {unscaled.item():.3g}"
        )


def train_through_an_overflow(start: int = 20) -> list[tuple[float, bool]]:
    """Take eight steps. -> for each the scale, and whether the weights moved."""
    print(f"\n3. eight steps with a scale that starts with 2^{start}")
    print("   step  scale     gradient norm  weights moved")
    task = Digits()
    model = small_model(task)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**start, growth_interval=3)
    batch = one_batch(PairDataset(task, task.all_pairs()))
    history = []
    for step in range(1, 9):
        scale, before = scaler.get_scale(), model.output.weight.detach().clone()
        with torch.amp.autocast("cpu", dtype=torch.float16):
            loss = token_loss(model, batch)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)  # does nothing where a gradient is inf or nan
        scaler.update()  # an overflow halves the scale, growth_interval good steps double it
        optimizer.zero_grad()
        moved = not model.output.weight.equal(before)
        history.append((scale, moved))
        power = f"2^{math.log2(scale):.0f}"
        yes_or_no = "yes" if moved else "no: skipped"
        print(f"   {step:<6}{power:<10}{grad_norm.item():<15.3g}{yes_or_no}")
    return history


def watch_train_py(start: int) -> list[dict]:
    """Run an epoch of train.py from another scale than PyTorch's. -> the first updates' metrics."""
    print(f"\n4. train.py with a scale that starts with 2^{start}: its metrics.jsonl")
    scaler = mock.patch.object(
        torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=2.0**start)
    )
    silence = io.StringIO()
    with tempfile.TemporaryDirectory() as folder:
        with scaler, contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
            train.main([*TRAIN_FLAGS, "--run-dir", folder])
        rows = read_metrics(Path(folder))[:4]
    for row in rows:
        skipped = ', "skipped": true' if row.get("skipped") else ""
        print(f'   {{"step": {row["step"]}, ..., "lr": {row["lr"]:.1e}{skipped}}}')
    return rows


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    options = tyro.cli(Arguments, args=arguments)
    if not 0 <= options.start <= 100:
        raise BadInput("--start must be from 0 to 100")
    choose_threads(dim=32, batch_size=100)
    torch.manual_seed(0)
    show_types()
    show_small_gradients()
    train_through_an_overflow(options.start)
    watch_train_py(options.start)


if __name__ == "__main__":
    main()
