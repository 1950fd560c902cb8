"""Lesson 1: the first update of train.py, line by line, and what Lightning calls at each line.

python -m docs.lessons.one_step          takes the flags of train.py: --dim 64, --amp bf16, ...
"""

import math
from pathlib import Path

import torch
from torch import nn

from train import token_loss
from transformer_scratch.batches import make_loaders
from transformer_scratch.config import load_config
from transformer_scratch.errors import exits_cleanly
from transformer_scratch.hardware import (
    AUTOCAST_TYPES,
    choose_device,
    choose_kernels,
    choose_threads,
)
from transformer_scratch.model import Transformer
from transformer_scratch.optimizer import can_fuse, make_optimizer, make_schedule
from transformer_scratch.processes import ALONE
from transformer_scratch.random_state import seed_everything

TRAIN = Path(__file__).resolve().parents[2] / "train.py"

# The methods of a LightningModule that Trainer.fit calls for one training batch, in its order
# (float32). Lightning enters optimizer_step first and runs forward and backward inside it.
# tests/test_lessons.py measures this list.
LIGHTNING_HOOKS = {
    "train mode": ["on_train_epoch_start"],
    "batch to the device": [
        "on_before_batch_transfer",
        "transfer_batch_to_device",
        "on_after_batch_transfer",
        "on_train_batch_start",
    ],
    "autocast": ["optimizer_step", "training_step"],
    "backward": [
        "on_before_zero_grad",
        "optimizer_zero_grad",
        "on_before_backward",
        "backward",
        "on_after_backward",
    ],
    "unscale before clipping": ["on_before_optimizer_step"],
    "clipping": ["configure_gradient_clipping"],
    "optimizer step": [],
    "scaler update": [],
    "schedule": ["lr_scheduler_step", "on_train_batch_end"],
    "zero_grad": [],
}


def line_of_train(tag: str) -> str:
    """The line of train.py with this tag, and its number."""
    for number, line in enumerate(TRAIN.read_text(encoding="utf-8").splitlines(), start=1):
        if f"[hidden: {tag}]" in line:
            return f"train.py:{number}  {line.split('  # [hidden')[0].strip()}"
    raise ValueError(f"train.py has no line tagged {tag}")


def narrate(tag: str, *what_it_did: str) -> None:
    print(line_of_train(tag))
    for line in what_it_did:
        print(f"    {line}")
    print(f"    Lightning: {', '.join(LIGHTNING_HOOKS[tag]) or 'in the hooks above'}\n")


def mebibytes(tensors) -> str:
    return f"{sum(tensor.nbytes for tensor in tensors) / 2**20:.2f} MiB"


def describe(tensor: torch.Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


@exits_cleanly
def main(arguments: list[str] | None = None) -> tuple[float, float]:
    """Take one step as train.py does. -> its loss and gradient norm."""
    config, task, _, _ = load_config(arguments)
    device, _ = choose_device(config.accelerator)
    choose_threads(config.dim, config.batch_size)
    seed_everything(config.seed)
    train_loader, _, _ = make_loaders(config, task, ALONE, device)
    model = Transformer.from_config(config, task)
    model.to(device)
    parameters = list(model.parameters())
    optimizer = make_optimizer(model, config.lr, config.weight_decay, can_fuse(config.amp, device))
    scheduler = make_schedule(optimizer, config.warmup_steps, config.schedule)
    dtype = AUTOCAST_TYPES[config.amp]
    autocast = torch.amp.autocast(device.type, dtype=dtype, enabled=dtype is not None)
    scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "fp16")
    choose_kernels()

    model.train()
    narrate("train mode", "dropout is on, in all modules")

    train_loader.sampler.set_epoch(0)
    batch = next(iter(train_loader)).to(device)
    source, decoder_input = describe(batch.source), describe(batch.decoder_input)
    narrate(
        "batch to the device",
        f"source {source}, decoder_input {decoder_input}, on {device}",
        f"{batch.num_tokens} of the target's {batch.target.numel()} positions are tokens, "
        "the rest is padding",
    )

    logits_seen = []
    hook = model.output.register_forward_hook(lambda *call: logits_seen.append(call[-1]))
    with autocast:
        loss = token_loss(model, batch, task.pad_id, config.label_smoothing)
    hook.remove()
    weights, logits = describe(model.output.weight), describe(logits_seen[0])
    guess = math.log(task.vocab_size)
    narrate(
        "autocast",
        f"weights {weights}, logits {logits}, loss {describe(loss)}",
        f"loss {loss.item():.4f}; a guess would cost ln({task.vocab_size}) = {guess:.4f}",
    )

    weight = batch.num_tokens / batch.mean_update_tokens
    scaler.scale(loss * weight).backward()
    gradients = [parameter.grad for parameter in parameters]
    scale = f"the loss was scaled by {scaler.get_scale():g}"
    narrate(
        "backward",
        f"weight {weight:.3f}: {batch.num_tokens} tokens, where an update of this epoch has "
        f"{batch.mean_update_tokens:.1f} on average",
        f"every weight has a gradient now: {len(gradients)} tensors, {mebibytes(gradients)}, "
        "as much as the weights",
        scale if scaler.is_enabled() else "no scaling: not in fp16",
    )

    scaler.unscale_(optimizer)
    divided = "gradients divided by the scale"
    narrate("unscale before clipping", divided if scaler.is_enabled() else "nothing to undo")

    grad_norm = nn.utils.clip_grad_norm_(parameters, config.clip_norm or math.inf)
    clipped = torch.stack([gradient.norm() for gradient in gradients]).norm()
    narrate(
        "clipping",
        f"gradient norm {grad_norm:.4f} before, {clipped:.4f} after "
        f"(--clip-norm {config.clip_norm:g})",
    )

    before = [parameter.detach().clone() for parameter in parameters]
    scaler.step(optimizer)
    moves = [new.detach() - old for new, old in zip(parameters, before, strict=True)]
    furthest = max(move.abs().max().item() for move in moves)
    averages = [
        value for state in optimizer.state.values() for value in state.values() if value.dim()
    ]
    narrate(
        "optimizer step",
        f"the weight that moved furthest moved by {furthest:.2g}, "
        f"at learning rate {scheduler.get_last_lr()[0]:.2g}",
        f"AdamW now holds two averages for each weight: {mebibytes(averages)}",
    )

    old_scale = scaler.get_scale()
    scaler.update()
    change = f"scale {old_scale:g} -> {scaler.get_scale():g}"
    narrate("scaler update", change if scaler.is_enabled() else "nothing to do")

    old_lr = scheduler.get_last_lr()[0]
    if scaler.get_scale() >= old_scale:  # otherwise the update was skipped
        scheduler.step()
    new_lr = scheduler.get_last_lr()[0]
    narrate("schedule", f"learning rate {old_lr:.2g} -> {new_lr:.2g}, on its way to {config.lr:g}")

    optimizer.zero_grad()
    held = [parameter.grad for parameter in parameters if parameter.grad is not None]
    narrate("zero_grad", f"gradients held: {len(held)} tensors, {mebibytes(held)}")
    return loss.item(), grad_norm.item()


if __name__ == "__main__":
    main()
