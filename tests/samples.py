"""Batches for tests."""

import torch

from transformer_scratch.batches import Batch, BatchIndices, PairDataset


def batch_of(data: PairDataset, samples: list[int] | None = None) -> Batch:
    """These samples of a dataset, or all of them, as one batch that is an update by itself."""
    samples = torch.arange(len(data)) if samples is None else torch.tensor(samples)
    num_tokens = int(data.target_lengths[samples].sum())
    return data[BatchIndices(samples, num_tokens, float(num_tokens))]
