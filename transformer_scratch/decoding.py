"""Greedy decoding and beam search: the model's own answer, without seeing the target.

Shapes: B batch, S source positions, T decoded positions, D model width, H heads, K head dim,
V vocabulary; in a beam search R sources not yet answered, W hypotheses of each.
"""

import torch
from torch import Tensor

from transformer_scratch.attention import padding_mask
from transformer_scratch.blocks import DecoderBlock
from transformer_scratch.model import Transformer


@torch.inference_mode()
def greedy_decode(
    model: Transformer,
    source: Tensor,
    start_id: int,
    end_id: int,
    max_len: int,
    source_is_padded: bool = True,
) -> Tensor:
    """Start with start_id and append the likeliest token, up to end_id or to max_len tokens.

    source: (B, S) ids -> (B, max_len) ids: no start token; after end_id the model's pad_id.
    Call model.eval() first: dropout would make the answer random.
    """
    memory = model.encode(source, source_is_padded)  # (B, S, D)
    memory_mask = padding_mask(source, model.pad_id) if source_is_padded else None
    caches = [KeyValueCache(block, memory, max_len) for block in model.decoder]
    decoded = source.new_full((len(source), max_len), model.pad_id)  # (B, T)
    token = source.new_full((len(source), 1), start_id)  # (B, 1)
    rows = torch.arange(len(source), device=source.device)  # rows not yet finished

    for position in range(max_len):
        logits = decode_step(model, token, position, caches, memory_mask)  # (B, V)
        token = logits.argmax(dim=-1, keepdim=True)  # (B, 1)
        decoded[rows, position] = token.squeeze(1)

        # nonzero() makes the host wait for the device, once per position.
        unfinished = (token.squeeze(1) != end_id).nonzero().squeeze(1)
        if len(unfinished) == 0:
            break
        if len(unfinished) < len(rows):  # a finished sequence costs nothing from here on
            rows, token = rows[unfinished], token[unfinished]
            memory_mask = memory_mask[unfinished] if memory_mask is not None else None
            for cache in caches:
                cache.keep_rows(unfinished)

    return decoded


