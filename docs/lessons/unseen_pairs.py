"""Lesson 3: when does the model answer pairs that it was never trained on?

python -m docs.lessons.unseen_pairs                                    two starts, one seed
python -m docs.lessons.unseen_pairs --starts pytorch --seeds 1 2 3     one start, three seeds
python -m docs.lessons.unseen_pairs --starts scaled --holdout 0.2 0.6  fewer pairs to train on
"""

from dataclasses import dataclass
from typing import Literal

import tyro
from torch import nn

from docs.lessons.small_training import exact, small_model, train_small
from transformer_scratch.digits import Digits, split_pairs
from transformer_scratch.errors import BadInput, exits_cleanly
from transformer_scratch.model import Transformer


class PyTorchStart(Transformer):
    """Embeddings from N(0, 1), as nn.Embedding draws them."""

    def initialise(self) -> None:
        nn.init.normal_(self.source_embedding.weight)  # the other two share this matrix


KINDS = {"scaled": Transformer, "pytorch": PyTorchStart}
NAMES = {"scaled": "N(0, 1/dim)", "pytorch": "N(0, 1)"}


@dataclass
class Arguments:
    """Train the small model; count now and then the answers that are right to the last token."""

    starts: tuple[Literal["scaled", "pytorch"], ...] = ("scaled", "pytorch")
    """First weights of the embeddings: scaled is N(0, 1/dim), pytorch is N(0, 1)."""
    steps: tuple[int, ...] = (300, 900, 1800)
    """After how many updates (of 64 pairs each) to ask."""
    holdout: tuple[float, ...] = (0.2,)
    """Shares of the pairs that are never trained."""
    seeds: tuple[int, ...] = (1,)
    """Each seed gives another split, other first weights and another order of the pairs."""


def train_and_ask(
    kind: type[Transformer], steps: tuple[int, ...], holdout: float, seed: int
) -> list[tuple[float, float]]:
    """-> after each of the steps, the shares of trained and of unseen pairs answered exactly."""
    task = Digits()
    splits = split_pairs(task, holdout, seed)
    model = small_model(task, seed, kind)
    shares = []

    def ask(step: int) -> None:
        if step in steps:
            trained = exact(model, task, splits.train)
            shares.append((trained, exact(model, task, splits.val + splits.test)))

    train_small(model, task, splits.train, max(steps), seed=seed, after_step=ask)
    return shares


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    options = tyro.cli(Arguments, args=arguments)
    steps = tuple(sorted(set(options.steps)))
    if not steps or steps[0] < 1:
        raise BadInput("--steps: give one number or more, each at least 1")
    if not options.seeds:
        raise BadInput("--seeds: give one or more")
    if 0 in options.holdout:
        raise BadInput("--holdout 0 leaves no unseen pair to ask")
    pairs = len(Digits().all_pairs())
    print("first weights  trained pairs  steps   trained exact     unseen exact    (by seed)")
    for start in options.starts:
        for holdout in options.holdout:
            try:
                runs = [train_and_ask(KINDS[start], steps, holdout, seed) for seed in options.seeds]
            except ValueError as error:  # of split_pairs
                raise BadInput(str(error)) from None
            for step, shares in zip(steps, zip(*runs, strict=True), strict=True):
                trained, unseen = (
                    ", ".join(f"{share:.0%}" for share in column)
                    for column in zip(*shares, strict=True)
                )
                trained_pairs = f"{pairs - round(holdout * pairs)} of {pairs}"
                row = f"{NAMES[start]:<15}{trained_pairs:<15}{step:<8}{trained:<18}{unseen}"
                print(row, flush=True)


if __name__ == "__main__":
    main()
