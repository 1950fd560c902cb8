"""The article's task: two digits in, the run of digits between them out. `8 4 -> 8 7 6 5 4`."""

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

import torch

from transformer_scratch.batches import PairDataset
from transformer_scratch.errors import BadInput
from transformer_scratch.task import Pair, Splits, Task


@dataclass(frozen=True)
class Digits(Task):
    """Questions, answers and their tokens, laid out as in the article.

    The digits 0 to num_categories - 1 are their own ids. An epoch is num_datas samples, drawn with
    repetition from the pairs that are not held out. seed decides which those are.
    Raises ValueError when seq_len is too short for the longest answer.
    """

    num_categories: int = 10
    seq_len: int = 16
    holdout: float = 0.2
    num_datas: int = 38_400
    seed: int = 42

    keeps_last_batch = False
    num_samples = property(lambda self: self.num_datas)
    # The id before them is unused: the vocabulary stays even.
    start_id = property(lambda self: self.num_categories + 1)
    end_id = property(lambda self: self.num_categories + 2)
    pad_id = property(lambda self: self.num_categories + 3)
    vocab_size = property(lambda self: self.num_categories + 4)

    def __post_init__(self):
        shortest = self.num_categories + 2
        if self.seq_len < shortest:
            raise ValueError(
                f"--seq-len {self.seq_len} is too short for {self.num_categories} digits: start, "
                f"{self.num_categories} digits and end take {shortest}; "
                f"give --seq-len {shortest} or more"
            )

    @classmethod
    def from_config(cls, config) -> "Digits":
        """The task that a Config describes; what it leaves open is filled in. Raises BadInput."""
        given = {name: getattr(config, name) for name in ("num_categories", "seq_len", "holdout")}
        given |= {"num_datas": config.num_datas, "seed": config.seed}
        given = {name: value for name, value in given.items() if value is not None}
        if "num_categories" in given:
            given.setdefault("seq_len", config.num_categories + 6)
        try:
            task = cls(**given)
            task.splits  # noqa: B018 - complains now, before anything is made
        except ValueError as error:
            raise BadInput(str(error)) from None
        return task

    def defaults(self, config, world_size: int) -> dict[str, tuple[object, str]]:
        return {
            "num_categories": (self.num_categories, ""),
            "seq_len": (self.seq_len, "num_categories + 6"),
            "holdout": (self.holdout, ""),
            "num_datas": (self.num_datas, ""),
            "batch_size": (128, ""),
            "max_epochs": (3, ""),
        }

    @cached_property
    def splits(self) -> Splits:
        return split_pairs(self, self.holdout, self.seed)

    def datasets(self) -> tuple[PairDataset, PairDataset, PairDataset]:
        return make_datasets(self, self.splits, self.num_datas, self.seed)

    # ------------------------------------------------------------------- questions and answers

    def all_pairs(self) -> list[Pair]:
        return [(a, b) for a in range(self.num_categories) for b in range(self.num_categories)]

    def answer(self, pair: Pair) -> list[int]:
        """Every digit from the first to the second, both included."""
        first, last = pair
        step = 1 if last >= first else -1
        return list(range(first, last + step, step))

    def answers(self, pair: Pair) -> list[list[int]]:
        return [[*self.answer(pair), self.end_id]]

    def question(self, text: str) -> Pair:
        digits = text.split()
        known = [str(digit) for digit in range(self.num_categories)]
        if len(digits) != 2 or not {*digits} <= {*known}:
            raise BadInput(
                f"{text!r} is not a question: this run knows two digits from 0 to {known[-1]}, "
                'for example "8 4"'
            )
        return int(digits[0]), int(digits[1])

    def source_text(self, pair: Pair) -> str:
        return f"{pair[0]} {pair[1]}"

    def target_texts(self, pair: Pair) -> list[str]:
        return [self.text(self.answer(pair))]

    def record(self, pair: Pair, ids: list[int]) -> dict:
        return {"pair": list(pair), "prediction": [token for token in ids if token != self.end_id]}

    def every_line(self) -> list[Pair]:
        return self.splits.every()

    def was_trained(self, pair: Pair) -> bool:
        return pair in self.trained_pairs

    @cached_property
    def trained_pairs(self) -> set[Pair]:
        return {*self.splits.train}

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

    # ---------------------------------------------------------------------------------- tokens

    def encode_source(self, pair: Pair) -> list[int]:
        return [self.start_id, *pair, self.end_id]

    def encode_target(self, pair: Pair) -> list[int]:
        return [self.start_id, *self.answer(pair), self.end_id]

    def tokens(self, ids: list[int]) -> list[str]:
        special = {self.start_id: "start", self.end_id: "end", self.pad_id: "pad"}
        return [special.get(token, str(token)) for token in ids]

    def text(self, ids: list[int]) -> str:
        return " ".join(str(token) for token in ids if token != self.end_id)

    def description(self) -> dict[str, str]:
        splits, pairs = self.splits, len(self.splits.every())
        if splits.nothing_held_out:
            shares = ", shared by training, validation and test, as in the article"
        else:
            shares = f": {len(splits.train)} trained, {len(splits.val)} validation, "
            shares += f"{len(splits.test)} test"
        return {"data": f"{pairs} pairs{shares}"}


def split_pairs(task: Digits, holdout: float, seed: int) -> Splits:
    """Hold a share of the distinct pairs out of training, half for validation, half for the test.

    Pairs are held out in random order (by seed), but never too many of one kind: at most
    2 x holdout (at least 0.4) of the pairs that share a start, an end or a run length in one
    direction. So every start, end and length is still trained, counting up and counting down.
    With holdout 0 training, validation and test share all pairs, as in the article.

    Raises ValueError when fewer than two pairs would be held out, or more than this rule allows.
    """
    pairs = task.all_pairs()
    if holdout == 0:
        return Splits(pairs, pairs, pairs, nothing_held_out=True)
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


def make_datasets(
    task: Digits, splits: Splits, num_datas: int, seed: int
) -> tuple[PairDataset, PairDataset, PairDataset]:
    """Training draws num_datas pairs with repetition; a held-out pair is evaluated once.

    Where nothing is held out, validation and test draw 5,000 and 10,000 samples, as in the article.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(pairs: list[Pair], size: int) -> PairDataset:
        return PairDataset(task, pairs, torch.randint(len(pairs), (size,), generator=generator))

    train = draw(splits.train, num_datas)
    if splits.nothing_held_out:
        return train, draw(splits.val, 5_000), draw(splits.test, 10_000)
    return train, PairDataset(task, splits.val), PairDataset(task, splits.test)
