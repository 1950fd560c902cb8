"""A file of your own pairs as a task: spellings and pronunciations, dates, plurals, short phrases.

The vocabulary is made of the training lines' tokens; one that stands in both columns has one id.
"""

import hashlib
import math
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch

from transformer_scratch.batches import PairDataset
from transformer_scratch.commands import shorter
from transformer_scratch.errors import BadInput
from transformer_scratch.output import warn_once
from transformer_scratch.pair_file import (
    Column,
    Line,
    PairFile,
    normalised,
    read_pairs,
    write_pairs,
)
from transformer_scratch.task import Pair, Splits, Task

# Start, end, padding and unknown have the first ids; the tokens of the lines follow.
SPECIAL = ("start", "end", "pad", "unknown")
HOLDOUT, MOST_HELD_OUT = 0.1, 10_000
BATCH_SIZE, UPDATES = 128, 3_000
# Tokens of a line by default, as attention grows with their square; and that --seq-len may allow.
LONGEST, LONGEST_OF_ALL = 512, 100_000
NUM_TRAINED_ASKED = 1_000
# In a run's folder: the lines that are asked.
FOLDER, FILES = "pairs", ("train.tsv", "val.tsv", "test.tsv")


class Lines(NamedTuple):
    """The lines of each split."""

    train: list[Line]
    val: list[Line]
    test: list[Line]


class Training(NamedTuple):
    """What only a training knows of its file. samples: to train on, to validate on, to test on."""

    path: str
    sha256: str
    samples: tuple[PairDataset, PairDataset, PairDataset]
    num_sources: int
    holdout: float | None
    reasons: dict[str, str]


