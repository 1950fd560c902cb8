"""The task, its splits and the order of the data: all 100 pairs, one by one."""

import time
from itertools import pairwise

import pytest
import torch

from transformer_scratch.data import BatchSampler, PairDataset, Splits, Task, make_datasets, make_loader, split_pairs

TASK = Task()
PAIRS = TASK.all_pairs()


def parts(splits: Splits) -> tuple[list, list, list]:
    return splits.train, splits.val, splits.test


# ------------------------------------------------------------------------------------------------- tokens and layouts


def test_the_articles_tokens():
    assert (TASK.start_id, TASK.end_id, TASK.pad_id, TASK.vocab_size) == (11, 12, 13, 14)
    assert len(PAIRS) == len(set(PAIRS)) == 100


def test_the_articles_examples():
    assert TASK.answer((8, 4)) == [8, 7, 6, 5, 4]
    assert TASK.answer((3, 6)) == [3, 4, 5, 6]
    assert TASK.answer((5, 5)) == [5]
    assert TASK.encode_source((8, 4)) == [11, 8, 4, 12, *[13] * 12]
    assert TASK.encode_target((8, 4))[1:] == [8, 7, 6, 5, 4, 12, *[13] * 9]


@pytest.mark.parametrize("pair", PAIRS)
def test_every_pair(pair):
    """The answer by its properties, not by the code that makes it; the layouts from it."""
    first, last = pair
    answer = TASK.answer(pair)
    assert answer[0] == first and answer[-1] == last and len(answer) == abs(last - first) + 1
    steps = {after - before for before, after in pairwise(answer)}
    assert steps <= {1} if last >= first else steps == {-1}

    source, target = TASK.encode_source(pair), TASK.encode_target(pair)
    assert len(source) == len(target) == 16
    assert source == [11, first, last, 12] + [13] * 12
    assert target == [11, *answer, 12] + [13] * (14 - len(answer))

    batch = PairDataset(TASK, PAIRS)[torch.tensor([PAIRS.index(pair)]), 7]
    assert batch.source.tolist() == [source[:4]]
    assert batch.decoder_input.tolist() == [[11, *answer]]
    assert batch.target.tolist() == [[*answer, 12]]
    assert batch.num_tokens == len(answer) + 1 and batch.update_tokens == 7
    assert batch.source.dtype == batch.decoder_input.dtype == batch.target.dtype == torch.int64


@pytest.mark.parametrize("num_categories, seq_len", [(1, 3), (2, 9), (30, 36), (100, 106)])
def test_other_sizes(num_categories, seq_len):
    task = Task(num_categories, seq_len)
    assert len(task.all_pairs()) == num_categories**2
    longest = task.encode_target((0, num_categories - 1))
    assert len(longest) == seq_len and task.end_id in longest


def test_seq_len_too_short():
    assert len(Task(10, 12).encode_target((0, 9))) == 12
    with pytest.raises(ValueError, match="--seq-len 12 or more"):
        Task(10, 11)


# ---------------------------------------------------------------------------------------------------------- the split


@pytest.mark.parametrize("seed", range(50))
def test_the_split_leaves_every_kind_in_training(seed):
    splits = split_pairs(TASK, 0.2, seed)
    train, val, test = parts(splits)
    assert [len(part) for part in (train, val, test)] == [80, 10, 10]
    assert sorted([*train, *val, *test]) == PAIRS, "each pair in exactly one part"
    assert {a for a, _ in train} == {b for _, b in train} == set(range(10))
    assert {b - a for a, b in train} == set(range(-9, 10)), "every run length, up and down"
    assert split_pairs(TASK, 0.2, seed) == splits


def test_the_split_depends_on_the_seed_alone():
    torch.manual_seed(1)
    splits = [split_pairs(TASK, 0.2, seed) for seed in range(20)]
    state = torch.get_rng_state()
    torch.manual_seed(2)
    assert [split_pairs(TASK, 0.2, seed) for seed in range(20)] == splits
    assert len({tuple(split.val) for split in splits}) == 20
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state), "and draws nothing from the global stream"


def test_no_holdout_shares_all_pairs():
    assert parts(split_pairs(TASK, 0.0, seed=3)) == (PAIRS, PAIRS, PAIRS)


