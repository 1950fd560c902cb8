"""A task and batches for tests."""

from unittest import mock

import torch
from torch.nn import functional as F

from transformer_scratch.batches import Batch, BatchIndices, PairDataset
from transformer_scratch.digits import Digits
from transformer_scratch.task import Pair


class Counting(Digits):
    """The article's task, for tests of something else: answers of one to ten tokens, also where the
    program has been given another task."""

    def answer(self, pair: Pair) -> list[int]:
        first, last = pair
        step = 1 if last >= first else -1
        return list(range(first, last + step, step))


def trained_on_counting() -> mock._patch:
    """Inside, train.py trains on Counting."""

    def make_task(config, checkpoint: dict | None = None) -> Counting:
        return Counting.from_config(config)

    return mock.patch("transformer_scratch.config.make_task", make_task)


def batch_of(data: PairDataset, samples: list[int] | None = None) -> Batch:
    """These samples of a dataset, or all of them, as one batch that is an update by itself."""
    samples = torch.arange(len(data)) if samples is None else torch.tensor(samples)
    num_tokens = int(data.target_tokens[samples].sum())
    return data[BatchIndices(samples, num_tokens, float(num_tokens))]


def padded_batch(
    task: Digits, pairs: list[Pair]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """source (B, seq_len), decoder_input and target (B, seq_len - 1), all padded that far."""
    batch, pad = batch_of(PairDataset(task, pairs)), task.pad_id
    lengths = (task.seq_len, task.max_target_len, task.max_target_len)
    return tuple(
        F.pad(ids, (0, length - ids.size(1)), value=pad)
        for ids, length in zip(batch[:3], lengths, strict=True)
    )
