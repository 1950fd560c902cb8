"""How good a model is: its own answer to every distinct pair, compared token by token."""

from dataclasses import dataclass

import torch

from transformer_scratch.decoding import greedy_decode
from transformer_scratch.model import Transformer
from transformer_scratch.task import Pair, Task


@dataclass(frozen=True)
class Prediction:
    """One answer. tokens: all that was decoded, target: what is right, both with the end token."""

    pair: Pair
    tokens: list[int]
    target: list[int]

    @property
    def exact(self) -> bool:
        return self.tokens == self.target

    @property
    def token_matches(self) -> int:
        return sum(got == right for got, right in zip(self.tokens, self.target, strict=False))


def predict(
    model: Transformer, task: Task, pairs: list[Pair], batch_size: int = 1_000
) -> list[Prediction]:
    """Answer every pair by greedy decoding, free-running. Call model.eval() first."""
    device = next(model.parameters()).device
    predictions = []
    for first in range(0, len(pairs), batch_size):
        chunk = pairs[first : first + batch_size]
        source = torch.tensor([task.encode_source(pair) for pair in chunk])  # (B, seq_len)
        lengths = (source != task.pad_id).sum(dim=1)  # (B,)
        source = source[:, : int(lengths.max())].to(device)  # (B, S)
        decoded = greedy_decode(
            model,
            source,
            task.start_id,
            task.end_id,
            task.max_target_len,
            source_is_padded=bool(lengths.min() < lengths.max()),
        )
        for pair, row in zip(chunk, decoded.tolist(), strict=True):
            tokens = row[: row.index(task.end_id) + 1] if task.end_id in row else row
            predictions.append(Prediction(pair, tokens, [*task.answer(pair), task.end_id]))
    return predictions


def exact_match(predictions: list[Prediction]) -> float:
    """The share of pairs whose whole answer is right."""
    return sum(prediction.exact for prediction in predictions) / len(predictions)


def pair_to_show(task: Task, pairs: list[Pair]) -> Pair:
    """The first with an answer of four tokens or more, so that there is something to see."""
    return next((pair for pair in pairs if len(task.answer(pair)) >= 4), pairs[0])
