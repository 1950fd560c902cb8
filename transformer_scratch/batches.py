"""Samples and the batches they come in: sequences of about the same length together (section 5.1).

Shapes: N samples, B batch, S source length, T target length; S and T are those of the longest
sequence in the batch.
"""

import os
import random
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from transformer_scratch.output import warn_once
from transformer_scratch.processes import Processes
from transformer_scratch.signals import Signals
from transformer_scratch.task import Pair, Task

# Samples are sorted by length within windows of this many updates. A larger window leaves less
# padding, but puts more sequences of one length into the same update.
UPDATES_PER_WINDOW = 3
# Seconds. A data worker that hangs must not hold up the run for ever, nor keep it from hearing a
# signal: the waiting comes in slices.
WORKER_TIMEOUT, WARN_AFTER, SLICE = 600, 30, 3


class Batch(NamedTuple):
    """What one forward and backward pass sees.

    source: (B, S), decoder_input and target: (B, T), all int64.
    source_is_padded: whether any position of the source is padding.
    num_tokens: target tokens of this batch, without padding.
    update_tokens: those of the whole update it belongs to, in all its batches on all processes.
    mean_update_tokens: those of an update on average over the epoch.
    """

    source: Tensor
    decoder_input: Tensor
    target: Tensor
    source_is_padded: bool
    num_tokens: int
    update_tokens: int
    mean_update_tokens: float

    def to(self, device: torch.device) -> "Batch":
        """Move the tensors. A copy from pinned memory runs while the host goes on."""
        source, decoder_input, target, *numbers = self
        return Batch(
            source.to(device, non_blocking=True),
            decoder_input.to(device, non_blocking=True),
            target.to(device, non_blocking=True),
            *numbers,
        )


class BatchIndices(NamedTuple):
    """Which samples make up a batch, and the counts of Batch that only the sampler knows."""

    samples: Tensor  # (B,) int64
    update_tokens: int
    mean_update_tokens: float


class Sequences:
    """N sequences of token ids, end to end in one tensor: a short one takes no more than it needs.

    lengths: (N,) int64, the tokens of each.
    """

    def __init__(self, sequences: Iterable[list[int]], vocab_size: int):
        ids, lengths = array("i"), array("i")
        for sequence in sequences:
            ids.extend(sequence)
            lengths.append(len(sequence))
        smallest = torch.int16 if vocab_size <= 2**15 else torch.int32
        self.ids = torch.frombuffer(ids, dtype=torch.int32).to(smallest, copy=True)  # (tokens,)
        self.lengths = torch.frombuffer(lengths, dtype=torch.int32).long()  # (N,)
        self.starts = self.lengths.cumsum(0) - self.lengths

    def padded(self, indices: Tensor, pad_id: int) -> Tensor:
        """The sequences with these indices, (B,) int64, padded to the longest. -> (B, length)."""
        lengths = self.lengths[indices][:, None]  # (B, 1)
        position = torch.arange(int(lengths.max()))  # (length,)
        beyond = position >= lengths  # (B, length)
        places = (self.starts[indices][:, None] + position).masked_fill_(beyond, 0)
        return self.ids[places].long().masked_fill_(beyond, pad_id)


class PairDataset(Dataset):
    """N samples of P pairs that are stored once, as tensors; a batch is fetched in one operation.

    target_lengths, target_tokens: (N,) int64, the tokens to predict, and how many of them count:
    an unknown token is none that the model could learn to write.
    """

    def __init__(self, task: Task, pairs: Sequence[Pair], sample_pairs: Tensor | None = None):
        """sample_pairs: (N,) int64, the index of each sample's pair; None: each pair once."""
        self.pad_id, self.unknown_id = task.pad_id, task.unknown_id
        self.sample_pairs = torch.arange(len(pairs)) if sample_pairs is None else sample_pairs
        self.source = Sequences(map(task.encode_source, pairs), task.vocab_size)
        self.target = Sequences(map(task.encode_target, pairs), task.vocab_size)
        self.source_lengths = self.source.lengths[self.sample_pairs]
        self.target_lengths = self.target.lengths[self.sample_pairs] - 1  # without the start token
        unknown = torch.zeros(len(pairs), dtype=torch.int64)
        if self.unknown_id is not None:
            places = (self.target.ids == self.unknown_id).nonzero().squeeze(1)
            of_pair = torch.searchsorted(self.target.starts, places, right=True) - 1
            unknown = of_pair.bincount(minlength=len(pairs))
        self.target_tokens = self.target_lengths - unknown[self.sample_pairs]

    def __len__(self) -> int:
        return len(self.sample_pairs)

    def __getitem__(self, indices: BatchIndices) -> Batch:
        """The batch of these samples, padded to the longest source and target among them."""
        samples, update_tokens, mean_update_tokens = indices
        pairs = self.sample_pairs[samples]
        source = self.source.padded(pairs, self.pad_id)
        target = self.target.padded(pairs, self.pad_id)
        expected = target[:, 1:].contiguous()
        if self.unknown_id is not None:
            expected[expected == self.unknown_id] = self.pad_id  # the loss passes over both
        return Batch(
            source=source,
            decoder_input=target[:, :-1].contiguous(),
            target=expected,
            source_is_padded=int(self.source_lengths[samples].min()) < source.size(1),
            num_tokens=int(self.target_tokens[samples].sum()),
            update_tokens=update_tokens,
            mean_update_tokens=mean_update_tokens,
        )


