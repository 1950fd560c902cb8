"""Lesson 2: six classic mistakes. Each is made here on purpose, next to the right way, and measured.

python -m docs.lessons.mistakes                 all six
python -m docs.lessons.mistakes positions       one of: positions, softmax, padding, eval, leak, accumulation
"""

import math
import sys
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from docs.lessons.small_training import exact, small_model, token_loss, train_small
from docs.lessons.unseen_pairs import PyTorchStart
from transformer_scratch.data import Batch, BatchSampler, PairDataset, Task, split_pairs
from transformer_scratch.model import Transformer

TASK = Task()
SPLITS = split_pairs(TASK, holdout=0.2, seed=1)
UNSEEN = [*SPLITS.val, *SPLITS.test]
STEPS = 300


@cache
def right_model() -> tuple[Transformer, float]:
    """The model without any mistake, trained once for all lessons. -> model, last training loss."""
    model = small_model(TASK)
    return model, train_small(model, TASK, SPLITS.train, STEPS)


class PositionsAlongBatch(Transformer):
    """The encoding is meant for position t of the sequence; here it goes to row b of the batch."""

    def embed(self, ids: Tensor, embedding: nn.Embedding, start: int = 0) -> Tensor:
        rows = self.positions[: len(ids)][:, None]  # (B, 1, D) instead of (T, D)
        return self.dropout(embedding(ids) * math.sqrt(self.dim) + rows)


def positions() -> None:
    faulty = small_model(TASK, kind=PositionsAlongBatch)
    loss = train_small(faulty, TASK, SPLITS.train, STEPS)
    right, right_loss = right_model()
    question, swapped = torch.tensor([[11, 8, 4, 12]]), torch.tensor([[11, 4, 8, 12]])
    start = torch.tensor([[11]])
    with torch.inference_mode():
        changes = [(model(question, start) - model(swapped, start)).abs().max() for model in (right, faulty)]
    show("positions along the batch", "right", "faulty")
    show(f"training loss after {STEPS} steps", f"{right_loss:.3f}", f"{loss:.3f}")
    show("logits move when 8 4 becomes 4 8, by", f"{changes[0]:.2g}", f"{changes[1]:.2g}")
    show("trained pairs exact", *(f"{exact(model, TASK, SPLITS.train):.0%}" for model in (right, faulty)))


def softmax_along_time(model: Transformer, batch: Batch) -> Tensor:
    """cross_entropy takes axis 1 for the classes. In (B, T, V) that is time: tokens compete with later tokens."""
    logits = model(batch.source, batch.decoder_input)  # (B, T, V)
    return F.cross_entropy(logits, F.one_hot(batch.target, logits.size(-1)).float())


def softmax() -> None:
    faulty = small_model(TASK)
    train_small(faulty, TASK, SPLITS.train, STEPS, loss_of=softmax_along_time)
    right, _ = right_model()
    data = PairDataset(TASK, SPLITS.train)
    batch = data[next(iter(BatchSampler(data, batch_size=80)))]
    untrained = small_model(TASK).eval()
    with torch.inference_mode():
        before = [loss_of(untrained, batch).item() for loss_of in (token_loss, softmax_along_time)]
        after = [token_loss(right, batch).item(), softmax_along_time(faulty, batch).item()]
    show("softmax along time", "right", "faulty")
    show("its own loss, before -> after training", *(f"{a:.2f} -> {b:.2f}" for a, b in zip(before, after, strict=True)))
    show("trained pairs exact", *(f"{exact(model, TASK, SPLITS.train):.0%}" for model in (right, faulty)))


class NoPaddingMask(Transformer):
    """Every token also attends to the padding."""

    def encode(self, source: Tensor) -> Tensor:
        everything = torch.ones(len(source), 1, 1, source.size(1), dtype=torch.bool)
        x = self.embed(source, self.source_embedding)
        for block in self.encoder:
            x = block(x, everything)
        return x

    def forward(self, source: Tensor, decoder_input: Tensor) -> Tensor:
        return self.decode(decoder_input, self.encode(source))


def padding() -> None:
    right, _ = right_model()
    faulty = small_model(TASK, kind=NoPaddingMask).eval()
    faulty.load_state_dict(right.state_dict())  # trained on unpadded questions, where both are the same model
    data = PairDataset(TASK, SPLITS.train)
    batch = data[next(iter(BatchSampler(data, batch_size=80)))]
    show("forgotten padding mask", "right", "faulty")
    for pads in (0, 4, 12):
        source = F.pad(batch.source, (0, pads), value=TASK.pad_id)
        real = batch.target != TASK.pad_id
        with torch.inference_mode():
            hits = [(model(source, batch.decoder_input).argmax(-1) == batch.target)[real] for model in (right, faulty)]
        show(f"tokens right, {pads} pads after the question", *(f"{hit.float().mean():.0%}" for hit in hits))


def evaluation() -> None:
    right, _ = right_model()
    show("forgotten eval()", "right", "faulty")
    for attempt in range(1, 4):
        calm = exact(right, TASK, SPLITS.train)
        right.train()  # what stays on when nobody calls eval(): dropout
        shaken = exact(right, TASK, SPLITS.train)
        right.eval()
        show(f"trained pairs exact, attempt {attempt}", f"{calm:.1%}", f"{shaken:.1%}")


def leak() -> None:
    model = small_model(TASK, kind=PyTorchStart)  # it learns by heart, see lesson 3
    train_small(model, TASK, SPLITS.train, STEPS)
    torch.manual_seed(0)
    leaky = [SPLITS.train[row] for row in torch.randint(len(SPLITS.train), (20,))]
    show("leaking splits", "right", "faulty")
    show("validation pairs come from", "never trained", "the trained ones")
    show("validation exact match", f"{exact(model, TASK, UNSEEN):.0%}", f"{exact(model, TASK, leaky):.0%}")


def accumulation() -> None:
    model = small_model(TASK, dropout=0.0)
    data = PairDataset(TASK, SPLITS.train)
    by_length = sorted(range(80), key=lambda row: int(data.target_lengths[row]))  # as in a corpus sorted by length
    batches = [data[torch.tensor(rows), 0] for rows in (by_length, by_length[:40], by_length[40:])]
    total = batches[0].num_tokens

    def gradient(loss: Tensor) -> Tensor:
        model.zero_grad()
        loss.backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    whole, *halves = batches
    reference = gradient(token_loss(model, whole))
    by_tokens = gradient(sum(token_loss(model, half) * (half.num_tokens / total) for half in halves))
    by_batches = gradient(sum(token_loss(model, half) / 2 for half in halves))
    show("accumulation that averages wrongly", "right", "faulty")
    show("each half batch counts by its share of", "the tokens", "the batches")
    errors = [(g - reference).norm() / reference.norm() for g in (by_tokens, by_batches)]
    show("gradient differs from the whole batch's by", *(f"{error:.1e}" for error in errors))


def show(what: str, right: str, faulty: str) -> None:
    print(f"{what:<44}{right:<18}{faulty}")


LESSONS = {"positions": positions, "softmax": softmax, "padding": padding, "eval": evaluation, "leak": leak}
LESSONS |= {"accumulation": accumulation}

if __name__ == "__main__":
    for name in sys.argv[1:] or LESSONS:
        LESSONS[name]()
        print()
