"""How good a model is: its own answer to every distinct question, compared token by token."""

from dataclasses import dataclass
from functools import cached_property

import torch

from transformer_scratch.batches import Sequences
from transformer_scratch.decoding import beam_decode, greedy_decode
from transformer_scratch.model import Transformer
from transformer_scratch.task import Pair, Task


@dataclass(frozen=True)
class Prediction:
    """One answer. tokens: all that was decoded; targets: each right answer.

    Both have their end token, unless decoding ended before it came.
    """

    pair: Pair
    tokens: list[int]
    targets: list[list[int]]

    @property
    def exact(self) -> bool:
        return self.tokens in self.targets

    @cached_property
    def nearest(self) -> list[int]:
        """The right answer that takes the fewest edits."""
        if self.exact:
            return self.tokens
        return min(self.targets, key=self.edits_to) if len(self.targets) > 1 else self.targets[0]

    @property
    def token_matches(self) -> int:
        return sum(got == right for got, right in zip(self.tokens, self.nearest, strict=False))

    @cached_property
    def edits(self) -> int:
        """How many it takes to turn the answer into the nearest right one."""
        return 0 if self.exact else self.edits_to(self.nearest)

    def edits_to(self, target: list[int]) -> int:
        """Of tokens, the end token aside."""
        *right, end = target
        return edit_distance([token for token in self.tokens if token != end], right)


def edit_distance(a: list[int], b: list[int]) -> int:
    """The fewest insertions, deletions and substitutions that turn a into b (Levenshtein)."""
    distances = list(range(len(b) + 1))  # from the first i tokens of a to each beginning of b
    for i, token in enumerate(a, start=1):
        diagonal, distances[0] = distances[0], i
        for j, other in enumerate(b, start=1):
            substituted = diagonal + (token != other)
            diagonal = distances[j]
            distances[j] = min(substituted, distances[j] + 1, distances[j - 1] + 1)
    return distances[-1]


# Numbers that the key-value caches of a batch may hold: half a GiB of float32.
MOST_CACHED = 2**27


def predict(
    model: Transformer,
    task: Task,
    pairs: list[Pair],
    batch_size: int = 1_000,
    beam: int = 1,
    length_penalty: float = 0.6,
) -> list[Prediction]:
    """Answer every pair's source by decoding, free-running. Call model.eval() first.

    beam: hypotheses that are followed; with 1 the decoding is greedy.
    """
    device = next(model.parameters()).device
    # Keys and values, of the source and of the answer, in every block.
    cached_for_one = 4 * len(model.decoder) * model.dim * task.seq_len * beam
    batch_size = max(1, min(batch_size, MOST_CACHED // cached_for_one))
    predictions = []
    for first in range(0, len(pairs), batch_size):
        chunk = pairs[first : first + batch_size]
        source = Sequences(map(task.encode_source, chunk), task.vocab_size)
        is_padded = bool(source.lengths.min() < source.lengths.max())
        source = source.padded(torch.arange(len(chunk)), task.pad_id).to(device)  # (B, S)
        question = (model, source, task.start_id, task.end_id, task.max_target_len)
        if beam == 1:
            decoded = greedy_decode(*question, source_is_padded=is_padded)
        else:
            decoded = beam_decode(*question, beam, length_penalty, source_is_padded=is_padded)
        for pair, row in zip(chunk, decoded.tolist(), strict=True):
            tokens = row[: row.index(task.end_id) + 1] if task.end_id in row else row
            predictions.append(Prediction(pair, tokens, task.answers(pair)))
    return predictions


def exact_match(predictions: list[Prediction]) -> float:
    """The share of questions whose whole answer is right."""
    return sum(prediction.exact for prediction in predictions) / len(predictions)


def token_error_rate(predictions: list[Prediction]) -> float:
    """The edits that all answers take, over the tokens of the nearest right ones, without the end.

    Of phonemes this is the phoneme error rate, of words the word error rate.
    """
    num_tokens = sum(len(prediction.nearest) - 1 for prediction in predictions)
    return sum(prediction.edits for prediction in predictions) / num_tokens


def example_to_show(task: Task, pairs: list[Pair]) -> Pair:
    """The first with an answer of four tokens or more, so that there is something to see."""
    return next((pair for pair in pairs if len(task.answers(pair)[0]) > 4), pairs[0])
