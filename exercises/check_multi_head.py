"""Is exercises/multi_head.py right? (PYTEST_DONT_REWRITE: a message is all that pytest shows.)"""

from itertools import permutations

import torch
from torch import Tensor

from exercises.multi_head import MultiHeadAttention
from transformer_scratch import attention

torch.manual_seed(0)
REFERENCE = attention.MultiHeadAttention(dim=12, num_heads=3)
X, MEMORY, LONGER = torch.randn(2, 5, 12), torch.randn(2, 5, 12), torch.randn(2, 6, 12)
PADDED = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
CAUSAL = torch.ones(5, 6, dtype=torch.bool).tril()  # (T, S)


def yours() -> MultiHeadAttention:
    module = MultiHeadAttention(dim=12, num_heads=3)
    module.load_state_dict(REFERENCE.state_dict())
    return module


def project(queries_of: Tensor, keys_of: Tensor, values_of: Tensor) -> tuple[Tensor, ...]:
    """-> query, key, value, split into heads."""
    projections = (REFERENCE.query, REFERENCE.key, REFERENCE.value)
    inputs = (queries_of, keys_of, values_of)
    return tuple(
        REFERENCE.split_heads(projection(x))
        for projection, x in zip(projections, inputs, strict=True)
    )


def join(heads: Tensor) -> Tensor:
    """(B, H, T, K) -> (B, T, D)"""
    return heads.transpose(1, 2).flatten(2)


def attend(*heads: Tensor) -> Tensor:
    return REFERENCE.output(join(attention.scaled_dot_product_attention(*heads)))


def same(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, atol=1e-6)


def test_split_heads():
    heads = yours().split_heads(X)
    assert isinstance(heads, Tensor), f"split_heads returns {heads}"
    shape = tuple(heads.shape)
    assert shape == (2, 3, 5, 4), f"(B, H, T, K) is (2, 3, 5, 4) here, yours: {shape}"
    assert not heads.equal(X.reshape(2, 3, 5, 4)), (
        "a view straight to (B, H, T, K) mixes positions and heads: "
        "cut the width into (H, K) first, then transpose"
    )
    assert heads.equal(REFERENCE.split_heads(X)), (
        "head 0 must hold the first 4 numbers of each position, head 1 the next 4: "
        "cut the width into (H, K), then transpose"
    )
    shape = tuple(MultiHeadAttention(dim=12, num_heads=2).split_heads(X).shape)
    assert shape == (2, 2, 5, 6), f"with two heads it must be (2, 2, 5, 6), yours: {shape}"


def test_output():
    result = yours()(X, MEMORY)
    assert isinstance(result, Tensor), f"forward returns {result}"
    shape = tuple(result.shape)
    assert shape == (2, 5, 12), f"(B, T, D) is (2, 5, 12) here, yours: {shape}"

    query, key, value = project(X, MEMORY, MEMORY)
    heads = attention.scaled_dot_product_attention(query, key, value)  # (B, H, T, K)
    assert not same(result, join(heads)), "W^O is missing: project the heads side by side with it"
    assert not same(result, REFERENCE(MEMORY, MEMORY)), "the queries come from x, not from memory"
    for keys_of, values_of in ((X, X), (X, MEMORY), (MEMORY, X)):
        assert not same(result, attend(*project(X, keys_of, values_of))), (
            "the keys and values come from memory, not from x"
        )
    for order in list(permutations((query, key, value)))[1:]:
        assert not same(result, attend(*order)), (
            "scaled_dot_product_attention takes the query, the key and the value, in this order"
        )
    unprojected = map(REFERENCE.split_heads, (X, MEMORY, MEMORY))
    assert not same(result, attend(*unprojected)), (
        "project with W^Q, W^K and W^V before you split the heads"
    )
    assert not same(result, REFERENCE.output(heads.reshape(2, 5, 12))), (
        "a view straight from (B, H, T, K) mixes positions and heads: "
        "move H behind T first, then put the heads side by side"
    )
    assert not same(result, X + REFERENCE(X, MEMORY)), (
        "x itself is not added here: that is the block's residual connection"
    )
    assert same(result, REFERENCE(X, MEMORY)), (
        "the shape is right, the numbers are not: W^Q projects x, W^K and W^V project memory, "
        "W^O the heads side by side"
    )


def test_mask():
    for mask in (PADDED[:, None, None, :], CAUSAL):  # (B, 1, 1, S) and (T, S)
        message = "the mask must reach scaled_dot_product_attention, as it is"
        try:
            result = yours()(X, LONGER, mask)
        except (RuntimeError, IndexError):  # sizes that do not match
            raise AssertionError(message) from None
        assert same(result, REFERENCE(X, LONGER, mask)), message
