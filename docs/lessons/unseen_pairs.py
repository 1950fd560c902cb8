"""Lesson 3: what makes the model answer pairs that it was never trained on?

A shared matrix, the initial weights, more digits?

python -m docs.lessons.unseen_pairs                                           one seed
python -m docs.lessons.unseen_pairs --seeds 1 2 3                             three
python -m docs.lessons.unseen_pairs --digits 30 --seeds 1 2 --steps 500       thirty digits
"""

from dataclasses import dataclass

import tyro
from torch import nn

from docs.lessons.small_training import exact, small_model, train_small
from transformer_scratch.digits import Digits, split_pairs
from transformer_scratch.model import Transformer


class PyTorchStart(Transformer):
    """Embeddings from N(0, 1), as nn.Embedding draws them.

    An output matrix of its own is drawn as nn.Linear draws it.
    """

    def initialise(self) -> None:
        for embedding in (self.source_embedding, self.target_embedding):
            nn.init.normal_(embedding.weight)


STARTS = {"N(0, 1/dim)": Transformer, "N(0, 1)": PyTorchStart}


@dataclass
class Arguments:
    """Train the small model in four ways; count the answers that are right to the last token."""

    digits: tuple[int, ...] = (10,)
    """Sizes of the task: 10 digits make 100 pairs, 30 make 900. A fifth is never trained."""
    seeds: tuple[int, ...] = (1,)
    """Each seed gives another split, other initial weights and another order of the samples."""
    steps: int = 300
    """Updates of 128 pairs."""
    num_layers: int = 2
    """Blocks in the encoder, and as many in the decoder."""


def train_and_count(
    kind: type[Transformer], shared: bool, digits: int, seed: int, arguments: Arguments
) -> tuple[float, float]:
    """-> the share of the trained and of the unseen pairs that are answered exactly."""
    task = Digits(digits, digits + 6)
    splits = split_pairs(task, holdout=0.2, seed=seed)
    sizes = {"tie_embeddings": shared, "num_layers": arguments.num_layers}
    model = small_model(task, seed, kind, **sizes)
    train_small(model, task, splits.train, arguments.steps, seed=seed)
    return exact(model, task, splits.train), exact(model, task, splits.val + splits.test)


def main() -> None:
    arguments = tyro.cli(Arguments)
    print("digits  first weights  matrices   trained exact   unseen exact, by seed")
    for digits in arguments.digits:
        for start, kind in STARTS.items():
            for shared in (True, False):
                results = [
                    train_and_count(kind, shared, digits, seed, arguments)
                    for seed in arguments.seeds
                ]
                trained = sum(share for share, _ in results) / len(results)
                unseen = ", ".join(f"{share:.0%}" for _, share in results)
                matrices = "shared" if shared else "separate"
                row = f"{digits:<8}{start:<15}{matrices:<11}{trained:<16.0%}{unseen}"
                print(row, flush=True)


if __name__ == "__main__":
    main()
