"""Lesson 3: one matrix for reading and writing digits makes unseen pairs work; thirty digits work better than ten.

python -m docs.lessons.shared_matrix                                        one seed, ten digits
python -m docs.lessons.shared_matrix --digits 10 30 --seeds 1 2 3 4         the table of the page
"""

import time
from dataclasses import dataclass

import tyro

from docs.lessons.small_training import exact, small_model, train_small
from transformer_scratch.data import Task, split_pairs


@dataclass
class Arguments:
    """Train the small model with and without a shared matrix; count the answers that are right to the last token."""

    digits: tuple[int, ...] = (10,)
    """Sizes of the task: 10 digits make 100 pairs, 30 make 900. A fifth of the pairs is never trained."""
    seeds: tuple[int, ...] = (1,)
    """Each seed is another split, other first weights and another order."""
    steps: int = 500
    """Updates of 128 pairs."""
    num_layers: int = 2
    """Blocks in the encoder, and as many in the decoder."""


def main() -> None:
    arguments = tyro.cli(Arguments)
    print("digits  matrix    seed  trained exact  unseen exact  seconds")
    for digits in arguments.digits:
        task = Task(digits, digits + 6)
        for shared in (True, False):
            unseen_exact = []
            for seed in arguments.seeds:
                started = time.perf_counter()
                splits = split_pairs(task, holdout=0.2, seed=seed)
                model = small_model(task, seed, tie_embeddings=shared, num_layers=arguments.num_layers)
                train_small(model, task, splits.train, arguments.steps, seed=seed)
                unseen_exact.append(exact(model, task, splits.val + splits.test))
                print(
                    f"{digits:<8}{'shared' if shared else 'separate':<10}{seed:<6}"
                    f"{exact(model, task, splits.train):<15.1%}{unseen_exact[-1]:<14.1%}"
                    f"{time.perf_counter() - started:.0f}",
                    flush=True,
                )
            if len(unseen_exact) > 1:
                print(f"{digits:<8}{'shared' if shared else 'separate':<10}mean  {'':<15}"
                      f"{sum(unseen_exact) / len(unseen_exact):.1%}")  # fmt: skip


if __name__ == "__main__":
    main()
