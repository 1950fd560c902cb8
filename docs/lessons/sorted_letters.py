"""Lesson 7: a file of pairs to train on: words of random letters, and the same letters sorted."""

import random

import tyro

from transformer_scratch.commands import python_command
from transformer_scratch.errors import exits_cleanly

SETTINGS = "--num-layers 2 --lr 3e-3 --max-epochs 30 --wandb disabled"


@exits_cleanly
def main() -> None:
    """Write sorted.tsv into this folder."""
    draw = random.Random(1)
    words = {"".join(draw.choices("abcdefghij", k=draw.randint(3, 7))) for _ in range(4_000)}
    with open("sorted.tsv", "w", encoding="utf-8") as file:
        file.writelines(f"{word}\t{''.join(sorted(word))}\n" for word in sorted(words))
    print(f"sorted.tsv  {len(words):,} words")
    print(f"next  {python_command('train.py')} --pairs sorted.tsv {SETTINGS}")


if __name__ == "__main__":
    tyro.cli(main)
