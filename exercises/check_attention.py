"""Is exercises/attention.py right?"""

import torch
from torch.nn import functional as F

from exercises.attention import attention_weights, scaled_dot_product_attention

torch.manual_seed(0)
QUERY, KEY, VALUE = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 5, 8), torch.randn(2, 3, 5, 8)


def test_shape():
    shape = tuple(attention_weights(QUERY, KEY).shape)
    assert shape == (2, 3, 4, 5), (
        f"the weights must be (B, H, T, S) = (2, 3, 4, 5), a row for each query; yours: {shape}"
    )


def test_each_row_sums_to_one():
    sums = attention_weights(QUERY, KEY).sum(dim=-1)
    assert torch.allclose(sums, torch.ones_like(sums)), (
        "softmax must run over the keys, the last axis"
    )


def test_scaled_by_the_root_of_the_head_dim():
    unscaled = (QUERY @ KEY.transpose(-2, -1)).softmax(dim=-1)
    weights = attention_weights(QUERY, KEY)
    assert not torch.allclose(weights, unscaled), (
        "the scores are not divided by sqrt(d_k), where d_k is the head dim, 8"
    )
    expected = (QUERY @ KEY.transpose(-2, -1) / 8**0.5).softmax(dim=-1)
    assert torch.allclose(weights, expected, atol=1e-6), (
        "divide the scores by sqrt(d_k) before the softmax, d_k = 8"
    )


def test_masked_keys_get_nothing():
    mask = torch.ones(5, dtype=torch.bool)
    mask[3:] = False
    weights = attention_weights(QUERY, KEY, mask)
    assert weights[..., 3:].abs().max() == 0, (
        "keys where the mask is False must get weight 0; True means: may attend"
    )
    sums = weights.sum(dim=-1)
    assert torch.allclose(sums, torch.ones_like(sums)), (
        "mask the scores before the softmax, not the weights after it"
    )


def test_the_average_is_that_of_pytorch():
    expected = F.scaled_dot_product_attention(QUERY, KEY, VALUE)
    result = scaled_dot_product_attention(QUERY, KEY, VALUE)
    assert torch.allclose(result, expected, atol=1e-6), (
        "multiply the weights (B, H, T, S) by the values (B, H, S, K)"
    )
