"""Samples and batches: every sample once, of about the same length together, each token counting
the same."""

import time
from collections import Counter
from itertools import chain

import pytest
import torch
from samples import Counting, batch_of

from transformer_scratch.batches import (
    UPDATES_PER_WINDOW,
    BatchIndices,
    BatchSampler,
    PairDataset,
    make_loader,
)
from transformer_scratch.digits import make_datasets, split_pairs

TASK = Counting()
PAIRS = TASK.all_pairs()


# ------------------------------------------------------------------------------------- the datasets


def test_sizes_of_the_datasets():
    sizes = [len(data) for data in make_datasets(TASK, split_pairs(TASK, 0.2, 0), 1234, seed=0)]
    assert sizes == [1234, 10, 10], "each held-out pair is evaluated once"
    sizes = [len(data) for data in make_datasets(TASK, split_pairs(TASK, 0.0, 0), 50_000, seed=0)]
    assert sizes == [50_000, 5_000, 10_000], "the article's"


def test_training_samples_come_from_the_trained_pairs_alone():
    splits = split_pairs(TASK, 0.2, 5)
    train, val, test = make_datasets(TASK, splits, 5_000, seed=5)
    drawn = {tuple(row[1:3]) for row in batch_of(train).source.tolist()}
    assert drawn == set(splits.train)
    counts = train.sample_pairs.bincount(minlength=80)
    assert counts.min() > 30 and counts.max() < 110, "about 62 of each"
    for data, pairs in ((val, splits.val), (test, splits.test)):
        assert [tuple(row[1:3]) for row in batch_of(data).source.tolist()] == pairs


def test_the_drawn_samples_depend_on_the_seed_alone():
    splits = split_pairs(TASK, 0.2, 0)
    torch.manual_seed(1)
    one, again = (make_datasets(TASK, splits, 100, seed=9)[0].sample_pairs for _ in range(2))
    assert torch.equal(one, again) and not torch.equal(
        one, make_datasets(TASK, splits, 100, seed=10)[0].sample_pairs
    )


def test_a_batch_is_cut_to_its_longest():
    batch = batch_of(PairDataset(TASK, [(0, 9), (4, 4), (8, 3)]), [1, 2])
    assert batch.source.tolist() == [[11, 4, 4, 12], [11, 8, 3, 12]]
    assert batch.decoder_input.tolist() == [[11, 4, 12, 13, 13, 13, 13], [11, 8, 7, 6, 5, 4, 3]]
    assert batch.target.tolist() == [[4, 12, 13, 13, 13, 13, 13], [8, 7, 6, 5, 4, 3, 12]]
    assert batch.num_tokens == 2 + 7
    assert all(tensor.dtype == torch.int64 and tensor.is_contiguous() for tensor in batch[:3])


def test_a_batch_knows_whether_its_source_is_padded():
    class OneOrTwo(Counting):
        def encode_source(self, pair):
            return [self.start_id, *set(pair), self.end_id]  # a source of its own length

    data = PairDataset(OneOrTwo(), [(4, 4), (5, 5), (8, 3)])
    assert not batch_of(data, [0, 1]).source_is_padded and not batch_of(data, [2]).source_is_padded
    assert batch_of(data, [0, 2]).source_is_padded
    assert (batch_of(data, [0, 2]).source == TASK.pad_id).sum() == 1


# ---------------------------------------------------------------------------- the order of an epoch


def make_sampler(
    num_datas: int = 100, batch_size: int = 8, shuffle: bool = True, **settings
) -> BatchSampler:
    train = make_datasets(TASK, split_pairs(TASK, 0.2, 0), num_datas, seed=0)[0]
    return BatchSampler(train, batch_size, shuffle, **settings)


def batches(sampler: BatchSampler, epoch: int = 0, first_batch: int = 0) -> list[list[int]]:
    """The samples of every batch."""
    sampler.set_epoch(epoch, first_batch)
    return [indices.samples.tolist() for indices in sampler]


def lengths(sampler: BatchSampler, samples: list[int]) -> list[int]:
    return sampler.dataset.target_lengths[samples].tolist()


def test_the_order_is_a_pure_function_of_seed_and_epoch():
    sampler = make_sampler(seed=3)
    torch.manual_seed(0)
    first = [batches(sampler, epoch) for epoch in range(3)]
    torch.manual_seed(1)
    again = [batches(make_sampler(seed=3), epoch) for epoch in (2, 1, 0)]
    assert first == again[::-1]
    orders = {
        str(batches(make_sampler(seed=seed), epoch)) for seed in range(4) for epoch in range(4)
    }
    assert len(orders) == 16, "no two (seed, epoch) share an order"


def test_an_epoch_has_each_sample_at_most_once():
    def seen(epoch: int) -> list[int]:
        return [sample for samples in batches(make_sampler(), epoch) for sample in samples]

    assert len(make_sampler()) == len(batches(make_sampler())) == 12
    left_out = [set(range(100)) - set(seen(epoch)) for epoch in range(4)]
    assert all(len(set(seen(epoch))) == len(seen(epoch)) == 96 for epoch in range(4))
    assert len({frozenset(samples) for samples in left_out}) > 1, "not always the same four"


def test_updates_are_sorted_by_length_and_come_in_random_order():
    sampler = make_sampler(num_datas=1200, batch_size=20)
    updates = [lengths(sampler, update.tolist()) for update in sampler.updates()]
    assert all(update == sorted(update) for update in updates)
    windows = len(updates) // UPDATES_PER_WINDOW
    assert sum(update[0] == 2 for update in updates) >= windows, "every window has its shortest"
    runs = [updates[i : i + UPDATES_PER_WINDOW] for i in range(0, len(updates), UPDATES_PER_WINDOW)]
    assert any(run != sorted(run) for run in runs), "windows do not run from short to long"


