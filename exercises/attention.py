"""Exercise 1: equation (1) of the paper, Attention(Q, K, V) = softmax(QK^T / sqrt(d_k)) V.

d_k is the head dim. Shapes: B batch, H heads, T query positions, S key positions, K head dim.
Check it with: python -m pytest exercises/check_attention.py
"""

import math  # noqa: F401 - for you

import torch  # noqa: F401 - for you
from torch import Tensor


def attention_weights(query: Tensor, key: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(QK^T / sqrt(d_k)): how much each query attends to each key.

    query: (B, H, T, K), key: (B, H, S, K) -> (B, H, T, S).
    mask: bool, broadcastable to (B, H, T, S), True where a query may attend to a key. Where it is
    False the weight must be 0, and the weights of a query must still sum to 1: Tensor.masked_fill
    sets the scores there to -math.inf. Without a mask a query may attend to all keys.
    """
    raise NotImplementedError("attention_weights is yours to write: a few lines, by equation (1)")


def scaled_dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None
) -> Tensor:
    """The values, averaged with these weights. value: (B, H, S, K) -> (B, H, T, K)."""
    raise NotImplementedError(
        "scaled_dot_product_attention is yours to write: one line, with attention_weights"
    )
