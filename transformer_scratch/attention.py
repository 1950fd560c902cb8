"""Attention, as in section 3.2 of "Attention Is All You Need" (Vaswani et al., 2017).

Shapes: B batch, H heads, T query positions, S key positions, D model width (dim), K head width (dim / H).

The one mask convention of this project: a mask is boolean, True at (i, j) means that query i may attend to key j,
and it broadcasts to (B, H, T, S) from two dimensions at least.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def padding_mask(ids: Tensor, pad_id: int) -> Tensor:
    """Let every query attend to the keys that are real tokens.

    ids: (B, S) int64 -> (B, 1, 1, S) bool.
    """
    return (ids != pad_id)[:, None, None, :]


def causal_mask(length: int, device: torch.device | None = None) -> Tensor:
    """Let position i attend to itself and to what came before it (section 3.2.3).

    -> (T, T) bool, the lower triangle.
    """
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


class Packing(NamedTuple):
    """Where the tokens of a padded (B, T) batch stand. Packed, they follow each other without the padding: (N, D).

    tokens: (N,) int64, their numbers among the B * T positions, counted row by row.
    """

    tokens: Tensor
    batch_size: int
    length: int


def pack(x: Tensor, packing: Packing | None) -> Tensor:
    """(B, T, D) -> (N, D), for all that works on each position alone; None leaves x as it is."""
    return x if packing is None else x.flatten(0, 1).index_select(0, packing.tokens)


def unpack(x: Tensor, packing: Packing | None) -> Tensor:
    """(N, D) -> (B, T, D) with zeros for the padding, for attention, where positions meet; None leaves x as it is."""
    if packing is None:
        return x
    rows = x.new_zeros(packing.batch_size * packing.length, x.size(-1)).index_copy_(0, packing.tokens, x)
    return rows.unflatten(0, (packing.batch_size, packing.length))


def attention_weights(query: Tensor, key: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(QK^T / sqrt(d_k)), the weights of equation (1).

    query: (B, H, T, K), key: (B, H, S, K), mask broadcastable to (B, H, T, S) -> (B, H, T, S).
    A query that may attend to nothing gets weights of zero, with finite gradients, instead of NaN.
    """
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.size(-1))  # (B, H, T, S)
    if mask is None:
        return scores.softmax(dim=-1)
    # The lowest finite number, not -inf: a row of -inf alone would be 0/0 in the softmax.
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores.softmax(dim=-1).masked_fill(~mask, 0.0)


def scaled_dot_product_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention(Q, K, V) = softmax(QK^T / sqrt(d_k)) V, equation (1), exactly as the paper writes it.

    value: (B, H, S, K) -> (B, H, T, K). PyTorch has a fused kernel of the same name, which never stores the (T, S)
    weights; a test holds the two together.
    """
    return attention_weights(query, key, mask) @ value


def is_fused_faster(query: Tensor, key: Tensor) -> bool:
    """Nearly always. On a CPU in bfloat16 the formula wins, by far at a few dozen tokens (docs/performance.md)."""
    is_cpu_bfloat16 = query.device.type == "cpu" and query.dtype is torch.bfloat16
    return not is_cpu_bfloat16 or query.size(2) * key.size(2) > 512 * 512


class MultiHeadAttention(nn.Module):
    """MultiHead(Q, K, V) = Concat(head_1, ..., head_H) W^O, section 3.2.2; projections without bias.

    SelfAttention and CrossAttention below say where Q, K and V come from; all four projections are theirs, W^O last,
    so that the first weights are drawn in the order of the formula.
    Raises ValueError when dim is not divisible by num_heads.
    """

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim {dim} is not divisible by num_heads {num_heads}")
        self.num_heads = num_heads

    def split_heads(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, H, T, K): every head attends on its own slice of the width."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, H, T, K)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None = None,
        causal: bool = False,
        packing: Packing | None = None,
    ) -> Tensor:
        """query: (B, H, T, K), key and value: (B, H, S, K) -> (B, T, D), or (N, D) with a packing.

        causal stands for the mask causal_mask(T).
        """
        if is_fused_faster(query, key):
            heads = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal)
        else:
            mask = causal_mask(query.size(2), query.device) if causal else mask
            heads = scaled_dot_product_attention(query, key, value, mask)  # (B, H, T, K)
        return self.output(pack(heads.transpose(1, 2).flatten(2), packing))  # (B, T, D) or (N, D)


class SelfAttention(MultiHeadAttention):
    """Queries, keys and values come from one sequence."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__(dim, num_heads)
        # W^Q, W^K and W^V of all heads side by side: one product, since all three read x.
        self.query_key_value = nn.Linear(dim, 3 * dim, bias=False)
        self.output = nn.Linear(dim, dim, bias=False)  # W^O

    def project(self, x: Tensor, packing: Packing | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """x: (B, T, D), or (N, D) with a packing -> query, key and value: (B, H, T, K) each."""
        query, key, value = unpack(self.query_key_value(x), packing).chunk(3, dim=-1)  # (B, T, D) each
        return self.split_heads(query), self.split_heads(key), self.split_heads(value)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, causal: bool = False, packing: Packing | None = None
    ) -> Tensor:
        """x: (B, T, D) attends to itself -> (B, T, D). With a packing, x and the result are (N, D)."""
        return self.attend(*self.project(x, packing), mask, causal, packing=packing)


class CrossAttention(MultiHeadAttention):
    """Queries come from one sequence, keys and values from another, the memory."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__(dim, num_heads)
        self.query = nn.Linear(dim, dim, bias=False)  # W^Q of all heads side by side
        self.key_value = nn.Linear(dim, 2 * dim, bias=False)  # W^K and W^V: one product, since both read the memory
        self.output = nn.Linear(dim, dim, bias=False)  # W^O

    def queries(self, x: Tensor, packing: Packing | None = None) -> Tensor:
        """x: (B, T, D), or (N, D) with a packing -> (B, H, T, K)."""
        return self.split_heads(unpack(self.query(x), packing))

    def keys_and_values(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """memory: (B, S, D) -> two of (B, H, S, K). On its own because decoding keeps them (see KeyValueCache)."""
        key, value = self.key_value(memory).chunk(2, dim=-1)  # (B, S, D) each
        return self.split_heads(key), self.split_heads(value)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor | None = None, packing: Packing | None = None) -> Tensor:
        """x: (B, T, D) attends to memory: (B, S, D) -> (B, T, D). With a packing, x and the result are (N, D)."""
        return self.attend(self.queries(x, packing), *self.keys_and_values(memory), mask, packing=packing)
