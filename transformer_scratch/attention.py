"""Attention, section 3.2 of "Attention Is All You Need" (Vaswani et al., 2017).

Shapes: B batch, H heads, T query positions, S key positions, D model width (dim),
K head dim (D / H).

Masks, throughout this project: boolean, True at (i, j) means that query i may attend to key j, and
broadcastable to (B, H, T, S).
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def padding_mask(ids: Tensor, pad_id: int) -> Tensor:
    """Let every query attend to the keys that are real tokens.

    ids: (B, S) int64 -> (B, 1, 1, S) bool.
    """
    return (ids != pad_id)[:, None, None, :]


def causal_mask(length: int, device: torch.device | None = None) -> Tensor:
    """Let position i attend to itself and to the positions before it (section 3.2.3).

    -> (T, T) bool, the lower triangle.
    """
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


def attention_weights(query: Tensor, key: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(QK^T / sqrt(d_k)), the weights of equation (1).

    query: (B, H, T, K), key: (B, H, S, K), mask broadcastable to (B, H, T, S) -> (B, H, T, S).
    A query with no allowed key gets weights of zero, not NaN, and its gradients stay finite.
    """
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.size(-1))  # (B, H, T, S)
    if mask is None:
        return scores.softmax(dim=-1)
    # The lowest finite number rather than -inf: the softmax of a row of only -inf is 0/0.
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores.softmax(dim=-1).masked_fill(~mask, 0.0)


def scaled_dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None
) -> Tensor:
    """Attention(Q, K, V) = softmax(QK^T / sqrt(d_k)) V, equation (1) as the paper writes it.

    query: (B, H, T, K), key and value: (B, H, S, K) -> (B, H, T, K).
    PyTorch's fused kernel of the same name computes this without storing the (T, S) weights. The
    model runs the kernel; a test checks that the two agree up to rounding.
    """
    return attention_weights(query, key, mask) @ value


class MultiHeadAttention(nn.Module):
    """MultiHead(Q, K, V) = Concat(head_1, ..., head_H) W^O, section 3.2.2, without biases.

    Raises ValueError when dim is not divisible by num_heads.
    """

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim {dim} is not divisible by num_heads {num_heads}")
        self.num_heads = num_heads
        # Each matrix holds the projections of all heads side by side.
        self.query = nn.Linear(dim, dim, bias=False)  # W^Q
        self.key = nn.Linear(dim, dim, bias=False)  # W^K
        self.value = nn.Linear(dim, dim, bias=False)  # W^V
        self.output = nn.Linear(dim, dim, bias=False)  # W^O

    def forward(
        self, x: Tensor, memory: Tensor, mask: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        """Let x: (B, T, D) attend to memory: (B, S, D); self-attention when both are the same.

        causal stands for the mask causal_mask(T). -> (B, T, D)
        """
        query = self.split_heads(self.query(x))  # (B, H, T, K)
        key = self.split_heads(self.key(memory))  # (B, H, S, K)
        value = self.split_heads(self.value(memory))  # (B, H, S, K)
        return self.attend(query, key, value, mask, causal)

    def split_heads(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, H, T, K): each head works on its own slice of the width."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, H, T, K)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None = None,
        causal: bool = False,
    ) -> Tensor:
        """Attend, merge the heads, project.

        query: (B, H, T, K), key and value: (B, H, S, K) -> (B, T, D).
        """
        heads = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal)
        return self.output(heads.transpose(1, 2).flatten(2))  # (B, T, D)
