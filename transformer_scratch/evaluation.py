"""How good a model is: what it answers by itself for every distinct pair, compared token by token."""

from dataclasses import dataclass

import torch

from transformer_scratch.data import Pair, Task
from transformer_scratch.decoding import greedy_decode
from transformer_scratch.model import Transformer


@dataclass(frozen=True)
class Prediction:
    """One answer. tokens: all that was decoded, the end token included; token_matches out of num_tokens are right."""

    pair: Pair
    tokens: list[int]
    target: list[int]

    @property
    def exact(self) -> bool:
        return self.tokens == self.target

    @property
    def token_matches(self) -> int:
        return sum(got == wanted for got, wanted in zip(self.tokens, self.target, strict=False))


def predict(model: Transformer, task: Task, pairs: list[Pair], batch_size: int = 1_000) -> list[Prediction]:
    """Decode every pair greedily, free-running. Call model.eval() first."""
    device = next(model.parameters()).device
    predictions = []
    for first in range(0, len(pairs), batch_size):
        chunk = pairs[first : first + batch_size]
        source = torch.tensor([task.encode_source(pair) for pair in chunk], device=device)
        source = source[:, : int((source != task.pad_id).sum(dim=1).max())]
        decoded = greedy_decode(model, source, task.start_id, task.end_id, task.max_target_len).tolist()
        for pair, row in zip(chunk, decoded, strict=True):
            tokens = row[: row.index(task.end_id) + 1] if task.end_id in row else row
            predictions.append(Prediction(pair, tokens, [*task.answer(pair), task.end_id]))
    return predictions


def pair_to_show(task: Task, pairs: list[Pair]) -> Pair:
    """The first with an answer of four tokens or more, so that there is something to see."""
    return next((pair for pair in pairs if len(task.answer(pair)) >= 4), pairs[0])


def exact_match(predictions: list[Prediction]) -> float:
    """The share of pairs whose whole answer is right."""
    return sum(prediction.exact for prediction in predictions) / len(predictions)
