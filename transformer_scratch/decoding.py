"""Greedy decoding: the model's own answer, token by token, with nothing of the target shown to it.

Shapes: B batch, S source positions, T decoded positions.
"""

import torch
from torch import Tensor

from transformer_scratch.attention import padding_mask
from transformer_scratch.model import Transformer


@torch.inference_mode()
def greedy_decode(model: Transformer, source: Tensor, start_id: int, end_id: int, max_len: int) -> Tensor:
    """Start with start_id and append the likeliest token until end_id or max_len tokens.

    source: (B, S) ids -> (B, max_len) ids without the start token, end_id included, padded with the model's pad_id.
    Call model.eval() first: dropout would roll dice over the answer.
    """
    memory_mask = padding_mask(source, model.pad_id)  # (B, 1, 1, S)
    caches = model.start_caches(model.encode(source))
    decoded = torch.full((len(source), max_len), model.pad_id, device=source.device)  # (B, T)
    unfinished = torch.arange(len(source), device=source.device)  # the rows of `decoded` that still grow
    token = torch.full((len(source), 1), start_id, device=source.device)

    for position in range(max_len):
        logits = model.decode_step(token, position, caches, memory_mask)  # (B, V)
        token = logits.argmax(dim=-1, keepdim=True)  # (B, 1)
        decoded[unfinished, position] = token.squeeze(1)

        growing = token.squeeze(1) != end_id
        if not growing.all():  # a finished sequence costs nothing from here on
            if not growing.any():
                break
            unfinished, token, memory_mask = unfinished[growing], token[growing], memory_mask[growing]
            for cache in caches:
                cache.keep_rows(growing)

    return decoded