class KeyValueCache:
    """The keys and values of one decoder block, so that each position is projected only once."""

    def __init__(self, block: DecoderBlock, memory: Tensor, max_len: int):
        """memory: (B, S, D) is projected here; there is room for max_len decoded positions."""
        attention = block.cross_attention
        # Contiguous, because they are read at every step.
        self.memory_key = attention.split_heads(attention.key(memory)).contiguous()  # (B, H, S, K)
        self.memory_value = attention.split_heads(attention.value(memory)).contiguous()
        B, H, _, K = self.memory_key.shape
        self.key = self.memory_key.new_empty(B, H, max_len, K)
        self.value = torch.empty_like(self.key)

    def add(self, position: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add a position's key and value, (B, H, 1, K) -> all up to it, (B, H, t, K) each."""
        self.key[:, :, position] = key.squeeze(2)
        self.value[:, :, position] = value.squeeze(2)
        return self.key[:, :, : position + 1], self.value[:, :, : position + 1]

    def keep_rows(self, rows: Tensor) -> None:
        """Forget all other sequences. rows: int64 indices into the batch, the new order.

        A row that is named twice is continued twice.
        """
        self.memory_key, self.memory_value = self.memory_key[rows], self.memory_value[rows]
        self.key, self.value = self.key[rows], self.value[rows]


def decode_step(
    model: Transformer,
    token: Tensor,
    position: int,
    caches: list[KeyValueCache],
    memory_mask: Tensor | None = None,
) -> Tensor:
    """What model.decode predicts after one more token, at the cost of one token.

    token: (B, 1) ids at this position; the caches hold all earlier ones -> logits: (B, V).
    """
    x = model.embed(token, model.target_embedding, start=position)  # (B, 1, D)
    for block, cache in zip(model.decoder, caches, strict=True):
        x = block_step(block, x, position, cache, memory_mask)
    return model.output(x).squeeze(1)


def block_step(
    block: DecoderBlock, x: Tensor, position: int, cache: KeyValueCache, memory_mask: Tensor | None
) -> Tensor:
    """DecoderBlock.forward for the newest position alone, which may see everything before it.

    x: (B, 1, D) -> (B, 1, D)
    """
    attention = block.self_attention
    query, key, value = (
        attention.split_heads(project(x))  # (B, H, 1, K)
        for project in (attention.query, attention.key, attention.value)
    )
    attended = attention.attend(query, *cache.add(position, key, value))
    x = block.self_attention_norm(x, attended)

    attention = block.cross_attention
    query = attention.split_heads(attention.query(x))  # (B, H, 1, K)
    attended = attention.attend(query, cache.memory_key, cache.memory_value, memory_mask)
    x = block.cross_attention_norm(x, attended)

    return block.feed_forward_norm(x, block.feed_forward(x))


@torch.inference_mode()
def beam_decode(
    model: Transformer,
    source: Tensor,
    start_id: int,
    end_id: int,
    max_len: int,
    beam: int,
    length_penalty: float = 0.6,
    source_is_padded: bool = True,
) -> Tensor:
    """Follow the `beam` likeliest answers at once; -> the best finished one: section 6.1.

    source: (B, S) ids -> (B, max_len) ids, as from greedy_decode, which a beam of 1 equals. Answers
    are ranked by log probability / ((5 + length) / 6)^length_penalty, the end token counted in the
    length (Wu et al., 2016, equation 14). A finished answer leaves the beam, which gets narrower;
    one that max_len cuts off counts as it is. beam >= 1, length_penalty >= 0.
    """
    memory = model.encode(source, source_is_padded)  # (B, S, D)
    memory_mask = padding_mask(source, model.pad_id) if source_is_padded else None
    caches = [KeyValueCache(block, memory, max_len) for block in model.decoder]
    best_answer = source.new_full((len(source), max_len), model.pad_id)  # (B, T)
    best_score = memory.new_full((len(source),), -torch.inf, dtype=torch.float32)  # (B,)

    rows = torch.arange(len(source), device=source.device)  # (R,) the sources not yet answered
    # One hypothesis of each to begin with, W = 1: copies of it would all be continued alike.
    answers = best_answer.clone()  # (R x W, T)
    token = source.new_full((len(source), 1), start_id)  # (R x W, 1)
    log_prob = memory.new_zeros((len(source), 1), dtype=torch.float32)  # (R, W)
    places = source.new_full((len(source), 1), beam)  # (R, 1), beam minus the finished answers

    for position in range(max_len):
        length = position + 1
        logits = decode_step(model, token, position, caches, memory_mask)  # (R x W, V)
        log_prob, parent, token = likeliest_expansions(logits, log_prob, beam)  # (R, W) each
        answers = answers[parent]  # (R, W, T)
        answers[:, :, position] = token

        # A log probability of -inf stands for "no hypothesis": it stays so in every expansion.
        place = torch.arange(token.size(1), device=token.device)  # (W,), the likeliest first
        log_prob = log_prob.masked_fill(place >= places, -torch.inf)
        finished = (token == end_id) | (length == max_len)  # (R, W)
        finished &= log_prob > -torch.inf
        places = places - finished.sum(dim=1, keepdim=True)

        score = log_prob.masked_fill(~finished, -torch.inf) / penalty(length, length_penalty)
        score, place = score.max(dim=1)  # (R,), the best that finished now
        answer = answers[torch.arange(len(rows), device=rows.device), place]  # (R, T)
        better = score > best_score[rows]
        best_score[rows] = torch.where(better, score, best_score[rows])
        best_answer[rows] = torch.where(better[:, None], answer, best_answer[rows])

        # Log probabilities only fall, so the best that can still come is the likeliest hypothesis
        # at its present log probability and the greatest length: -inf where none is left.
        log_prob = log_prob.masked_fill(finished, -torch.inf)
        bound = log_prob.max(dim=1).values / penalty(max_len, length_penalty)  # (R,)
        # nonzero() makes the host wait for the device, once per position.
        unanswered = (bound > best_score[rows]).nonzero().squeeze(1)
        if len(unanswered) == 0:
            break
        rows, places, log_prob = rows[unanswered], places[unanswered], log_prob[unanswered]
        answers = answers[unanswered].flatten(0, 1)  # (R x W, T)
        token = token[unanswered].view(-1, 1)  # (R x W, 1)
        parent = parent[unanswered].flatten()  # (R x W,)
        memory_mask = memory_mask[parent] if memory_mask is not None else None
        for cache in caches:
            cache.keep_rows(parent)

    return best_answer


def likeliest_expansions(
    logits: Tensor, log_prob: Tensor, beam: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Append every token to every hypothesis; -> the `beam` likeliest of each source, best first.

    logits: (R x W, V), log_prob: (R, W) -> the new log probabilities, the rows of the batch that
    were continued, and the tokens: (R, beam) each, or (R, W x V) where that is less.
    """
    # Sorted before they are added up, because sums round away small differences. Both sorts are
    # stable: of equals the lowest token comes first, as with argmax.
    logits, token = logits.sort(dim=-1, descending=True, stable=True)  # (R x W, V)
    token = token[:, :beam]  # (R x W, C), C candidates: no more of one hypothesis can be needed
    added = logits.log_softmax(dim=-1, dtype=torch.float32)[:, :beam]  # (R x W, C)
    total = log_prob[:, :, None] + added.unflatten(0, log_prob.shape)  # (R, W, C)
    total = total.flatten(1)  # (R, W x C)

    first = torch.arange(len(total), device=total.device)[:, None] * total.size(1)  # (R, 1)
    total, candidate = total.sort(dim=-1, descending=True, stable=True)
    candidate = (first + candidate)[:, :beam]  # counted through all R x W x C
    return total[:, :beam], candidate // token.size(1), token.flatten()[candidate]


def penalty(length: int, length_penalty: float) -> float:
    """What the log probability of an answer is divided by: 1 for one token, more for longer ones.

    Without it short answers would win, since each token makes an answer less likely.
    """
    return ((5 + length) / 6) ** length_penalty