class TextPairs(Task):
    """Lines of text in two columns, and a split of their sources.

    A source on several lines has several right answers: each line is trained on, and the source is
    asked once. asked: the lines that are asked; of all training lines only the tokens are kept.
    trained: the sources of validation and test lines that are trained, too.
    """

    start_id, end_id, pad_id, unknown_id = range(len(SPECIAL))
    keeps_last_batch = True
    most_answers = 1_000

    def __init__(
        self,
        columns: tuple[Column, Column],
        vocabulary: list[str],
        seq_len: int,
        asked: Lines,
        trained: set[str],
        nothing_held_out: bool,
    ):
        self.columns, self.vocabulary, self.seq_len = columns, vocabulary, seq_len
        self.asked, self.trained = asked, trained
        self.ids = {token: number for number, token in enumerate(vocabulary, start=len(SPECIAL))}
        self.vocab_size = len(SPECIAL) + len(vocabulary)
        # The right answers to each source that is asked. Where it is validated or tested, those of
        # its lines there: which of its training lines are kept is a matter of chance.
        self.targets: dict[str, list[str]] = {}
        for source, target in dict.fromkeys([*asked.val, *asked.test]):
            self.targets.setdefault(source, []).append(target)
        elsewhere = {*self.targets}
        for source, target in dict.fromkeys(asked.train):
            if source not in elsewhere:
                self.targets.setdefault(source, []).append(target)

        def questions(lines: list[Line]) -> list[Pair]:
            return [(source, self.targets[source][0]) for source in dict(lines)]

        self.splits = Splits(*map(questions, asked), nothing_held_out)
        self.trained_questions = {*self.splits.train}

    @property
    def num_samples(self) -> int:
        return len(self.training.samples[0])

    def datasets(self) -> tuple[PairDataset, PairDataset, PairDataset]:
        return self.training.samples

    # -------------------------------------------------------------------------- where it is from

    @classmethod
    def from_config(cls, config, state: dict | None = None) -> "TextPairs":
        """Read --pairs and, if they are given, --val-pairs and --test-pairs.

        state: what the run that is resumed has saved of its task: it must be the same, and has
        copies of the other two files. Raises BadInput.
        """
        files = [read_pairs(config.pairs, "--pairs", state and state["sha256"])]
        if len({*files[0].lines}) == 1:
            raise BadInput(f"--pairs {config.pairs} holds a single pair: there is nothing to learn")
        if config.val_pairs and state:
            files += [
                read_pairs(f"{config.resume}/{FOLDER}/{name}", "the run's") for name in FILES[1:]
            ]
        elif config.val_pairs:
            files.append(read_pairs(config.val_pairs, "--val-pairs"))
            files.append(read_pairs(config.test_pairs, "--test-pairs"))
        columns = (files[0].column(0), files[0].column(1))
        seq_len, seq_len_reason = choose_seq_len(files, columns, config.seq_len)

        # All order comes from the seed: of the sources that are held out, and of those asked.
        generator = torch.Generator().manual_seed(config.seed)
        lines, *other_lines = [with_single_spaces(file.lines, columns) for file in files]
        sources = shuffled(dict(lines), generator)
        if other_lines:
            holdout, holdout_reason = None, "the two other files"
            val, test = other_lines
            if not state:  # a run's copies are in this order already
                val, test = (lines_of(shuffled(dict(x), generator), x) for x in (val, test))
        else:
            holdout, holdout_reason = choose_holdout(config.holdout, len(sources))
            num_held_out = round(holdout * len(sources))
            held_out, sources = sources[:num_held_out], sources[num_held_out:]
            half = num_held_out // 2
            val, test = lines_of(held_out[:half], lines), lines_of(held_out[half:], lines)
            unseen = {*held_out}
            lines = [line for line in lines if line[0] not in unseen]
        nothing_held_out = not val
        if nothing_held_out:
            val = test = lines_of(sources, lines)
        asked = Lines(lines_of(sources[:NUM_TRAINED_ASKED], lines), val, test)

        tokens = {
            token
            for line in lines
            for column, field in zip(columns, line, strict=True)
            for token in column.split(field)
        }
        known = {*sources}
        trained = set()
        if not nothing_held_out:
            trained = {source for source, _ in [*val, *test] if source in known}
        task = cls(columns, sorted(tokens), seq_len, asked, trained, nothing_held_out)
        task.training = Training(
            config.pairs,
            files[0].sha256,
            tuple(PairDataset(task, part) for part in (lines, val, test)),
            len(sources),
            holdout,
            {"holdout": holdout_reason, "seq_len": seq_len_reason},
        )
        task.check_targets(config)
        if state:
            task.load_state_dict(state)
        return task

    @classmethod
    def from_run(cls, config, state: dict, folder: Path | None) -> "TextPairs":
        """The task of a trained run, for asking: without its training samples. Raises BadInput.

        folder: the run's, whose lines are asked; None: only other questions will be.
        """
        columns = (Column(state["columns"][0]), Column(state["columns"][1]))
        asked = Lines([], [], [])
        if folder:
            files = [read_pairs(str(folder / FOLDER / name), "the run's") for name in FILES]
            asked = Lines(*(with_single_spaces(file.lines, columns) for file in files))
        trained = {*state["trained"]}
        shared = config.holdout == 0
        task = cls(columns, state["vocabulary"], config.seq_len, asked, trained, shared)
        if folder and task.asked_sha256 != state["asked_sha256"]:
            raise BadInput(f"{folder / FOLDER} has other lines than the run has kept there")
        return task

    def check_targets(self, config) -> None:
        """Raise BadInput where validation or test could count nothing but the ends of answers."""
        for name, samples in zip(("val", "test"), self.training.samples[1:], strict=True):
            if int((samples.target_tokens - 1).sum()):
                continue
            if config.val_pairs:
                raise BadInput(f"no target token of --{name}-pairs is in any line of --pairs")
            raise BadInput(
                f"--pairs {config.pairs}: no target token of the lines held out for {name} is in "
                "any other line; give another --holdout or --seed"
            )

    def save_pairs(self, folder: Path) -> None:
        (folder / FOLDER).mkdir(exist_ok=True)
        for name, lines in zip(FILES, self.asked, strict=True):
            write_pairs(folder / FOLDER / name, lines)

    @cached_property
    def asked_sha256(self) -> str:
        sha = hashlib.sha256()
        for lines in self.asked:
            for source, target in lines:
                sha.update(f"{source}\t{target}\n".encode())
            sha.update(b"\n")
        return sha.hexdigest()

    def state_dict(self) -> dict:
        return {
            "columns": [column.at_spaces for column in self.columns],
            "vocabulary": self.vocabulary,
            "trained": sorted(self.trained),
            "sha256": self.training.sha256,
            "asked_sha256": self.asked_sha256,
        }

    def load_state_dict(self, state: dict) -> None:
        if state != self.state_dict():
            raise BadInput(f"the lines in the run's {FOLDER}/ are not those that it has kept there")

    # ------------------------------------------------------------------------------- its settings

    def defaults(self, config, world_size: int) -> dict[str, tuple[object, str]]:
        batch_size = min(BATCH_SIZE, self.num_samples)
        global_batch = (config.batch_size or batch_size) * world_size
        left_over = self.num_samples % global_batch
        left_out = left_over if left_over < world_size else 0  # as BatchSampler does
        trained = self.num_samples - left_out
        updates_per_epoch = max(1, math.ceil(trained / (global_batch * config.accumulate)))
        return {
            "holdout": (self.training.holdout, self.training.reasons["holdout"]),
            "seq_len": (self.seq_len, self.training.reasons["seq_len"]),
            "batch_size": (batch_size, "" if batch_size == BATCH_SIZE else "all training lines"),
            "max_epochs": (
                max(1, round(UPDATES / updates_per_epoch)),
                f"nearest to {UPDATES:,} updates",
            ),
        }

    def description(self) -> dict[str, str]:
        splits = self.splits
        if splits.nothing_held_out:
            asked = "all shared by training, validation and test"
        else:
            asked = f"{len(splits.val):,} validation and {len(splits.test):,} test sources"
        rows = {
            "data": f"{shorter(self.training.path)}: {self.num_samples:,} training lines, "
            f"{self.training.num_sources:,} sources; {asked}",
            "held out": self.training.reasons["holdout"],
            "tokens": f"{len(self.vocabulary):,} known; sources are cut {self.columns[0]}, targets "
            f"{self.columns[1]}",
        }
        if len(splits.val) > self.most_answers:
            rows["validation"] = (
                f"after each epoch {self.most_answers:,} of them are asked, by seed"
            )
        if not splits.nothing_held_out:
            parts = (("validation", self.asked.val), ("test", self.asked.test))
            rows["unknown"] = "; ".join(f"{name}: {self.unknown(lines)}" for name, lines in parts)
            if self.trained:
                rows["warning"] = "held out and trained, too: " + ", ".join(
                    f"{sum(source in self.trained for source in dict(lines)):,} {name} sources"
                    for name, lines in parts
                )
        return rows

    def unknown(self, lines: list[Line]) -> str:
        """What in these lines training has never seen."""
        sources, targets = (
            sum(token not in self.ids for line in lines for token in column.split(line[side]))
            for side, column in enumerate(self.columns)
        )
        return f"{sources} tokens of sources, {targets} of targets"

    # -------------------------------------------------------------------------- questions, tokens

    def question(self, text: str) -> Pair:
        source = self.columns[0].join(self.columns[0].split(normalised(text).strip()))
        if not source:
            raise BadInput("an empty --source cannot be answered")
        unknown = dict.fromkeys(t for t in self.columns[0].split(source) if t not in self.ids)
        if unknown:
            warn_once(
                "unknown tokens",
                f"never trained, and read as one unknown token: {' '.join(unknown)} in {source!r}",
            )
        return source, ""

    def source_text(self, pair: Pair) -> str:
        return pair[0]

    def target_texts(self, pair: Pair) -> list[str]:
        return self.targets[pair[0]]

    def record(self, pair: Pair, ids: list[int]) -> dict:
        return {"source": pair[0], "prediction": self.text(ids), "targets": self.targets[pair[0]]}

    def every_line(self) -> list[Pair]:
        return [(source, target) for source in self.targets for target in self.targets[source]]

    def was_trained(self, pair: Pair) -> bool:
        if self.splits.nothing_held_out:
            return True
        return pair[0] in self.trained or pair in self.trained_questions

    def encode(self, side: int, field: str, unknown: int = unknown_id) -> list[int]:
        return [self.ids.get(token, unknown) for token in self.columns[side].split(field)]

    def encode_source(self, pair: Pair) -> list[int]:
        return [self.start_id, *self.encode(0, pair[0]), self.end_id]

    def encode_target(self, pair: Pair) -> list[int]:
        return [self.start_id, *self.encode(1, pair[1]), self.end_id]

    def answers(self, pair: Pair) -> list[list[int]]:
        # -1 is equal to nothing that a model writes, not even to the unknown token.
        targets = self.targets.get(pair[0], [])  # none for a source of --source
        return [[*self.encode(1, target, -1), self.end_id] for target in targets]

    def tokens(self, ids: list[int]) -> list[str]:
        names = [*SPECIAL, *self.vocabulary]
        return [names[token] for token in ids]

    def text(self, ids: list[int]) -> str:
        names = [*(f"<{name}>" for name in SPECIAL), *self.vocabulary]
        return self.columns[1].join(names[token] for token in ids if token != self.end_id)