def test_sources_break_ties_of_the_target():
    class LongerSource(Counting):
        def encode_source(self, pair):
            return [self.start_id, *pair, *[0] * pair[0], self.end_id]

    data = PairDataset(LongerSource(), [(5, 5), (1, 1), (3, 3), (0, 1)] * 5)
    (update,) = BatchSampler(data, 20, shuffle=True).updates()
    keys = list(
        zip(data.target_lengths[update].tolist(), data.source_lengths[update].tolist(), strict=True)
    )
    assert keys == sorted(keys) and len(set(keys)) == 4


def test_batches_by_length_leave_little_padding():
    """Positions computed over tokens: two with random batches, one without any padding."""

    def positions_per_token(sampler: BatchSampler, batches: list[list[int]]) -> float:
        found = [lengths(sampler, samples) for samples in batches]
        return sum(len(batch) * max(batch) for batch in found) / sum(map(sum, found))

    sampler = make_sampler(num_datas=3200, batch_size=64)
    random = torch.randperm(3200, generator=torch.Generator().manual_seed(0)).split(64)
    assert positions_per_token(sampler, [samples.tolist() for samples in random]) > 1.8
    assert positions_per_token(sampler, batches(sampler)) < 1.4


@pytest.mark.parametrize("num_datas", [640, 700])
def test_accumulation_sees_the_updates_of_the_large_batch(num_datas):
    """64 samples at once, or in four batches of 16; 700 leave a short update at the end."""
    whole = make_sampler(num_datas, 64)
    parts = make_sampler(num_datas, 16, accumulate=4)
    for epoch in range(3):
        large, small = batches(whole, epoch), batches(parts, epoch)
        joined = [list(chain(*small[i : i + 4])) for i in range(0, len(small), 4)]
        assert joined[: len(large)] == large
        assert [len(update) for update in joined[len(large) :]] == [48] * (num_datas == 700)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_processes_share_each_global_batch_without_duplicates(world_size):
    """Rank by rank, the parts make up the batch of one process with the whole batch size."""
    whole = list(make_sampler(500, 8 * world_size))
    ranks = [
        list(make_sampler(500, rank=rank, world_size=world_size)) for rank in range(world_size)
    ]
    assert [len(rank) for rank in ranks] == [len(whole)] * world_size
    for index, indices in enumerate(whole):
        shares = [rank[index] for rank in ranks]
        assert torch.cat([share.samples for share in shares]).equal(indices.samples)
        assert {len(share.samples) for share in shares} == {8}
        assert {share[1:] for share in shares} == {indices[1:]}, "the same counts of tokens"


@pytest.mark.parametrize("world_size", [1, 3, 8])
def test_evaluation_covers_every_sample_once(world_size):
    """Also where the last batch has fewer samples than processes: 10 pairs, 8 processes."""
    data = PairDataset(TASK, split_pairs(TASK, 0.2, 0).val)
    ranks = [BatchSampler(data, 1, rank=rank, world_size=world_size) for rank in range(world_size)]
    seen = [sample for sampler in ranks for samples in batches(sampler) for sample in samples]
    assert sorted(seen) == list(range(10))


@pytest.mark.parametrize("first_batch", [0, 1, 5, 11, 12])
def test_a_resumed_epoch_is_the_rest_of_the_whole_one(first_batch):
    sampler = make_sampler(accumulate=5)
    assert batches(sampler, 2, first_batch) == batches(sampler, 2)[first_batch:]


@pytest.mark.parametrize("accumulate", [1, 2, 5, 20])
def test_every_token_of_an_epoch_has_the_same_weight(accumulate):
    """12 batches: the last update of 5 has two of them, the one of 20 all twelve."""
    sampler = make_sampler(accumulate=accumulate)
    found = list(sampler)
    tokens = [sum(lengths(sampler, indices.samples.tolist())) for indices in found]
    assert len(set(tokens)) > 1, "batches differ in tokens, or nothing is shown here"
    update_tokens = Counter()
    for index, count in enumerate(tokens):
        update_tokens[index // accumulate] += count
    for index, indices in enumerate(found):
        assert indices.update_tokens == update_tokens[index // accumulate]
    assert {indices.mean_update_tokens for indices in found} == {sum(tokens) / len(update_tokens)}
    weights = [
        sampler.dataset[indices].num_tokens / indices.mean_update_tokens for indices in found
    ]
    assert sum(weights) == pytest.approx(len(update_tokens)), "an update weighs 1 on average"


def test_the_loader_hands_out_the_samplers_batches_and_draws_no_random_number():
    sampler = make_sampler()
    state = torch.get_rng_state()
    loaded = list(make_loader(sampler))
    assert torch.equal(torch.get_rng_state(), state)
    for batch, indices in zip(loaded, sampler, strict=True):
        assert isinstance(indices, BatchIndices)
        expected = sampler.dataset[indices]
        assert all(torch.equal(*tensors) for tensors in zip(batch[:3], expected[:3], strict=True))
        assert batch[3:] == expected[3:]


@pytest.mark.slow
def test_workers_change_nothing():
    loaded = [list(make_loader(make_sampler(), num_workers)) for num_workers in (0, 2)]
    for one, other in zip(*loaded, strict=True):
        assert all(torch.equal(*tensors) for tensors in zip(one[:3], other[:3], strict=True))
        assert one[3:] == other[3:]


def test_an_epoch_of_the_article_is_built_in_no_time():
    """Batches are fetched whole: 390 of 128 in far less than the seconds of item by item."""
    sampler = make_sampler(num_datas=50_000, batch_size=128)
    start = time.process_time()
    assert sum(1 for _ in make_loader(sampler)) == 390
    assert time.process_time() - start < 2.0
