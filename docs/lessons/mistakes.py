"""Lesson 2: six classic mistakes, each made here on purpose and measured beside the right way.

python -m docs.lessons.mistakes                 all six
python -m docs.lessons.mistakes positions       one of: positions, softmax, padding, eval, leak,
                                                accumulation
"""

import math
import sys
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from docs.lessons.small_training import exact, one_batch, small_model, token_loss, train_small
from docs.lessons.unseen_pairs import PyTorchStart
from transformer_scratch.batches import Batch, BatchIndices, PairDataset
from transformer_scratch.digits import Digits, split_pairs
from transformer_scratch.model import Transformer

TASK = Digits()
SPLITS = split_pairs(TASK, holdout=0.2, seed=1)
UNSEEN = [*SPLITS.val, *SPLITS.test]
STEPS = 300


@cache
def right_model() -> tuple[Transformer, float]:
    """The model without a mistake, trained once for all comparisons. -> it, its training loss."""
    model = small_model(TASK)
    return model, train_small(model, TASK, SPLITS.train, STEPS)


class PositionsAlongBatch(Transformer):
    """The encoding belongs to position t of a sequence; here row b of the batch gets it."""

    def embed(self, ids: Tensor, embedding: nn.Embedding, start: int = 0) -> Tensor:
        rows = self.positions[: len(ids)][:, None]  # (B, 1, D) instead of (T, D)
        return self.dropout(embedding(ids) * math.sqrt(self.dim) + rows)


def positions() -> None:
    faulty = small_model(TASK, kind=PositionsAlongBatch)
    loss = train_small(faulty, TASK, SPLITS.train, STEPS)
    right, right_loss = right_model()
    question, swapped = torch.tensor([[11, 8, 4, 12]]), torch.tensor([[11, 4, 8, 12]])
    start = torch.tensor([[11]])
    models = (right, faulty)
    with torch.inference_mode():
        changes = [(model(question, start) - model(swapped, start)).abs().max() for model in models]
    show("positions along the batch", "right", "faulty")
    show(f"training loss after {STEPS} steps", f"{right_loss:.3f}", f"{loss:.3f}")
    show("logits move when 8 4 becomes 4 8, by", f"{changes[0]:.2g}", f"{changes[1]:.2g}")
    show_trained_pairs(right, faulty)


def softmax_along_time(model: Transformer, batch: Batch) -> Tensor:
    """cross_entropy takes axis 1 for the classes. In (B, T, V) that is time.

    So a token competes with the tokens after it instead of the rest of the vocabulary.
    """
    logits = model(batch.source, batch.decoder_input)  # (B, T, V)
    return F.cross_entropy(logits, F.one_hot(batch.target, logits.size(-1)).float())


def softmax() -> None:
    faulty = small_model(TASK)
    train_small(faulty, TASK, SPLITS.train, STEPS, loss_of=softmax_along_time)
    right, _ = right_model()
    batch = one_batch(PairDataset(TASK, SPLITS.train))
    untrained = small_model(TASK).eval()
    show("softmax along time", "right", "faulty")
    losses = []
    with torch.inference_mode():
        for loss_of, trained in ((token_loss, right), (softmax_along_time, faulty)):
            losses.append(f"{loss_of(untrained, batch):.2f} -> {loss_of(trained, batch):.2f}")
    show("its own loss, before -> after training", *losses)
    show_trained_pairs(right, faulty)


class NoPaddingMask(Transformer):
    """Every token also attends to the padding."""

    def forward(
        self, source: Tensor, decoder_input: Tensor, source_is_padded: bool = True
    ) -> Tensor:
        return super().forward(source, decoder_input, source_is_padded=False)


def padding() -> None:
    right, _ = right_model()
    faulty = small_model(TASK, kind=NoPaddingMask).eval()
    # Trained on questions without padding, where both are the same model.
    faulty.load_state_dict(right.state_dict())
    batch = one_batch(PairDataset(TASK, SPLITS.train))
    is_token = batch.target != TASK.pad_id  # (B, T)
    show("forgotten padding mask", "right", "faulty")
    for pads in (0, 4, 12):
        source = F.pad(batch.source, (0, pads), value=TASK.pad_id)
        shares = []
        for model in (right, faulty):
            with torch.inference_mode():
                guesses = model(source, batch.decoder_input).argmax(dim=-1)  # (B, T)
            shares.append(f"{(guesses == batch.target)[is_token].float().mean():.0%}")
        show(f"tokens right, {pads} pads after the question", *shares)


def evaluation() -> None:
    right, _ = right_model()
    show("forgotten eval()", "right", "faulty")
    for attempt in range(1, 4):
        without_dropout = exact(right, TASK, SPLITS.train)
        right.train()  # the mode that is left on when nobody calls eval(): dropout works
        with_dropout = exact(right, TASK, SPLITS.train)
        right.eval()
        shares = f"{without_dropout:.1%}", f"{with_dropout:.1%}"
        show(f"trained pairs exact, attempt {attempt}", *shares)


def leak() -> None:
    model = small_model(TASK, kind=PyTorchStart)  # it learns by heart, see lesson 3
    train_small(model, TASK, SPLITS.train, STEPS)
    torch.manual_seed(0)
    leaky = [SPLITS.train[index] for index in torch.randint(len(SPLITS.train), (20,))]
    show("leaking splits", "right", "faulty")
    show("validation pairs come from", "never trained", "the trained ones")
    shares = f"{exact(model, TASK, UNSEEN):.0%}", f"{exact(model, TASK, leaky):.0%}"
    show("validation exact match", *shares)


def accumulation() -> None:
    model = small_model(TASK, dropout=0.0)
    data = PairDataset(TASK, SPLITS.train)
    by_length = data.target_lengths.argsort(stable=True)  # as in a corpus sorted by length
    total = int(data.target_lengths.sum())
    whole, *halves = (
        data[BatchIndices(samples, total, total)] for samples in (by_length, *by_length.chunk(2))
    )

    def gradient(loss: Tensor) -> Tensor:
        model.zero_grad()
        loss.backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    reference = gradient(token_loss(model, whole))
    by_tokens = gradient(sum(token_loss(model, half) * half.num_tokens / total for half in halves))
    by_batches = gradient(sum(token_loss(model, half) / 2 for half in halves))
    show("accumulation that averages wrongly", "right", "faulty")
    show("each half batch counts by its share of", "the tokens", "the batches")
    errors = [(g - reference).norm() / reference.norm() for g in (by_tokens, by_batches)]
    show("gradient differs from the whole batch's by", *(f"{error:.1e}" for error in errors))


def show_trained_pairs(*models: Transformer) -> None:
    shares = [f"{exact(model, TASK, SPLITS.train):.0%}" for model in models]
    show("trained pairs exact", *shares)


def show(what: str, right: str, faulty: str) -> None:
    print(f"{what:<44}{right:<18}{faulty}")


LESSONS = {
    "positions": positions,
    "softmax": softmax,
    "padding": padding,
    "eval": evaluation,
    "leak": leak,
    "accumulation": accumulation,
}

if __name__ == "__main__":
    for name in sys.argv[1:] or LESSONS:
        LESSONS[name]()
        print()
