"""The shortest loop that trains the model, for lessons that try one thing on a small one. The real loop is train.py."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from transformer_scratch.data import Batch, BatchSampler, Pair, PairDataset, Task
from transformer_scratch.evaluation import exact_match, predict
from transformer_scratch.model import Transformer
from transformer_scratch.optimizer import make_optimizer, make_schedule
from transformer_scratch.runtime import prepare_cpu


def token_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The mean cross-entropy over the target's tokens, as in train.py."""
    logits = model(batch.source, batch.decoder_input)  # (B, T, V)
    return F.cross_entropy(logits.flatten(0, 1), batch.target.flatten(), ignore_index=model.pad_id)


def small_model(task: Task, seed: int = 1, kind: type[Transformer] = Transformer, **options) -> Transformer:
    """The default model with two layers instead of six, which learn the task in a third of the time."""
    torch.manual_seed(seed)
    return kind(task.vocab_size, pad_id=task.pad_id, **{"dim": 32, "num_layers": 2, **options})


def train_small(
    model: Transformer, task: Task, pairs: list[Pair], steps: int, loss_of: Callable = token_loss, seed: int = 1
) -> float:
    """Train in place, in batches of 128 drawn from the pairs. -> the mean loss of the last 20 steps."""
    prepare_cpu(model.dim, 128)
    torch.manual_seed(seed)
    data = PairDataset(task, pairs, torch.randint(len(pairs), (steps * 128,)))
    optimizer = make_optimizer(model, lr=1.5e-3, weight_decay=0.1, fused=True)
    schedule = make_schedule(optimizer, warmup_steps=100)
    losses = []
    model.train()
    for item in BatchSampler(data, batch_size=128):
        loss = loss_of(model, data[item])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    model.eval()
    return torch.stack(losses[-20:]).mean().item()


def exact(model: Transformer, task: Task, pairs: list[Pair]) -> float:
    """The share of the pairs that the model answers without a mistake, by itself."""
    return exact_match(predict(model, task, pairs))
