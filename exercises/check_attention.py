"""Is exercises/attention.py right? (PYTEST_DONT_REWRITE: a message is all that pytest shows.)"""

import torch
from torch import Tensor
from torch.nn import functional as F

from exercises.attention import attention_weights, scaled_dot_product_attention

torch.manual_seed(0)
QUERY, KEY, VALUE = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 5, 8), torch.randn(2, 3, 5, 8)
SCORES = QUERY @ KEY.transpose(-2, -1)
# The second sample has two keys of padding.
MASK = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])[:, None, None, :]


CAUSAL = torch.ones(4, 5, dtype=torch.bool).tril()  # (T, S)


def weights_of(query: Tensor, key: Tensor, mask: Tensor | None = None) -> Tensor:
    """Yours. They get copies, so that they may be changed in place."""
    weights = attention_weights(query.clone(), key.clone(), mask if mask is None else mask.clone())
    assert isinstance(weights, Tensor), f"attention_weights returns {weights}, not the weights"
    assert weights.dtype == query.dtype, (
        f"the weights must have the type of the query, {query.dtype}; yours: {weights.dtype}"
    )
    return weights


def all_one(sums: Tensor) -> bool:
    return torch.allclose(sums, torch.ones_like(sums), atol=1e-5)


def test_shape():
    shape = tuple(weights_of(QUERY, KEY).shape)
    assert shape == (2, 3, 4, 5), (
        f"the weights must be (B, H, T, S) = (2, 3, 4, 5), a row for each query; yours: {shape}"
    )


def test_each_row_sums_to_one():
    weights = weights_of(QUERY, KEY)
    sums = weights.sum(dim=-1)
    for axis in range(3):
        assert all_one(sums) or not all_one(weights.sum(dim=axis)), (
            f"softmax runs over axis {axis}; it must run over the keys, the last axis"
        )
    assert all_one(sums) or not all_one(sums / sums.mean()), (
        f"the weights of a query sum to {sums.mean():.3f}, not 1: "
        "divide the scores by sqrt(d_k), before the softmax, not the weights after it"
    )
    assert all_one(sums), "the weights of a query must sum to 1: softmax over the keys"


def test_scaled_by_the_root_of_the_head_dim():
    weights = weights_of(QUERY, KEY)
    assert not torch.allclose(weights, SCORES.softmax(dim=-1), atol=1e-6), (
        "the scores are not divided by sqrt(d_k), where d_k is the head dim, 8"
    )
    assert not torch.allclose(weights, (SCORES / 8).softmax(dim=-1), atol=1e-6), (
        "divide the scores by the square root of d_k, not by d_k"
    )
    assert torch.allclose(weights, (SCORES / 8**0.5).softmax(dim=-1), atol=1e-6), (
        "the weights are not softmax(QK^T / sqrt(d_k)): d_k is the head dim, 8"
    )
    query, key = QUERY[..., :4], KEY[..., :4]
    expected = (query @ key.transpose(-2, -1) / 2).softmax(dim=-1)
    assert torch.allclose(weights_of(query, key), expected, atol=1e-6), (
        "the weights are right for a head dim of 8 and wrong for one of 4: d_k is query.size(-1)"
    )


def test_masked_keys_get_nothing():
    weights = weights_of(QUERY, KEY, MASK)
    allowed, hidden = weights[1, ..., :3], weights[1, ..., 3:]
    assert allowed.any(), (
        "the mask works the wrong way round: True means that the query may attend to the key"
    )
    assert not hidden.any(), (
        "keys where the mask is False must get weight 0: set their scores to -math.inf"
    )
    assert all_one(weights.sum(dim=-1)), (
        "the weights no longer sum to 1: mask the scores before the softmax, not the weights after"
    )


def test_masks_of_other_shapes():
    weights = weights_of(QUERY, KEY, CAUSAL)
    expected = (SCORES / 8**0.5).masked_fill(~CAUSAL, -torch.inf).softmax(dim=-1)
    assert torch.allclose(weights, expected, atol=1e-6), (
        "a mask of (T, S) works as well as one of (B, 1, 1, S): leave it to broadcasting"
    )


def test_the_values_are_averaged():
    result = scaled_dot_product_attention(QUERY.clone(), KEY.clone(), VALUE.clone())
    assert isinstance(result, Tensor), f"scaled_dot_product_attention returns {result}"
    assert torch.allclose(result, F.scaled_dot_product_attention(QUERY, KEY, VALUE), atol=1e-6), (
        "multiply the weights (B, H, T, S) by the values (B, H, S, K), as matrices"
    )


def test_the_values_are_averaged_with_the_mask():
    result = scaled_dot_product_attention(QUERY.clone(), KEY.clone(), VALUE.clone(), MASK.clone())
    expected = F.scaled_dot_product_attention(QUERY, KEY, VALUE, attn_mask=MASK)
    assert torch.allclose(result, expected, atol=1e-6), (
        "scaled_dot_product_attention must pass its mask on to attention_weights"
    )
