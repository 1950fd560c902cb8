"""A short training of a small model, for lessons that try one thing. The real one is train.py."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from transformer_scratch.batches import Batch, BatchSampler, PairDataset
from transformer_scratch.digits import Digits
from transformer_scratch.evaluation import exact_match, predict
from transformer_scratch.hardware import choose_threads
from transformer_scratch.model import Transformer
from transformer_scratch.optimizer import make_optimizer, make_schedule
from transformer_scratch.task import Pair

BATCH_SIZE = 64


def token_loss(model: Transformer, batch: Batch) -> Tensor:
    """The mean cross-entropy over the target's tokens, as in train.py."""
    logits = model(batch.source, batch.decoder_input)  # (B, T, V)
    target = batch.target.flatten()
    return F.cross_entropy(logits.flatten(0, 1), target, ignore_index=model.pad_id)


def one_batch(data: PairDataset) -> Batch:
    """All samples in one batch."""
    return data[next(iter(BatchSampler(data, batch_size=len(data))))]


def small_model(
    task: Digits, seed: int = 1, kind: type[Transformer] = Transformer, **options
) -> Transformer:
    """The default model with two layers for six: it learns the task in a third of the time."""
    torch.manual_seed(seed)
    return kind(task.vocab_size, pad_id=task.pad_id, **{"dim": 32, "num_layers": 2, **options})


def train_small(
    model: Transformer,
    task: Digits,
    pairs: list[Pair],
    steps: int,
    loss_of: Callable[[Transformer, Batch], Tensor] = token_loss,
    seed: int = 1,
    after_step: Callable[[int], object] = lambda step: None,
) -> float:
    """Train in place, on random batches of the pairs. -> the mean loss of the last 20 steps.

    after_step: called with the model in eval mode and the number of steps done.
    """
    choose_threads(model.dim, BATCH_SIZE)
    torch.manual_seed(seed)
    # From a generator of their own, so that a longer training starts as a shorter one does.
    samples = torch.Generator().manual_seed(seed)
    order = torch.randint(len(pairs), (steps * BATCH_SIZE,), generator=samples)
    data = PairDataset(task, pairs, order)
    optimizer = make_optimizer(model, lr=1.5e-3, weight_decay=0.1)
    schedule = make_schedule(optimizer, warmup_steps=100)
    losses = []
    for step, indices in enumerate(BatchSampler(data, BATCH_SIZE), start=1):
        model.train()
        loss = loss_of(model, data[indices])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        model.eval()
        after_step(step)
    return torch.stack(losses[-20:]).mean().item()


def exact(model: Transformer, task: Digits, pairs: list[Pair]) -> float:
    """The share of the pairs that the model answers without a mistake, on its own."""
    return exact_match(predict(model, task, pairs))
