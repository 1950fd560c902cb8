"""Exercise 3: multi-head attention, section 3.2.2. Each head attends on its own slice of the width.

Shapes: B batch, H heads, T query positions, S key positions, D model width (dim),
K head dim (D / H).
Check it with: python -m pytest exercises/check_multi_head.py
"""

import torch  # noqa: F401 - for you
from torch import Tensor, nn

# (query, key, value, mask): (B, H, T, K), (B, H, S, K), (B, H, S, K) -> (B, H, T, K)
from transformer_scratch.attention import scaled_dot_product_attention  # noqa: F401 - for you


class MultiHeadAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        # Each matrix holds the projections of all heads side by side.
        self.query = nn.Linear(dim, dim, bias=False)  # W^Q
        self.key = nn.Linear(dim, dim, bias=False)  # W^K
        self.value = nn.Linear(dim, dim, bias=False)  # W^V
        self.output = nn.Linear(dim, dim, bias=False)  # W^O

    def split_heads(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, H, T, K): the first K numbers of the width go to head 0, and so on."""
        raise NotImplementedError(
            "split_heads is yours to write: cut the width into (H, K), then move H before T"
        )

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor | None = None) -> Tensor:
        """Let x: (B, T, D) attend to memory: (B, S, D), which gives keys and values. -> (B, T, D).

        Project, split the heads, let each attend (mask: broadcastable to (B, H, T, S)), put the
        heads side by side again, and project with W^O.
        """
        raise NotImplementedError(
            "forward is yours to write, with split_heads and scaled_dot_product_attention"
        )
