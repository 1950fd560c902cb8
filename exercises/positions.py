"""Exercise 4: positional encoding, section 3.5.

PE(pos, 2i) = sin(pos / 10000^(2i/dim)), PE(pos, 2i+1) = cos(pos / 10000^(2i/dim))

Positions count from 0. Shapes: B batch, T positions, D model width (dim).
Check it with: python -m pytest exercises/check_positions.py
"""

import math  # noqa: F401 - for you

import torch  # noqa: F401 - for you
from torch import Tensor


def positional_encoding(length: int, dim: int) -> Tensor:
    """-> (length, dim), one row for each position. dim is even here."""
    raise NotImplementedError("positional_encoding is yours to write, from the two equations above")


def add_positions(x: Tensor) -> Tensor:
    """Add to every token the encoding of its position in its sequence. x: (B, T, D) -> same."""
    raise NotImplementedError("add_positions is yours to write: one line. Which axis of x is time?")
