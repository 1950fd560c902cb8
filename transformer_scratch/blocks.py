"""The blocks that the encoder and the decoder stack, section 3.1 of the paper (post-norm, as in its figure 1).

Shapes: B batch, S source positions, T target positions, D model width (dim), H heads, K head width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from transformer_scratch.attention import CrossAttention, Packing, SelfAttention


class FeedForward(nn.Sequential):
    """FFN(x) = max(0, x W_1 + b_1) W_2 + b_2, equation (2): the same two layers at every position."""

    def __init__(self, dim: int, ffn_dim: int):
        super().__init__(nn.Linear(dim, ffn_dim), nn.ReLU(), nn.Linear(ffn_dim, dim))


class Dropout(nn.Module):
    """Dropout (Srivastava et al., 2014) as nn.Dropout does it, but cheaper for large tensors on a CPU.

    From 2^13 elements on, one random number of 64 bits decides over four, 16 bits each, so p is rounded to 1/65536;
    below that PyTorch's own is faster (docs/performance.md).
    """

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        if torch.compiler.is_compiling() or x.device.type != "cpu" or x.numel() < 2**13:
            return F.dropout(x, self.p)
        threshold = round(self.p * 2**16)
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
        keep = bits[: x.numel()].view(x.shape) >= threshold - 2**15  # int16 starts at -2**15
        return x * keep.to(x.dtype).mul_(1 / (1 - threshold / 2**16))


class AddAndNorm(nn.Module):
    """LayerNorm(x + Dropout(Sublayer(x))), sections 3.1 and 5.4: around every sub-layer.

    Nothing else in a block is dropped.
    """

    def __init__(self, dim: int, dropout: float):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, sublayer_output: Tensor) -> Tensor:
        return self.norm(x + self.dropout(sublayer_output))


class EncoderBlock(nn.Module):
    """Self-attention, then the feed-forward network."""

    def __init__(self, dim: int, num_heads: int, ffn_dim: int, dropout: float):
        super().__init__()
        self.self_attention = SelfAttention(dim, num_heads)
        self.self_attention_norm = AddAndNorm(dim, dropout)
        self.feed_forward = FeedForward(dim, ffn_dim)
        self.feed_forward_norm = AddAndNorm(dim, dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x: (B, S, D), mask: (B, 1, 1, S), None hides nothing -> (B, S, D)."""
        x = self.self_attention_norm(x, self.self_attention(x, mask))
        return self.feed_forward_norm(x, self.feed_forward(x))


class KeyValueCache:
    """What one decoder block keeps between two steps of decoding, so that no key or value is computed twice.

    memory_keys_values: two of (B, H, S, K), the source's, computed once; keys, values: (B, H, room, K) each, of which
    the first `length` positions are filled.
    """

    def __init__(self, memory_keys_values: tuple[Tensor, Tensor]):
        # Every step reads them, and would have to put the heads one behind the other first.
        self.memory_keys_values = tuple(t.contiguous() for t in memory_keys_values)
        B, H, _, K = memory_keys_values[0].shape
        self.keys, self.values = (memory_keys_values[0].new_empty(B, H, 16, K) for _ in range(2))
        self.length = 0

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add the newest position, two of (B, H, 1, K); return all positions so far, two of (B, H, t, K)."""
        if self.length == self.keys.size(2):  # doubling the room copies each position about once, not at every step
            self.keys, self.values = (torch.cat([t, torch.empty_like(t)], dim=2) for t in (self.keys, self.values))
        self.keys[:, :, self.length], self.values[:, :, self.length] = key.squeeze(2), value.squeeze(2)
        self.length += 1
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def keep_rows(self, rows: Tensor) -> None:
        """Forget the sequences that are finished. rows: (B,) bool."""
        self.memory_keys_values = tuple(t[rows] for t in self.memory_keys_values)
        self.keys, self.values = self.keys[rows], self.values[rows]


class DecoderBlock(nn.Module):
    """Causal self-attention, attention to the encoder's output (the memory), then the feed-forward network."""

    def __init__(self, dim: int, num_heads: int, ffn_dim: int, dropout: float):
        super().__init__()
        self.self_attention = SelfAttention(dim, num_heads)
        self.self_attention_norm = AddAndNorm(dim, dropout)
        self.cross_attention = CrossAttention(dim, num_heads)
        self.cross_attention_norm = AddAndNorm(dim, dropout)
        self.feed_forward = FeedForward(dim, ffn_dim)
        self.feed_forward_norm = AddAndNorm(dim, dropout)

    def forward(
        self, x: Tensor, memory: Tensor, memory_mask: Tensor | None = None, packing: Packing | None = None
    ) -> Tensor:
        """x: (B, T, D), memory: (B, S, D), memory_mask: (B, 1, 1, S) -> (B, T, D). With a packing, x is (N, D).

        Padding stands only at the end of a target, so the causal mask already hides it from every real position.
        """
        x = self.self_attention_norm(x, self.self_attention(x, causal=True, packing=packing))
        x = self.cross_attention_norm(x, self.cross_attention(x, memory, memory_mask, packing=packing))
        return self.feed_forward_norm(x, self.feed_forward(x))

    def step(self, x: Tensor, cache: KeyValueCache, memory_mask: Tensor | None) -> Tensor:
        """The same for the newest position alone: x: (B, 1, D) -> (B, 1, D). It may see everything before it."""
        query, key, value = self.self_attention.project(x)
        x = self.self_attention_norm(x, self.self_attention.attend(query, *cache.append(key, value)))
        query = self.cross_attention.queries(x)
        x = self.cross_attention_norm(x, self.cross_attention.attend(query, *cache.memory_keys_values, memory_mask))
        return self.feed_forward_norm(x, self.feed_forward(x))