@pytest.mark.parametrize("holdout, val, test", [(0.02, 1, 1), (0.1, 5, 5), (0.25, 12, 13), (0.5, 25, 25)])
def test_other_holdouts(holdout, val, test):
    for seed in range(5):
        train, held_val, held_test = parts(split_pairs(TASK, holdout, seed))
        assert (len(train), len(held_val), len(held_test)) == (100 - val - test, val, test)
        assert sorted([*train, *held_val, *held_test]) == PAIRS
        assert {abs(b - a) for a, b in train} == {a for a, _ in train} == {b for _, b in train} == set(range(10))


@pytest.mark.parametrize("num_categories", [30, 100])
def test_the_split_of_larger_tasks(num_categories):
    task = Task(num_categories, num_categories + 6)
    train, val, test = parts(split_pairs(task, 0.2, seed=0))
    assert len(val) == len(test) == num_categories**2 // 10
    assert sorted([*train, *val, *test]) == task.all_pairs()
    assert {b - a for a, b in train} == set(range(1 - num_categories, num_categories))


@pytest.mark.parametrize("holdout, reason", [(0.001, "0.02 or more"), (0.014, "0.02 or more"), (0.99, "or less")])
def test_holdouts_that_cannot_work(holdout, reason):
    with pytest.raises(ValueError, match=reason):
        split_pairs(TASK, holdout, seed=0)


def test_the_remedy_for_a_large_holdout_works():
    for seed in range(5):
        with pytest.raises(ValueError) as error:
            split_pairs(TASK, 0.99, seed)
        advice = float(str(error.value).split("give ")[1].split()[0])
        assert 0.5 < advice < 1
        split_pairs(TASK, advice, seed)


# ------------------------------------------------------------------------------------------------------- the datasets


def test_sizes_of_the_datasets():
    sizes = [len(data) for data in make_datasets(TASK, split_pairs(TASK, 0.2, 0), 1234, seed=0)]
    assert sizes == [1234, 10, 10], "each held-out pair is evaluated once"
    sizes = [len(data) for data in make_datasets(TASK, split_pairs(TASK, 0.0, 0), 50_000, seed=0)]
    assert sizes == [50_000, 5_000, 10_000], "the article's"


def test_training_samples_come_from_the_trained_pairs_alone():
    splits = split_pairs(TASK, 0.2, 5)
    train, val, test = make_datasets(TASK, splits, 5_000, seed=5)
    drawn = {tuple(row) for row in train.source[train.rows][:, 1:3].tolist()}
    assert drawn == set(splits.train)
    counts = train.rows.bincount(minlength=80)
    assert counts.min() > 30 and counts.max() < 110, "about 62 of each"
    for data, pairs in ((val, splits.val), (test, splits.test)):
        assert [tuple(row) for row in data.source[data.rows][:, 1:3].tolist()] == pairs


def test_the_drawn_samples_depend_on_the_seed_alone():
    splits = split_pairs(TASK, 0.2, 0)
    torch.manual_seed(1)
    one, again = (make_datasets(TASK, splits, 100, seed=9)[0].rows for _ in range(2))
    assert torch.equal(one, again) and not torch.equal(one, make_datasets(TASK, splits, 100, seed=10)[0].rows)


def test_a_batch_is_cut_to_its_longest():
    data = PairDataset(TASK, [(0, 9), (4, 4), (8, 3)])
    batch = data[torch.tensor([1, 2]), 0]
    assert batch.target.tolist() == [[4, 12, 13, 13, 13, 13, 13], [8, 7, 6, 5, 4, 3, 12]]
    assert batch.num_tokens == 2 + 7


# ----------------------------------------------------------------------------------------------- the order of an epoch


def make_sampler(num_datas: int = 100, batch_size: int = 8, shuffle: bool = True, **settings) -> BatchSampler:
    train = make_datasets(TASK, split_pairs(TASK, 0.2, 0), num_datas, seed=0)[0]
    return BatchSampler(train, batch_size, shuffle, **settings)


def batches(sampler: BatchSampler, epoch: int = 0, first_batch: int = 0) -> list[tuple[list[int], int]]:
    sampler.set_epoch(epoch, first_batch)
    return [(samples.tolist(), tokens) for samples, tokens in sampler]


