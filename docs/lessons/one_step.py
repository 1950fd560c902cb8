"""Lesson 1: the first update of train.py, line by line: what each line did, and what Lightning calls at that point.

python -m docs.lessons.one_step                     takes the flags of train.py: --dim 64, --amp bf16, ...
"""

from pathlib import Path

import torch
from torch import nn

from train import token_loss
from transformer_scratch.config import load_config, settle_config
from transformer_scratch.data import BatchSampler, Task, make_datasets, make_loader, split_pairs
from transformer_scratch.model import Transformer
from transformer_scratch.optimizer import make_optimizer, make_schedule
from transformer_scratch.runtime import Processes, seed_everything

TRAIN = Path(__file__).resolve().parents[2] / "train.py"

# The methods of a LightningModule that Trainer.fit calls for one training batch, in its order (float32). Lightning
# enters optimizer_step first and runs forward and backward inside it. tests/test_lessons.py measures this list.
LIGHTNING_HOOKS = {
    "train mode": ["on_train_epoch_start"],
    "batch to the device": [
        "on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer", "on_train_batch_start",
    ],
    "autocast": ["optimizer_step", "training_step"],
    "backward": ["on_before_zero_grad", "optimizer_zero_grad", "on_before_backward", "backward", "on_after_backward"],
    "unscale before clipping": ["on_before_optimizer_step"],
    "clipping": ["configure_gradient_clipping"],
    "optimizer step": [],
    "scaler update": [],
    "schedule": ["lr_scheduler_step", "on_train_batch_end"],
    "zero_grad": [],
}  # fmt: skip


def line_of_train(tag: str) -> str:
    """The line of train.py with this tag, and its number."""
    for number, line in enumerate(TRAIN.read_text().splitlines(), start=1):
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


def main(arguments: list[str] | None = None) -> tuple[float, float]:
    """Take one step as train.py does. -> its loss and gradient norm."""
    config, _ = load_config(arguments)
    config, device, dtype, _ = settle_config(config, Processes())
    seed_everything(config.seed)
    task = Task(config.num_categories, config.seq_len)
    data, _, _ = make_datasets(task, split_pairs(task, config.holdout, config.seed), config.num_datas, config.seed)
    sampler = BatchSampler(data, config.batch_size, True, config.seed)
    model = Transformer(
        task.vocab_size, config.dim, config.num_heads, config.num_layers, config.ffn_dim, config.dropout,
        config.tie_embeddings, task.pad_id,
    ).to(device)  # fmt: skip
    parameters = list(model.parameters())
    optimizer = make_optimizer(model, config.lr, config.weight_decay, fused=dtype is not torch.float16)
    scheduler = make_schedule(optimizer, config.warmup_steps)
    autocast = torch.amp.autocast(device.type, dtype=dtype, enabled=dtype is not None)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)

    model.train()
    narrate("train mode", "dropout is on, in all modules")

    sampler.set_epoch(0)
    batch = next(iter(make_loader(sampler))).to(device)
    narrate(
        "batch to the device",
        f"source {describe(batch.source)}, decoder_input {describe(batch.decoder_input)}, on {device}",
        f"{batch.num_tokens} of the target's {batch.target.numel()} positions are tokens, the rest is padding",
    )

    logits_seen = []
    hook = model.output.register_forward_hook(lambda module, inputs, output: logits_seen.append(output))
    with autocast:
        loss = token_loss(model, batch)
    hook.remove()
    narrate(
        "autocast",
        f"weights {describe(model.output.weight)}, logits {describe(logits_seen[0])}, loss {describe(loss)}",
        f"loss {loss.item():.4f}; a guess would cost ln({task.vocab_size}) = {torch.tensor(task.vocab_size).log():.4f}",
    )

    scaler.scale(loss).backward()
    gradients = [parameter.grad for parameter in parameters]
    narrate(
        "backward",
        f"every weight has a gradient now: {len(gradients)} tensors, {mebibytes(gradients)}, as much as the weights",
        f"the loss was scaled by {scaler.get_scale():g}" if scaler.is_enabled() else "no scaling: not in fp16",
    )

    scaler.unscale_(optimizer)
    narrate("unscale before clipping", "gradients divided by the scale" if scaler.is_enabled() else "nothing to undo")

    grad_norm = nn.utils.clip_grad_norm_(parameters, config.clip_norm or torch.inf)
    after = torch.stack([gradient.norm() for gradient in gradients]).norm()
    narrate("clipping", f"gradient norm {grad_norm:.4f} before, {after:.4f} after (--clip-norm {config.clip_norm:g})")

    before = [parameter.detach().clone() for parameter in parameters]
    scaler.step(optimizer)
    moved = max((new.detach() - old).abs().max().item() for new, old in zip(parameters, before, strict=True))
    averages = [value for state in optimizer.state.values() for value in state.values() if value.dim()]
    narrate(
        "optimizer step",
        f"the weight that moved most moved by {moved:.2g}, at learning rate {scheduler.get_last_lr()[0]:.2g}",
        f"AdamW now holds two averages for each weight: {mebibytes(averages)}",
    )

    scale = scaler.get_scale()
    scaler.update()
    narrate("scaler update", f"scale {scale:g} -> {scaler.get_scale():g}" if scaler.is_enabled() else "nothing to do")

    rate = scheduler.get_last_lr()[0]
    scheduler.step()
    narrate("schedule", f"learning rate {rate:.2g} -> {scheduler.get_last_lr()[0]:.2g}, on its way to {config.lr:g}")

    optimizer.zero_grad(set_to_none=True)
    held = [parameter.grad for parameter in parameters if parameter.grad is not None]
    narrate("zero_grad", f"gradients held: {len(held)} tensors, {mebibytes(held)}")
    return loss.item(), grad_norm.item()


if __name__ == "__main__":
    main()
