"""The blocks that encoder and decoder are stacked from: section 3.1, post-norm as in figure 1.

Shapes: B batch, S source positions, T target positions, D model width (dim).
"""

from torch import Tensor, nn

from transformer_scratch.attention import MultiHeadAttention


class FeedForward(nn.Sequential):
    """FFN(x) = max(0, x W_1 + b_1) W_2 + b_2, equation (2): the same layers at every position."""

    def __init__(self, dim: int, ffn_dim: int):
        super().__init__(nn.Linear(dim, ffn_dim), nn.ReLU(), nn.Linear(ffn_dim, dim))


class AddAndNorm(nn.Module):
    """LayerNorm(x + Dropout(Sublayer(x))), sections 3.1 and 5.4, around every sub-layer.

    There is no other dropout in a block.
    """

    def __init__(self, dim: int, dropout: float):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, sublayer_output: Tensor) -> Tensor:
        return self.norm(x + self.dropout(sublayer_output))


class EncoderBlock(nn.Module):
    """Self-attention, then the feed-forward network."""

    def __init__(self, dim: int, num_heads: int, ffn_dim: int, dropout: float):
        super().__init__()
        self.self_attention = MultiHeadAttention(dim, num_heads)
        self.self_attention_norm = AddAndNorm(dim, dropout)
        self.feed_forward = FeedForward(dim, ffn_dim)
        self.feed_forward_norm = AddAndNorm(dim, dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x: (B, S, D), mask: (B, 1, 1, S) -> (B, S, D)."""
        x = self.self_attention_norm(x, self.self_attention(x, x, mask))
        return self.feed_forward_norm(x, self.feed_forward(x))


class DecoderBlock(nn.Module):
    """Causal self-attention, attention to the encoder's output (the memory), feed-forward."""

    def __init__(self, dim: int, num_heads: int, ffn_dim: int, dropout: float):
        super().__init__()
        self.self_attention = MultiHeadAttention(dim, num_heads)
        self.self_attention_norm = AddAndNorm(dim, dropout)
        self.cross_attention = MultiHeadAttention(dim, num_heads)
        self.cross_attention_norm = AddAndNorm(dim, dropout)
        self.feed_forward = FeedForward(dim, ffn_dim)
        self.feed_forward_norm = AddAndNorm(dim, dropout)

    def forward(self, x: Tensor, memory: Tensor, memory_mask: Tensor | None = None) -> Tensor:
        """x: (B, T, D), memory: (B, S, D), memory_mask: (B, 1, 1, S) -> (B, T, D).

        A target is padded at its end only, where the causal mask already hides the padding from
        every real position.
        """
        x = self.self_attention_norm(x, self.self_attention(x, x, causal=True))
        x = self.cross_attention_norm(x, self.cross_attention(x, memory, memory_mask))
        return self.feed_forward_norm(x, self.feed_forward(x))
