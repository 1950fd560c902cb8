"""The task: two digits in, the run of consecutive digits between them out. `8 4 -> 8 7 6 5 4`, `5 5 -> 5`.

Shapes: N samples or pairs, B batch, S source length, T target length (both cut to the longest of the batch).
"""

import os
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

Pair = tuple[int, int]
WORKER_TIMEOUT = 600  # seconds; a data worker that hangs must not hold the run up for ever


@dataclass(frozen=True)
class Task:
    """The article's vocabulary and layouts for `num_categories` digits and sequences of `seq_len` tokens.

    Raises ValueError when seq_len does not hold start, the longest run and end.
    """

    num_categories: int = 10
    seq_len: int = 16

    def __post_init__(self):
        shortest = self.num_categories + 2
        if self.seq_len < shortest:
            raise ValueError(
                f"--seq-len {self.seq_len} is too short for {self.num_categories} digits: "
                f"start, {self.num_categories} digits and end take {shortest}; give --seq-len {shortest} or more"
            )

    @property
    def start_id(self) -> int:
        return self.num_categories + 1  # num_categories itself is unused, which keeps the vocabulary even

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

    def answer(self, pair: Pair) -> list[int]:
        """Every digit from the first to the second, both included."""
        first, last = pair
        step = 1 if last >= first else -1
        return list(range(first, last + step, step))

    def all_pairs(self) -> list[Pair]:
        return [(a, b) for a in range(self.num_categories) for b in range(self.num_categories)]

    def kinds(self, pair: Pair) -> list[tuple]:
        """What a pair teaches: a run length, a start and an end, each going up or down (a run of one digit is both)."""
        first, last = pair
        directions = ["up"] * (last >= first) + ["down"] * (last <= first)
        return [
            (name, value, direction)
            for direction in directions
            for name, value in (("length", abs(last - first)), ("start", first), ("end", last))
        ]

    def pad(self, ids: list[int]) -> list[int]:
        return ids + [self.pad_id] * (self.seq_len - len(ids))

    def encode_source(self, pair: Pair) -> list[int]:
        """[start, a, b, end, pad, ...], seq_len long."""
        return self.pad([self.start_id, *pair, self.end_id])

    def encode_target(self, pair: Pair) -> list[int]:
        """[start, run ..., end, pad, ...], seq_len long: decoder input and target in one."""
        return self.pad([self.start_id, *self.answer(pair), self.end_id])


@dataclass(frozen=True)
class Splits:
    """Pairs to draw samples from. With a holdout the three are disjoint; without, all three are every pair."""

    train: list[Pair]
    val: list[Pair]
    test: list[Pair]