class BatchSampler(Sampler):
    """The samples of each batch of an epoch, the same whenever seed and epoch are the same.

    A global batch is shared out to the processes, batch_size samples to each. In training (shuffle)
    what is left over after the last full one is dropped, or, with keep_last, makes a smaller one if
    it has a sample for each process; otherwise every sample comes once, in order.
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
        keep_last: bool = False,
    ):
        self.dataset, self.batch_size, self.shuffle, self.seed = dataset, batch_size, shuffle, seed
        self.accumulate, self.rank, self.world_size = accumulate, rank, world_size
        self.epoch, self.first_batch = 0, 0
        self.num_samples = len(dataset)  # of an epoch
        left_over = len(dataset) % (batch_size * world_size)
        if shuffle and not (keep_last and left_over >= world_size):
            self.num_samples -= left_over

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Choose the epoch, and the batch to start with: a resumed run has seen some already."""
        self.epoch, self.first_batch = epoch, first_batch

    def __len__(self) -> int:
        """The batches of a whole epoch, on each process."""
        return -(-self.num_samples // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[BatchIndices]:
        updates = self.updates()
        update_tokens = [int(self.dataset.target_tokens[update].sum()) for update in updates]
        mean_update_tokens = sum(update_tokens) / len(updates)
        index = 0
        for update, num_tokens in zip(updates, update_tokens, strict=True):
            for global_batch in update.split(self.batch_size * self.world_size):
                samples = global_batch.tensor_split(self.world_size)[self.rank]
                if index >= self.first_batch and len(samples):
                    yield BatchIndices(samples, num_tokens, mean_update_tokens)
                index += 1

    def updates(self) -> list[Tensor]:
        """The samples of each update of this epoch, a list of int64 tensors.

        In training the updates come in random order, and the samples of each are sorted by length.
        The last update may have fewer batches than the others.
        """
        size = self.batch_size * self.world_size * self.accumulate
        if not self.shuffle:
            return list(torch.arange(len(self.dataset)).split(size))
        # The CPU's generator uses only 32 bits of a seed: both numbers are hashed into those.
        seed = random.Random(f"{self.seed} {self.epoch}").getrandbits(32)
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.dataset), generator=generator)
        order = order[: self.num_samples]

        whole = len(order) - len(order) % size
        updates = []
        for window in order[:whole].split(size * UPDATES_PER_WINDOW):
            if len(window):  # splitting nothing yields one empty window
                updates += self.sort_by_length(window).split(size)
        shuffled = torch.randperm(len(updates), generator=generator).tolist()
        updates = [updates[index] for index in shuffled]
        if whole < len(order):
            updates.append(self.sort_by_length(order[whole:]))
        return updates

    def sort_by_length(self, samples: Tensor) -> Tensor:
        """By target length, then by source length."""
        source, target = self.dataset.source_lengths[samples], self.dataset.target_lengths[samples]
        return samples[torch.argsort(target * (source.max() + 1) + source, stable=True)]


def make_loaders(
    config, task: Task, processes: Processes, device: torch.device
) -> tuple[DataLoader, DataLoader, DataLoader]:
    """The batches that a Config describes, for training, validation and test."""
    train, val, test = task.datasets()
    share = {"rank": processes.rank, "world_size": processes.world_size}
    sampler = BatchSampler(
        train,
        config.batch_size,
        shuffle=True,
        seed=config.seed,
        accumulate=config.accumulate,
        keep_last=task.keeps_last_batch,
        **share,
    )
    return (
        make_loader(sampler, config.num_workers, pin_memory=device.type == "cuda"),
        make_loader(BatchSampler(val, config.batch_size, **share)),
        make_loader(BatchSampler(test, config.batch_size, **share)),
    )


def make_loader(
    sampler: BatchSampler, num_workers: int = 0, pin_memory: bool = False
) -> DataLoader:
    """A loader of whole batches.

    It draws its workers' seed from its own generator, so that dropout's stream is untouched.
    """
    return DataLoader(
        sampler.dataset,
        sampler=sampler,
        batch_size=None,
        num_workers=num_workers,
        collate_fn=unchanged,
        worker_init_fn=leave_process_group,
        pin_memory=pin_memory,
        generator=torch.Generator(),
        timeout=WORKER_TIMEOUT if num_workers else 0,
    )


def until_stopped(loader: DataLoader, signals: Signals) -> Iterator[Batch | None]:
    """The batches; None as soon as a worker does not deliver and a signal asks to stop.

    Raises RuntimeError when a worker has delivered nothing for WORKER_TIMEOUT seconds.
    """
    if loader.num_workers:
        loader.timeout = SLICE
    iterator, waited = iter(loader), 0
    try:
        while True:
            try:
                batch = next(iterator)
            except StopIteration:
                return
            except RuntimeError as error:
                if not str(error).startswith("DataLoader timed out"):
                    raise  # an error of the data
                waited += SLICE
                message = f"no data from a worker for {waited} seconds; --num-workers 0 needs none"
                if signals.received:
                    yield None
                if waited >= WORKER_TIMEOUT:
                    raise RuntimeError(message) from None
                if waited >= WARN_AFTER:
                    warn_once("workers", message)
            else:
                waited = 0
                yield batch
    finally:
        for worker in getattr(iterator, "_workers", ()):
            worker.terminate()  # PyTorch would first wait 5 seconds for each that hangs


def unchanged(batch: Batch) -> Batch:
    return batch


def leave_process_group(worker: int) -> None:
    """Leave the terminal's group: Ctrl-C must not kill workers before the state is saved."""
    os.setpgrp()
