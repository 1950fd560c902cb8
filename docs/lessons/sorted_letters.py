"""Lesson 7: a file of pairs to train on: words of random letters, and the same letters sorted."""

import random

import tyro

from transformer_scratch.commands import python_command
from transformer_scratch.errors import BadInput, exits_cleanly

SETTINGS = "--num-layers 2 --lr 3e-3 --max-epochs 30 --wandb disabled"


def write_pairs() -> int:
    """-> how many."""
    draw = random.Random(1)
    words = {"".join(draw.choices("abcdefghij", k=draw.randint(3, 7))) for _ in range(4_000)}
    with open("sorted.tsv", "w", encoding="utf-8") as file:
        file.writelines(f"{word}\t{''.join(sorted(word))}\n" for word in sorted(words))
    return len(words)


@exits_cleanly
def main() -> None:
    """Write sorted.tsv into this folder."""
    try:
        count = write_pairs()
    except OSError as error:
        raise BadInput(f"sorted.tsv cannot be written here: {error.strerror}") from None
    print(f"sorted.tsv  {count:,} words")
    print(f"next  {python_command('train.py')} --pairs sorted.tsv {SETTINGS}")


if __name__ == "__main__":
    tyro.cli(main)
