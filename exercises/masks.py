"""Exercise 2: who may attend to whom.

A mask is boolean, True at (i, j) means: query i may attend to key j.

Shapes: B batch, T query positions, S key positions.
Check it with: python -m pytest exercises/check_masks.py
"""

import torch  # noqa: F401 - for you
from torch import Tensor


def padding_mask(ids: Tensor, pad_id: int) -> Tensor:
    """Nobody attends to padding: True at every id but pad_id.

    ids: (B, S) -> (B, 1, 1, S), which broadcasts over heads and queries.
    """
    raise NotImplementedError(
        "padding_mask is yours to write: compare the ids with pad_id, then add two axes"
    )


def causal_mask(length: int) -> Tensor:
    """Position i attends to itself and to the positions before it. -> (T, T), T being length."""
    raise NotImplementedError("causal_mask is yours to write: a lower triangle of True")
