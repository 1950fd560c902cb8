"""Lesson 7: a file of pairs to train on: words of random letters, and the same letters sorted."""

import random

import tyro

from transformer_scratch.errors import exits_cleanly


@exits_cleanly
def main() -> None:
    """Write sorted.tsv into this folder."""
    draw = random.Random(1)
    words = {"".join(draw.choices("abcdefghij", k=draw.randint(3, 7))) for _ in range(4_000)}
    with open("sorted.tsv", "w", encoding="utf-8") as file:
        file.writelines(f"{word}\t{''.join(sorted(word))}\n" for word in sorted(words))


if __name__ == "__main__":
    tyro.cli(main)
