"""Is exercises/masks.py right?"""

import torch

from exercises.masks import causal_mask, padding_mask

IDS = torch.tensor([[11, 8, 4, 12], [11, 5, 12, 13]])  # 13 is padding


def test_padding_mask_shape_and_type():
    mask = padding_mask(IDS, pad_id=13)
    assert mask.dtype == torch.bool, f"the mask must be bool, yours is {mask.dtype}"
    shape = tuple(mask.shape)
    assert shape == (2, 1, 1, 4), f"the shape must be (B, 1, 1, S) = (2, 1, 1, 4), yours: {shape}"


def test_padding_is_hidden_and_tokens_are_not():
    mask = padding_mask(IDS, pad_id=13).flatten(1)
    assert not mask[1, 3], (
        "the padding of the second sequence can still be attended to; True means: may attend"
    )
    assert mask.sum() == 7, "only padding is hidden: seven of these eight ids are tokens"


def test_causal_mask_is_the_lower_triangle():
    mask = causal_mask(4)
    assert tuple(mask.shape) == (4, 4), f"the shape must be (T, T), yours: {tuple(mask.shape)}"
    assert mask.dtype == torch.bool, f"the mask must be bool, yours is {mask.dtype}"
    assert not mask[0, 1], (
        "position 0 attends to position 1, which is the future: it would give the answer away"
    )
    assert mask[3, 0], "position 3 must be allowed to attend to position 0, before it"
    assert mask.diagonal().all(), "a position must be allowed to attend to itself"
