"""Exercise 3: multi-head attention, section 3.2.2. Every head attends on its own slice of the width.

Shapes: B batch, H heads, T query positions, S key positions, D width (dim), K head width (D / H).
Check it with: python -m pytest exercises/check_multi_head.py
"""

from torch import Tensor, nn

from transformer_scratch.attention import scaled_dot_product_attention  # noqa: F401 - for you


class MultiHeadAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(dim, dim, bias=False)  # W^Q of all heads side by side
        self.key_value = nn.Linear(dim, 2 * dim, bias=False)  # W^K and W^V: first all keys, then all values
        self.output = nn.Linear(dim, dim, bias=False)  # W^O

    def split_heads(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, H, T, K): head 0 takes the first K numbers of the width, head 1 the next K, ..."""
        raise NotImplementedError("split_heads is yours to write: cut the width into (H, K), then move H before T")

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor | None = None) -> Tensor:
        """x: (B, T, D) asks, memory: (B, S, D) answers -> (B, T, D).

        Project, split the heads, let each attend, put the heads side by side again, and project with W^O.
        """
        raise NotImplementedError("forward is yours to write, with split_heads and scaled_dot_product_attention")
