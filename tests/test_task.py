"""The task and its splits: all 100 pairs, one by one."""

from itertools import pairwise

import pytest
import torch

from transformer_scratch.digits import Digits, split_pairs
from transformer_scratch.task import Splits

TASK = Digits()
PAIRS = TASK.all_pairs()


def parts(splits: Splits) -> tuple[list, list, list]:
    return splits.train, splits.val, splits.test


# ------------------------------------------------------------------------------- tokens and layouts


def test_the_articles_tokens():
    assert (TASK.start_id, TASK.end_id, TASK.pad_id, TASK.vocab_size) == (11, 12, 13, 14)
    assert len(PAIRS) == len(set(PAIRS)) == 100


def test_the_articles_examples():
    assert TASK.answer((8, 4)) == [8, 7, 6, 5, 4], "the digits' task is not the article's any more"
    assert TASK.answer((3, 6)) == [3, 4, 5, 6]
    assert TASK.answer((5, 5)) == [5]
    assert TASK.encode_source((8, 4)) == [11, 8, 4, 12]
    assert TASK.encode_target((8, 4)) == [11, 8, 7, 6, 5, 4, 12]


def test_every_pair():
    """The answer by its properties, not by the code that makes it; the layouts from it."""
    for first, last in PAIRS:
        answer = TASK.answer((first, last))
        assert answer[0] == first and answer[-1] == last, "from the first digit to the second"
        assert len(answer) == abs(last - first) + 1, "from the first digit to the second"
        steps = {after - before for before, after in pairwise(answer)}
        assert steps <= {1} if last >= first else steps == {-1}
        assert TASK.encode_source((first, last)) == [11, first, last, 12]
        assert TASK.encode_target((first, last)) == [11, *answer, 12]


@pytest.mark.parametrize("num_categories, seq_len", [(1, 3), (2, 9), (30, 36), (100, 106)])
def test_other_sizes(num_categories, seq_len):
    task = Digits(num_categories, seq_len)
    assert len(task.all_pairs()) == num_categories**2
    longest = max(len(task.encode_target(pair)) for pair in task.all_pairs())
    assert longest <= seq_len, "an answer is longer than --seq-len"


def test_seq_len_too_short():
    task = Digits(10, 12)
    assert all(len(task.encode_target(pair)) <= 12 for pair in task.all_pairs())
    with pytest.raises(ValueError, match="--seq-len 12 or more"):
        Digits(10, 11)


# ---------------------------------------------------------------------------------------- the split


def test_the_split_leaves_every_kind_in_training():
    for seed in range(50):
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


@pytest.mark.parametrize(
    "holdout, val, test", [(0.02, 1, 1), (0.1, 5, 5), (0.25, 12, 13), (0.5, 25, 25)]
)
def test_other_holdouts(holdout, val, test):
    for seed in range(5):
        train, held_val, held_test = parts(split_pairs(TASK, holdout, seed))
        assert (len(train), len(held_val), len(held_test)) == (100 - val - test, val, test)
        assert sorted([*train, *held_val, *held_test]) == PAIRS
        assert (
            {abs(b - a) for a, b in train}
            == {a for a, _ in train}
            == {b for _, b in train}
            == set(range(10))
        )


@pytest.mark.parametrize("num_categories", [30, 60])
def test_the_split_of_larger_tasks(num_categories):
    task = Digits(num_categories, num_categories + 6)
    train, val, test = parts(split_pairs(task, 0.2, seed=0))
    assert len(val) == len(test) == num_categories**2 // 10
    assert sorted([*train, *val, *test]) == task.all_pairs()
    assert {b - a for a, b in train} == set(range(1 - num_categories, num_categories))


@pytest.mark.parametrize(
    "holdout, reason", [(0.001, "0.02 or more"), (0.014, "0.02 or more"), (0.99, "or less")]
)
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