def test_the_order_is_a_pure_function_of_seed_and_epoch():
    sampler = make_sampler(seed=3)
    torch.manual_seed(0)
    first = [batches(sampler, epoch) for epoch in range(3)]
    torch.manual_seed(1)
    again = [batches(make_sampler(seed=3), epoch) for epoch in (2, 1, 0)]
    assert first == again[::-1]
    orders = {str(batches(make_sampler(seed=seed), epoch)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16, "no two (seed, epoch) share an order"


def test_an_epoch_has_each_sample_at_most_once():
    seen = [sample for samples, _ in batches(make_sampler()) for sample in samples]
    assert len(seen) == len(set(seen)) == 96, "the four that fill no batch are dropped"
    assert len(make_sampler()) == 12
    dropped = {epoch: set(range(100)) - {s for b, _ in batches(make_sampler(), epoch) for s in b} for epoch in range(4)}
    assert len({frozenset(samples) for samples in dropped.values()}) > 1, "and not always the same four"


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_processes_share_each_global_batch_without_duplicates(world_size):
    """Rank by rank, the parts make up the batch that one process with the whole batch size would see."""
    whole = batches(make_sampler(num_datas=500, batch_size=8 * world_size))
    ranks = [batches(make_sampler(num_datas=500, rank=rank, world_size=world_size)) for rank in range(world_size)]
    assert [len(rank) for rank in ranks] == [len(whole)] * world_size
    for index, (samples, tokens) in enumerate(whole):
        shares = [rank[index] for rank in ranks]
        assert [sample for share, _ in shares for sample in share] == samples
        assert {len(share) for share, _ in shares} == {8}
        assert {share_tokens for _, share_tokens in shares} == {tokens}


@pytest.mark.parametrize("world_size", [1, 3, 8])
def test_evaluation_covers_every_sample_once(world_size):
    """Also where the last batch has fewer samples than there are processes: 10 pairs, 8 processes."""
    data = PairDataset(TASK, split_pairs(TASK, 0.2, 0).val)
    ranks = [BatchSampler(data, 1, rank=rank, world_size=world_size) for rank in range(world_size)]
    seen = [sample for sampler in ranks for samples, _ in batches(sampler) for sample in samples]
    assert sorted(seen) == list(range(10))


@pytest.mark.parametrize("first_batch", [0, 1, 5, 11, 12])
def test_a_resumed_epoch_is_the_rest_of_the_whole_one(first_batch):
    sampler = make_sampler(accumulate=5)
    assert batches(sampler, 2, first_batch) == batches(sampler, 2)[first_batch:]


@pytest.mark.parametrize("accumulate", [1, 2, 3, 5, 12, 20])
def test_update_tokens_add_up_each_window(accumulate):
    """12 batches: the last window of 5 has two of them, that of 20 all twelve."""
    sampler = make_sampler(accumulate=accumulate)
    data = sampler.dataset
    plain = [sum(len(TASK.answer(data.pairs[data.rows[s]])) + 1 for s in samples) for samples, _ in batches(sampler)]
    assert len(set(plain)) > 1, "batches differ in tokens, or nothing is shown here"
    for index, (_, update_tokens) in enumerate(batches(sampler)):
        window = index // accumulate * accumulate
        assert update_tokens == sum(plain[window : window + accumulate])


def test_the_loader_hands_out_the_samplers_batches_and_no_random_number():
    sampler = make_sampler()
    state = torch.get_rng_state()
    loaded = list(make_loader(sampler))
    assert torch.equal(torch.get_rng_state(), state)
    for batch, (samples, tokens) in zip(loaded, batches(sampler), strict=True):
        expected = sampler.dataset[torch.tensor(samples), tokens]
        assert all(torch.equal(one, other) for one, other in zip(batch[:4], expected[:4], strict=True))
        assert batch[4:] == expected[4:]


def test_workers_change_nothing():
    loaded = [list(make_loader(make_sampler(), num_workers)) for num_workers in (0, 2)]
    for one, other in zip(*loaded, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one[:4], other[:4], strict=True)) and one[4:] == other[4:]


def test_an_epoch_of_the_article_is_built_in_no_time():
    """Batches are fetched whole: 391 of 128 in far less than a second, where item by item takes many."""
    sampler = make_sampler(num_datas=50_000, batch_size=128)
    start = time.process_time()
    assert sum(1 for _ in make_loader(sampler)) == 390
    assert time.process_time() - start < 1.0
