"""Is exercises/masks.py right? (PYTEST_DONT_REWRITE: a message is all that pytest shows.)"""

import torch

from exercises.masks import causal_mask, padding_mask

IDS = torch.tensor([[11, 8, 4, 12], [11, 5, 12, 13]])  # 13 is padding


def test_padding_mask_shape_and_type():
    mask = padding_mask(IDS, pad_id=13)
    shape = tuple(mask.shape)
    assert shape == (2, 1, 1, 4), f"the shape must be (B, 1, 1, S) = (2, 1, 1, 4), yours: {shape}"
    assert mask.dtype == torch.bool, f"the mask must be bool, yours is {mask.dtype}"


def test_padding_is_hidden_and_tokens_are_not():
    mask = padding_mask(IDS, pad_id=13).flatten(1)
    assert not mask.equal(IDS == 13), (
        "the mask is the wrong way round: True means that the id may be attended to"
    )
    assert not mask[1, 3], "the padding of the second sequence can still be attended to"
    assert mask.sum() == 7, "only padding is hidden: seven of these eight ids are tokens"


def test_the_id_of_padding_is_the_one_given():
    mask = padding_mask(IDS, pad_id=12).flatten(1)
    assert mask.equal(IDS != 12), "with pad_id=12 the ids 12 are to be hidden, and no others"


def test_causal_mask_is_the_lower_triangle():
    mask = causal_mask(4)
    assert tuple(mask.shape) == (4, 4), f"the shape must be (T, T), yours: {tuple(mask.shape)}"
    assert mask.dtype == torch.bool, f"the mask must be bool, yours is {mask.dtype}"
    assert not mask[0, 1], (
        "position 0 attends to position 1, which is the future: it would give the answer away"
    )
    assert mask[3, 0], "position 3 must be allowed to attend to position 0, before it"
    assert mask.diagonal().all(), "a position must be allowed to attend to itself"
    assert mask.equal(torch.ones(4, 4, dtype=torch.bool).tril()), (
        "position i attends to itself and to all positions before it, and to no others"
    )
    shape = tuple(causal_mask(6).shape)
    assert shape == (6, 6), f"with length 6 the shape must be (6, 6), yours: {shape}"
