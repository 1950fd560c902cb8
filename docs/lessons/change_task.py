"""Lesson 7: another task is one small class; model, loop and evaluation stay as they are.

python -m docs.lessons.change_task sort        3 1 2 -> 1 2 3
python -m docs.lessons.change_task reverse     3 1 2 -> 2 1 3
python -m docs.lessons.change_task add         7 8 9 -> 2 4
"""

import sys
import tempfile
from itertools import product

import train
from transformer_scratch import config
from transformer_scratch.digits import Digits


class Sort(Digits):
    def all_pairs(self) -> list[tuple]:
        return list(product(range(self.num_categories), repeat=3))  # three digits, 1,000 questions

    def answer(self, digits: tuple) -> list[int]:
        return sorted(digits)

    def kinds(self, digits: tuple) -> list[tuple]:
        return []  # nothing that must stay in training: questions are held out at random


class Reverse(Sort):
    def answer(self, digits: tuple) -> list[int]:
        return list(reversed(digits))


class Add(Sort):
    def answer(self, digits: tuple) -> list[int]:
        return [int(digit) for digit in str(sum(digits))]


if __name__ == "__main__":
    name, *flags = sys.argv[1:] or ["sort"]
    train.Digits = config.Digits = {"sort": Sort, "reverse": Reverse, "add": Add}[name]
    # Not in runs/: evaluate.py takes the newest run there, and knows only the package's task.
    folder = ["--run-dir", tempfile.mkdtemp(prefix=f"{name}-")]
    train.main(["--num-layers", "2", "--wandb", "disabled", *folder, *flags])
