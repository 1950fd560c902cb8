"""Is exercises/multi_head.py right? (PYTEST_DONT_REWRITE: a message is all that pytest shows.)"""

import torch
from torch import Tensor

from exercises.multi_head import MultiHeadAttention
from transformer_scratch import attention

torch.manual_seed(0)
REFERENCE = attention.MultiHeadAttention(dim=8, num_heads=2)
X, MEMORY, LONGER = torch.randn(3, 4, 8), torch.randn(3, 4, 8), torch.randn(3, 5, 8)
PADDED = torch.tensor([[True] * 5, [True] * 3 + [False] * 2, [True] * 4 + [False]])


def yours() -> MultiHeadAttention:
    module = MultiHeadAttention(dim=8, num_heads=2)
    module.load_state_dict(REFERENCE.state_dict())
    return module


def same(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, atol=1e-6)


def test_split_heads():
    heads = yours().split_heads(X)
    shape = tuple(heads.shape)
    assert shape == (3, 2, 4, 4), f"(B, H, T, K) is (3, 2, 4, 4) here, yours: {shape}"
    assert not heads.equal(X.reshape(3, 2, 4, 4)), (
        "a view straight to (B, H, T, K) mixes positions and heads: "
        "cut the width into (H, K) first, then transpose"
    )
    assert heads.equal(REFERENCE.split_heads(X)), (
        "head 0 must hold the first 4 numbers of each position, head 1 the other 4: "
        "cut the width into (H, K), then transpose"
    )


def test_output():
    result = yours()(X, MEMORY)
    shape = tuple(result.shape)
    assert shape == (3, 4, 8), f"(B, T, D) is (3, 4, 8) here, yours: {shape}"

    query = REFERENCE.split_heads(REFERENCE.query(X))
    key = REFERENCE.split_heads(REFERENCE.key(MEMORY))
    value = REFERENCE.split_heads(REFERENCE.value(MEMORY))
    heads = attention.scaled_dot_product_attention(query, key, value)  # (B, H, T, K)
    side_by_side = heads.transpose(1, 2).flatten(2)  # (B, T, D)
    assert not same(result, side_by_side), "W^O is missing: project the heads side by side with it"
    assert not same(result, REFERENCE(MEMORY, MEMORY)), "the queries come from x, not from memory"
    assert not same(result, REFERENCE(X, X)), "the keys and values come from memory, not from x"
    assert not same(result, REFERENCE.output(heads.reshape(3, 4, 8))), (
        "a view straight from (B, H, T, K) mixes positions and heads: "
        "move H behind T first, then put the heads side by side"
    )
    assert same(result, REFERENCE(X, MEMORY)), (
        "the shape is right, the numbers are not: W^Q projects x, W^K and W^V project memory, "
        "W^O the heads side by side"
    )


def test_mask():
    mask = PADDED[:, None, None, :]  # (B, 1, 1, S)
    result = yours()(X, LONGER, mask)
    assert same(result, REFERENCE(X, LONGER, mask)), (
        "the mask must reach scaled_dot_product_attention, as it is"
    )
