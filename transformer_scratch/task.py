"""The task: two digits in, the run of digits between them out. `8 4 -> 8 7 6 5 4`, `5 5 -> 5`."""

from collections import Counter
from dataclasses import dataclass

import torch

Pair = tuple[int, int]


@dataclass(frozen=True)
class Splits:
    """The distinct pairs to train on, to validate on and to test on.

    The three are disjoint, unless nothing is held out: then each of them is every pair.
    """

    train: list[Pair]
    val: list[Pair]
    test: list[Pair]

    @property
    def nothing_held_out(self) -> bool:
        return self.val == self.train


@dataclass(frozen=True)
class Task:
    """Questions, answers and their tokens, laid out as in the article.

    The digits 0 to num_categories - 1 are their own ids. Sequences are padded to seq_len tokens.
    Raises ValueError when seq_len is too short for the longest answer.
    """

    num_categories: int = 10
    seq_len: int = 16

    def __post_init__(self):
        shortest = self.num_categories + 2
        if self.seq_len < shortest:
            raise ValueError(
                f"--seq-len {self.seq_len} is too short for {self.num_categories} digits: start, "
                f"{self.num_categories} digits and end take {shortest}; "
                f"give --seq-len {shortest} or more"
            )

    @classmethod
    def from_config(cls, config) -> "Task":
        return cls(config.num_categories, config.seq_len)

    @property
    def start_id(self) -> int:
        return self.num_categories + 1  # the id before it is unused: the vocabulary stays even

    @property
    def end_id(self) -> int:
        return self.num_categories + 2

    @property
    def pad_id(self) -> int:
        return self.num_categories + 3

    @property
    def vocab_size(self) -> int:
        return self.num_categories + 4

    @property
    def max_target_len(self) -> int:
        return self.seq_len - 1  # decoder input and target are one sequence, shifted by one

    def all_pairs(self) -> list[Pair]:
        return [(a, b) for a in range(self.num_categories) for b in range(self.num_categories)]

    def answer(self, pair: Pair) -> list[int]:
        """Every digit from the first to the second, both included."""
        first, last = pair
        step = 1 if last >= first else -1
        return list(range(first, last + step, step))

    def kinds(self, pair: Pair) -> list[tuple]:
        """What a pair teaches: a run length, a start and an end, each counting up or down.

        A run of one digit counts as both.
        """
        first, last = pair
        directions = ["up"] * (last >= first) + ["down"] * (last <= first)
        return [
            (name, value, direction)
            for direction in directions
            for name, value in (("length", abs(last - first)), ("start", first), ("end", last))
        ]

    def encode_source(self, pair: Pair) -> list[int]:
        """[start, a, b, end, pad, ...], seq_len long."""
        return self.pad([self.start_id, *pair, self.end_id])

    def encode_target(self, pair: Pair) -> list[int]:
        """[start, run ..., end, pad, ...], seq_len long: decoder input and target in one."""
        return self.pad([self.start_id, *self.answer(pair), self.end_id])

    def pad(self, ids: list[int]) -> list[int]:
        return ids + [self.pad_id] * (self.seq_len - len(ids))


def split_pairs(task: Task, holdout: float, seed: int) -> Splits:
    """Hold a share of the distinct pairs out of training, half for validation, half for the test.

    Pairs are held out in random order (by seed), but never too many of one kind: at most
    2 x holdout (at least 0.4) of the pairs that share a start, an end or a run length in one
    direction. So every start, end and length is still trained, counting up and counting down.
    With holdout 0 training, validation and test share all pairs, as in the article.

    Raises ValueError when fewer than two pairs would be held out, or more than this rule allows.
    """
    pairs = task.all_pairs()
    if holdout == 0:
        return Splits(pairs, pairs, pairs)
    wanted = round(holdout * len(pairs))
    few_digits = task.num_categories < 5  # hardly a pair can be spared then
    if wanted < 2:
        remedy = "give 0" if few_digits else f"give --holdout {2 / len(pairs):g} or more, or 0"
        raise ValueError(
            f"--holdout {holdout:g} of {len(pairs)} pairs is {wanted}: validation and test need "
            f"one each; {remedy} to share all pairs"
        )
    kinds_of = {pair: task.kinds(pair) for pair in pairs}
    sizes = Counter(kind for pair in pairs for kind in kinds_of[pair])
    most_of_a_kind = max(2 * holdout, 0.4)
    allowance = {kind: min(int(most_of_a_kind * size), size - 1) for kind, size in sizes.items()}

    held_out: list[Pair] = []
    generator = torch.Generator().manual_seed(seed)
    for index in torch.randperm(len(pairs), generator=generator).tolist():
        pair = pairs[index]
        if len(held_out) < wanted and all(allowance[kind] > 0 for kind in kinds_of[pair]):
            held_out.append(pair)
            for kind in kinds_of[pair]:
                allowance[kind] -= 1
    if len(held_out) < wanted:
        most = int(100 * len(held_out) / len(pairs)) / 100
        remedy = "give 0" if few_digits else f"give {most:g} or less, or 0"
        raise ValueError(
            f"--holdout {holdout:g} would hold out {wanted} of {len(pairs)} pairs, but after "
            f"{len(held_out)} training would lack a start, an end or a run length; "
            f"{remedy} to share all pairs"
        )
    unseen = set(held_out)
    train = [pair for pair in pairs if pair not in unseen]
    return Splits(train, sorted(held_out[: wanted // 2]), sorted(held_out[wanted // 2 :]))