def with_single_spaces(lines: list[Line], columns: tuple[Column, Column]) -> list[Line]:
    """With single spaces between tokens, so that equal sequences are equal texts."""
    first, second = columns
    return [
        (first.join(first.split(source)), second.join(second.split(target)))
        for source, target in lines
    ]


def shuffled(items: dict, generator: torch.Generator) -> list:
    items = list(items)
    return [items[index] for index in torch.randperm(len(items), generator=generator).tolist()]


def lines_of(sources: list[str], lines: list[Line]) -> list[Line]:
    """The lines with these sources."""
    targets: dict[str, list[str]] = {source: [] for source in sources}
    for source, target in lines:
        if source in targets:
            targets[source].append(target)
    return [(source, target) for source in sources for target in targets[source]]


def choose_seq_len(
    files: list[PairFile], columns: tuple[Column, Column], given: int | None
) -> tuple[int, str]:
    """-> the length of the longest sequence that is allowed, and why. Raises BadInput."""
    longest, number, path = max((*file.longest(columns), file.path) for file in files)
    needed = longest + 2  # start and end
    if given is None and needed <= LONGEST:
        return needed, "the longest line and two"
    if given is None or needed > given:
        limit = f"--seq-len {given}" if given else f"the {LONGEST} that it may have by default"
        remedy = "leave the line out"
        if needed <= LONGEST_OF_ALL:
            remedy += f", or give --seq-len {needed}"
        raise BadInput(
            f"{path}, line {number} takes {needed} tokens with start and end, more than {limit}; "
            f"{remedy}"
        )
    return given, ""


def choose_holdout(given: float | None, num_sources: int) -> tuple[float, str]:
    """-> the share of the sources to hold out, and why. Raises BadInput."""
    if given is None and round(HOLDOUT * num_sources) < 2:
        return 0.0, f"none: {HOLDOUT:g} of {num_sources} sources is too few for two splits"
    holdout = min(HOLDOUT, MOST_HELD_OUT / num_sources) if given is None else given
    wanted = round(holdout * num_sources)
    if holdout and not 2 <= wanted < num_sources:
        raise BadInput(
            f"--holdout {holdout:g} of {num_sources} sources is {wanted}: validation and test need "
            "one each, and training too; give 0 to share all"
        )
    if holdout == 0:
        return holdout, "none, as asked"
    reason = f"{holdout:.3g} of the sources, half for validation and half for the test"
    if given is None and holdout < HOLDOUT:
        reason += f": {HOLDOUT:g}, but at most {MOST_HELD_OUT:,} of them"
    return holdout, reason