def split_pairs(task: Task, holdout: float, seed: int) -> Splits:
    """Keep a share of the distinct pairs out of training, half of it for validation and half for the test.

    Pairs are held out in random order (by seed), but none that would leave training without enough of its kind: at most
    2 x holdout (0.4 for small ones) of the pairs that share a start, an end or a run length, going up or going down. So
    every start, end and length is still trained in both directions. holdout 0 shares all pairs between the splits, as
    the article does.

    Raises ValueError when fewer than two pairs, or more than that rule allows, would be held out.
    """
    pairs = task.all_pairs()
    if holdout == 0:
        return Splits(pairs, pairs, pairs)
    wanted = round(holdout * len(pairs))
    few = task.num_categories < 5  # so that hardly a pair can be spared
    if wanted < 2:
        remedy = "give 0" if few else f"give --holdout {2 / len(pairs):g} or more, or 0"
        raise ValueError(
            f"--holdout {holdout:g} of {len(pairs)} pairs is {wanted}: validation and test need one each; "
            f"{remedy} to share all pairs"
        )
    kinds_of = {pair: task.kinds(pair) for pair in pairs}
    sizes = Counter(kind for pair in pairs for kind in kinds_of[pair])
    allowance = {kind: min(int(max(2 * holdout, 0.4) * size), size - 1) for kind, size in sizes.items()}

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
        remedy = "give 0" if few else f"give {most:g} or less, or 0"
        raise ValueError(
            f"--holdout {holdout:g} would hold out {wanted} of {len(pairs)} pairs, but training would then lack a "
            f"start, an end or a run length after {len(held_out)}; {remedy} to share all pairs"
        )
    train = [pair for pair in pairs if pair not in set(held_out)]
    return Splits(train, sorted(held_out[: wanted // 2]), sorted(held_out[wanted // 2 :]))


class Batch(NamedTuple):
    """What one forward and backward pass sees.

    source: (B, S), decoder_input: (B, T), target: (B, T), all int64. tokens: (N,) int64, which of the B * T target
    positions are tokens. num_tokens is N, update_tokens that of the whole optimizer update the batch belongs to: all
    its accumulated batches, on all processes.
    """

    source: Tensor
    decoder_input: Tensor
    target: Tensor
    tokens: Tensor
    num_tokens: int
    update_tokens: int

    def to(self, device: torch.device) -> "Batch":
        """Move the tensors; from pinned memory the copy runs beside the computation."""
        moved = (tensor.to(device, non_blocking=True) for tensor in self[:4])
        return Batch(*moved, self.num_tokens, self.update_tokens)


class PairDataset(Dataset):
    """N samples, stored once as tensors; a whole batch is fetched by one indexing operation, not item by item."""

    def __init__(self, task: Task, pairs: list[Pair], rows: Tensor | None = None):
        """rows: (N,) int64, which pair each sample is; None takes each pair once."""
        self.pairs = pairs
        self.rows = torch.arange(len(pairs)) if rows is None else rows
        self.source = torch.tensor([task.encode_source(pair) for pair in pairs])  # (pairs, seq_len)
        self.target = torch.tensor([task.encode_target(pair) for pair in pairs])  # (pairs, seq_len)
        self.source_lengths = (self.source != task.pad_id).sum(dim=1)  # (pairs,)
        self.is_token = self.target[:, 1:] != task.pad_id  # (pairs, seq_len - 1)
        self.target_lengths = (self.target != task.pad_id).sum(dim=1) - 1  # (pairs,), without the start token

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, item: tuple[Tensor, int]) -> Batch:
        """item: the samples (B,) and the tokens of their update. Columns that are padding for all of them are cut."""
        samples, update_tokens = item
        rows = self.rows[samples]
        length = int(self.target_lengths[rows].max())
        source = self.source[rows, : int(self.source_lengths[rows].max())]
        target = self.target[rows, : length + 1]
        tokens = self.is_token[rows, :length].flatten().nonzero().squeeze(1)
        return Batch(source, target[:, :-1], target[:, 1:], tokens, len(tokens), update_tokens)


def make_datasets(
    task: Task, splits: Splits, num_datas: int, seed: int
) -> tuple[PairDataset, PairDataset, PairDataset]:
    """Training draws `num_datas` pairs with repetition; a held-out pair is evaluated once.

    Where nothing is held out, validation and test draw the article's 5,000 and 10,000 samples.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(pairs: list[Pair], size: int) -> PairDataset:
        return PairDataset(task, pairs, torch.randint(len(pairs), (size,), generator=generator))

    train = draw(splits.train, num_datas)
    if splits.val == splits.train:
        return train, draw(splits.val, 5_000), draw(splits.test, 10_000)
    return train, PairDataset(task, splits.val), PairDataset(task, splits.test)


class BatchSampler(Sampler):
    """Which samples make up each batch of an epoch: a pure function of (seed, epoch).

    Every global batch is split over the processes, `batch_size` samples each, without duplicates or padding. In
    training (shuffle) the samples that do not fill a global batch are dropped; otherwise every sample comes once.
    """

    def __init__(
        self,
        dataset: PairDataset,
        batch_size: int,
        shuffle: bool = False,
        seed: int = 0,
        accumulate: int = 1,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.dataset, self.batch_size, self.shuffle, self.seed = dataset, batch_size, shuffle, seed
        self.accumulate, self.rank, self.world_size = accumulate, rank, world_size
        self.epoch, self.first_batch = 0, 0

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Choose the epoch, and how many of its batches a resumed run has already seen."""
        self.epoch, self.first_batch = epoch, first_batch

    def __len__(self) -> int:
        """Batches a whole epoch has, on each process."""
        global_batch = self.batch_size * self.world_size
        return len(self.dataset) // global_batch if self.shuffle else -(-len(self.dataset) // global_batch)

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        order = torch.arange(len(self.dataset))
        if self.shuffle:
            # PyTorch's generator on the CPU reads 32 bits of its seed, so both numbers are hashed into those.
            generator = torch.Generator().manual_seed(random.Random(f"{self.seed} {self.epoch}").getrandbits(32))
            order = torch.randperm(len(self.dataset), generator=generator)
        global_batches = order.split(self.batch_size * self.world_size)[: len(self)]
        lengths = self.dataset.target_lengths[self.dataset.rows]
        num_tokens = [int(lengths[samples].sum()) for samples in global_batches]
        for index in range(self.first_batch, len(global_batches)):
            samples = global_batches[index].tensor_split(self.world_size)[self.rank]
            window = index - index % self.accumulate
            if len(samples):
                yield samples, sum(num_tokens[window : window + self.accumulate])


def make_loader(sampler: BatchSampler, num_workers: int = 0, pin_memory: bool = False) -> DataLoader:
    """Fetch whole batches. The loader's own generator keeps it off the global random stream, which is dropout's."""
    return DataLoader(
        sampler.dataset,
        sampler=sampler,
        batch_size=None,
        num_workers=num_workers,
        collate_fn=as_it_is,
        worker_init_fn=own_process_group,
        pin_memory=pin_memory,
        generator=torch.Generator(),
        timeout=WORKER_TIMEOUT if num_workers else 0,
    )


def as_it_is(batch: Batch) -> Batch:
    return batch


def own_process_group(worker: int) -> None:
    """Ctrl-C goes to a whole group of processes: workers must live on until the main one has saved its state."""
    os.setpgrp()
