"""What training and evaluation need to know of a task: its pairs, their tokens, how they are split.

Digits is one task, TextPairs, a file of your own pairs, the other; train.py knows neither of them.
"""

from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # batches.py imports this file
    from transformer_scratch.batches import PairDataset

Pair = tuple[Hashable, Hashable]


@dataclass(frozen=True)
class Splits:
    """The distinct questions to train on, to validate on and to test on, each as a pair.

    Where nothing is held out, validation and test ask what was trained. Of a large training split
    only some are asked: those in train.
    """

    train: list[Pair]
    val: list[Pair]
    test: list[Pair]
    nothing_held_out: bool = False

    def every(self) -> list[Pair]:
        """Each pair once: those of the test, then validation, then training."""
        return list(dict.fromkeys([*self.test, *self.val, *self.train]))


class Task:
    """Token ids from 0 to vocab_size - 1, a few of them special, and pairs made of the others.

    seq_len: tokens of the longest sequence, start and end included; it also bounds an answer.
    unknown_id: the token that no loss counts and no answer gets right; None where there is none.
    """

    start_id: int
    end_id: int
    pad_id: int
    unknown_id: int | None = None
    vocab_size: int
    seq_len: int
    splits: Splits
    num_samples: int  # of an epoch
    keeps_last_batch: bool  # whether an epoch ends with a batch that is smaller
    # Of a large split so many questions are asked between two epochs. None: all.
    most_answers: int | None = None

    @property
    def max_target_len(self) -> int:
        return self.seq_len - 1  # decoder input and target are one sequence, shifted by one

    def datasets(self) -> "tuple[PairDataset, PairDataset, PairDataset]":
        """The samples to train on, to validate on and to test on."""
        raise NotImplementedError

    def encode_source(self, pair: Pair) -> list[int]:
        """[start, tokens ..., end]"""
        raise NotImplementedError

    def encode_target(self, pair: Pair) -> list[int]:
        """[start, tokens ..., end]: decoder input and target in one."""
        raise NotImplementedError

    def answers(self, pair: Pair) -> list[list[int]]:
        """Each right answer, with the end token."""
        raise NotImplementedError

    def question(self, text: str) -> Pair:
        """A pair with this source and no target. Raises BadInput when the task has no such one."""
        raise NotImplementedError

    def tokens(self, ids: list[int]) -> list[str]:
        """How to print each token."""
        raise NotImplementedError

    def text(self, ids: list[int]) -> str:
        """How to print a sequence, without its end token."""
        raise NotImplementedError

    def source_text(self, pair: Pair) -> str:
        raise NotImplementedError

    def target_texts(self, pair: Pair) -> list[str]:
        """Each right answer."""
        raise NotImplementedError

    def record(self, pair: Pair, ids: list[int]) -> dict:
        """A question and an answer to it, for evaluation.json."""
        raise NotImplementedError

    def every_line(self) -> list[Pair]:
        """All that is asked, with each right answer."""
        raise NotImplementedError

    def was_trained(self, pair: Pair) -> bool:
        raise NotImplementedError

    def description(self) -> dict[str, str]:
        """What to print at the start, by its heading."""
        raise NotImplementedError

    def defaults(self, config, world_size: int) -> dict[str, tuple[object, str]]:
        """Settings that depend on the task. -> by name, the value and the reason for it."""
        raise NotImplementedError

    def save_pairs(self, folder: Path) -> None:
        """Keep in a run's folder what evaluate.py cannot work out again."""

    def state_dict(self) -> dict:
        """What a checkpoint must hold of it besides the settings."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Raises BadInput when this is not the task that was trained."""
