"""Is exercises/multi_head.py right?"""

import torch

from exercises.multi_head import MultiHeadAttention
from transformer_scratch import attention

torch.manual_seed(0)
REFERENCE = attention.MultiHeadAttention(dim=8, num_heads=2)
X, MEMORY = torch.randn(3, 4, 8), torch.randn(3, 5, 8)


def yours() -> MultiHeadAttention:
    module = MultiHeadAttention(dim=8, num_heads=2)
    module.load_state_dict(REFERENCE.state_dict())
    return module


def test_split_heads():
    heads = yours().split_heads(X)
    shape = tuple(heads.shape)
    assert shape == (3, 2, 4, 4), f"(B, H, T, K) is (3, 2, 4, 4) here, yours: {shape}"
    assert heads[1, 0, 2].equal(X[1, 2, :4]), (
        "head 0 of position 2 must hold the first 4 numbers of that position; a view straight to "
        "(B, H, T, K) mixes positions and heads: cut the width first, then transpose"
    )


def test_output():
    result, expected = yours()(X, MEMORY), REFERENCE(X, MEMORY)
    shape = tuple(result.shape)
    assert shape == (3, 4, 8), f"(B, T, D) is (3, 4, 8) here, yours: {shape}"
    assert torch.allclose(result, expected, atol=1e-6), (
        "the shape is right, the numbers are not: queries come from x, keys and values from "
        "memory; W^O takes the heads side by side, (B, H, T, K) -> (B, T, H, K) -> (B, T, D)"
    )


def test_mask():
    mask = torch.tensor([[True, True, False, True, False]])
    result, expected = yours()(X, MEMORY, mask), REFERENCE(X, MEMORY, mask)
    assert torch.allclose(result, expected, atol=1e-6), (
        "pass the mask on to the attention of the heads"
    )
