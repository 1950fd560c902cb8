"""Lesson 2: six classic mistakes, each made here on purpose and measured beside the right way.

python -m docs.lessons.mistakes                 all six
python -m docs.lessons.mistakes positions       one of: positions, softmax, padding, eval, leak,
                                                accumulation
python -m docs.lessons.mistakes --seed 2        another split, other first weights
"""

import math
from dataclasses import dataclass
from functools import cache

import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional as F

from docs.lessons.small_training import exact, one_batch, small_model, token_loss, train_small
from docs.lessons.unseen_pairs import PyTorchStart
from transformer_scratch.batches import Batch, BatchIndices, PairDataset
from transformer_scratch.digits import Digits, split_pairs
from transformer_scratch.errors import BadInput, exits_cleanly
from transformer_scratch.model import Transformer
from transformer_scratch.task import Splits

TASK = Digits()


@dataclass(frozen=True)
class Arguments:
    """Make mistakes on purpose, and measure each beside the right way."""

    mistakes: tyro.conf.Positional[tuple[str, ...]] = ()
    """Which ones: positions, softmax, padding, eval, leak, accumulation. None given: all six."""
    seed: int = 1
    """Another seed gives another split and other first weights."""
    steps: int = 300
    """Updates of 64 pairs; for the leak three times as many."""

    @property
    def splits(self) -> Splits:
        return split_pairs(TASK, holdout=0.2, seed=self.seed)


@cache
def right_model(options: Arguments) -> tuple[Transformer, float]:
    """The model without a mistake, trained once for all comparisons. -> it, its training loss."""
    model = small_model(TASK, options.seed)
    pairs = options.splits.train
    return model, train_small(model, TASK, pairs, options.steps, seed=options.seed)


class PositionsAlongBatch(Transformer):
    """The encoding belongs to position t of a sequence; here row b of the batch gets it."""

    def embed(self, ids: Tensor, embedding: nn.Embedding, start: int = 0) -> Tensor:
        rows = self.positions[: len(ids)][:, None]  # (B, 1, D) instead of (T, D)
        return self.dropout(embedding(ids) * math.sqrt(self.dim) + rows)


def positions(options: Arguments) -> None:
    faulty = small_model(TASK, options.seed, PositionsAlongBatch)
    pairs = options.splits.train
    loss = train_small(faulty, TASK, pairs, options.steps, seed=options.seed)
    right, right_loss = right_model(options)
    question, swapped = torch.tensor([[11, 8, 4, 12]]), torch.tensor([[11, 4, 8, 12]])
    start = torch.tensor([[11]])
    models = (right, faulty)
    with torch.inference_mode():
        changes = [(model(question, start) - model(swapped, start)).abs().max() for model in models]
    show("positions along the batch", "right", "faulty")
    show(f"training loss after {options.steps} steps", f"{right_loss:.3f}", f"{loss:.3f}")
    show("logits move when 8 4 becomes 4 8, by", f"{changes[0]:.2g}", f"{changes[1]:.2g}")
    show_exact("trained pairs exact", pairs, right, faulty)


def softmax_along_time(model: Transformer, batch: Batch) -> Tensor:
    """cross_entropy takes axis 1 for the classes. In (B, T, V) that is time.

    So a token competes with the tokens after it instead of the rest of the vocabulary.
    """
    logits = model(batch.source, batch.decoder_input)  # (B, T, V)
    return F.cross_entropy(logits, F.one_hot(batch.target, logits.size(-1)).float())


def softmax(options: Arguments) -> None:
    faulty = small_model(TASK, options.seed)
    pairs = options.splits.train
    train_small(faulty, TASK, pairs, options.steps, loss_of=softmax_along_time, seed=options.seed)
    right, _ = right_model(options)
    batch = one_batch(PairDataset(TASK, pairs))
    untrained = small_model(TASK, options.seed).eval()
    show("softmax along time", "right", "faulty")
    losses = []
    with torch.inference_mode():
        for loss_of, trained in ((token_loss, right), (softmax_along_time, faulty)):
            losses.append(f"{loss_of(untrained, batch):.2f} -> {loss_of(trained, batch):.2f}")
    show("its own loss, before -> after training", *losses)
    show_exact("trained pairs exact", pairs, right, faulty)


class NoPaddingMask(Transformer):
    """Every token also attends to the padding."""

    def forward(
        self, source: Tensor, decoder_input: Tensor, source_is_padded: bool = True
    ) -> Tensor:
        return super().forward(source, decoder_input, source_is_padded=False)


def padding(options: Arguments) -> None:
    right, _ = right_model(options)
    faulty = small_model(TASK, kind=NoPaddingMask).eval()
    # Trained on questions without padding, where both are the same model.
    faulty.load_state_dict(right.state_dict())
    batch = one_batch(PairDataset(TASK, options.splits.train))
    is_token = batch.target != TASK.pad_id  # (B, T)
    show("forgotten padding mask", "right", "faulty")
    for pads in (0, 4, 12):
        source = F.pad(batch.source, (0, pads), value=TASK.pad_id)
        shares = []
        for model in (right, faulty):
            with torch.inference_mode():
                guesses = model(source, batch.decoder_input).argmax(dim=-1)  # (B, T)
            shares.append(f"{(guesses == batch.target)[is_token].float().mean():.1%}")
        show(f"tokens right, {pads} pads after the question", *shares)


def evaluation(options: Arguments) -> None:
    right, _ = right_model(options)
    pairs = options.splits.train
    show("forgotten eval()", "right", "faulty")
    for attempt in range(1, 4):
        without_dropout = exact(right, TASK, pairs)
        right.train()  # the mode that is left on when nobody calls eval(): dropout works
        with_dropout = exact(right, TASK, pairs)
        right.eval()
        shares = f"{without_dropout:.1%}", f"{with_dropout:.1%}"
        show(f"trained pairs exact, attempt {attempt}", *shares)


def leak(options: Arguments) -> None:
    model = small_model(TASK, options.seed, PyTorchStart)  # first it learns by heart: lesson 3
    splits = options.splits
    train_small(model, TASK, splits.train, 3 * options.steps, seed=options.seed)
    torch.manual_seed(0)
    leaky = [splits.train[index] for index in torch.randperm(len(splits.train))[:20]]
    show("leaking splits", "right", "faulty")
    show("validation pairs come from", "never trained", "the trained ones")
    shares = [f"{exact(model, TASK, pairs):.0%}" for pairs in (splits.val + splits.test, leaky)]
    show("validation exact match", *shares)


def accumulation(options: Arguments) -> None:
    model = small_model(TASK, options.seed, dropout=0.0)
    data = PairDataset(TASK, options.splits.train)
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


def show_exact(what: str, pairs: list, *models: Transformer) -> None:
    show(what, *(f"{exact(model, TASK, pairs):.0%}" for model in models))


def show(what: str, right: str, faulty: str) -> None:
    print(f"{what:<44}{right:<18}{faulty}", flush=True)


MISTAKES = {
    "positions": positions,
    "softmax": softmax,
    "padding": padding,
    "eval": evaluation,
    "leak": leak,
    "accumulation": accumulation,
}


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    options = tyro.cli(Arguments, args=arguments)
    for name in options.mistakes:
        if name not in MISTAKES:
            raise BadInput(f"no mistake {name!r}; there are {', '.join(MISTAKES)}")
    if not 0 <= options.seed < 2**63:
        raise BadInput("--seed must be from 0 to 2^63 - 1")
    if options.steps < 1:
        raise BadInput("--steps must be at least 1")
    for name in options.mistakes or MISTAKES:
        MISTAKES[name](options)
        print()


if __name__ == "__main__":
    main()
