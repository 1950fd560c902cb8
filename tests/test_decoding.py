"""Greedy decoding with its cache, against the slow way that needs none; and how answers are judged."""

import pytest
import torch

from transformer_scratch.data import Task
from transformer_scratch.decoding import greedy_decode
from transformer_scratch.evaluation import Prediction, exact_match, predict
from transformer_scratch.model import Transformer

TASK = Task()
PAIRS = TASK.all_pairs()
SOURCE = torch.tensor([TASK.encode_source(pair) for pair in PAIRS])


@pytest.fixture(scope="module")
def model() -> Transformer:
    """Untrained, but made to listen to source and prefix, so that its answers differ in content and in length."""
    torch.manual_seed(3)
    model = Transformer(TASK.vocab_size, dim=16, num_heads=2, num_layers=2, dropout=0.1, tie_embeddings=False).double()
    with torch.no_grad():
        for block in model.decoder:
            block.self_attention.output.weight.mul_(4)
            block.cross_attention.output.weight.mul_(4)
            block.cross_attention.query.weight.mul_(8)
    return model.eval()


def decode_without_cache(model: Transformer, source: torch.Tensor) -> list[list[int]]:
    """One pair at a time, the whole prefix anew for every token, padding left in."""
    answers = []
    for row in source:
        tokens = [TASK.start_id]
        while len(tokens) <= TASK.max_target_len and tokens[-1] != TASK.end_id:
            tokens.append(int(model(row[None], torch.tensor([tokens]))[0, -1].argmax()))
        answers.append(tokens[1:])
    return answers


@pytest.fixture(scope="module")
def slow_answers(model) -> list[list[int]]:
    with torch.inference_mode():
        return decode_without_cache(model, SOURCE)


def test_the_slow_answers_are_worth_comparing(slow_answers):
    lengths = {len(answer) for answer in slow_answers}
    assert len(lengths) > 3 and len({tuple(answer) for answer in slow_answers}) > 20
    assert any(TASK.end_id in answer for answer in slow_answers), "some rows finish early"
    assert any(TASK.end_id not in answer for answer in slow_answers), "some never do"


def test_the_cache_gives_the_same_answer_for_every_pair(model, slow_answers):
    decoded = greedy_decode(model, SOURCE, TASK.start_id, TASK.end_id, TASK.max_target_len)
    assert decoded.tolist() == [answer + [TASK.pad_id] * (TASK.max_target_len - len(answer)) for answer in slow_answers]


@pytest.mark.parametrize("batch_size", [1, 7, 1_000])
def test_batches_and_dropped_rows_change_no_answer(model, slow_answers, batch_size):
    predictions = predict(model, TASK, PAIRS, batch_size)
    assert [prediction.tokens for prediction in predictions] == slow_answers
    assert [prediction.pair for prediction in predictions] == PAIRS


def test_sources_of_many_lengths_in_one_batch(model):
    """Each is decoded as if it were alone, also after others have finished and left the batch."""
    torch.manual_seed(0)
    lengths = torch.randint(2, 10, (60,)).tolist()
    alone = [
        torch.cat([torch.tensor([11]), torch.randint(10, (length - 2,)), torch.tensor([12])]) for length in lengths
    ]
    together = torch.nn.utils.rnn.pad_sequence(alone, batch_first=True, padding_value=TASK.pad_id)
    decoded = greedy_decode(model, together, 11, 12, 15)
    assert len((decoded != TASK.pad_id).sum(dim=1).unique()) > 3, "they finish at different times"
    for source, answer in zip(alone, decoded, strict=True):
        assert torch.equal(greedy_decode(model, source[None], 11, 12, 15)[0], answer)


def test_logits_step_by_step_equal_those_of_the_whole_prefix(model):
    tokens = torch.randint(14, (5, 9))
    memory = model.encode(SOURCE[:5, :4])
    caches = model.start_caches(memory)
    steps = torch.stack([model.decode_step(tokens[:, t : t + 1], t, caches) for t in range(9)], dim=1)
    torch.testing.assert_close(steps, model.decode(tokens, memory))


def test_decoding_stops_when_all_rows_have_finished(model, monkeypatch):
    calls = []

    def always_end(token, position, caches, memory_mask):
        calls.append(position)
        for cache in caches:
            cache.append(*(torch.zeros(len(token), 2, 1, 8).double() for _ in range(2)))
        return torch.nn.functional.one_hot(torch.full((len(token),), TASK.end_id), 14).double()

    monkeypatch.setattr(model, "decode_step", always_end)
    decoded = greedy_decode(model, SOURCE[:3], TASK.start_id, TASK.end_id, 15)
    assert calls == [0] and decoded.tolist() == [[12] + [13] * 14] * 3


def test_an_answer_is_exact_only_as_a_whole():
    target = [8, 7, 6, 12]
    right = Prediction((8, 6), [8, 7, 6, 12], target)
    too_long = Prediction((8, 6), [8, 7, 6, 5, 12], target)
    no_end = Prediction((8, 6), [8, 7, 6], target)
    wrong_digit = Prediction((8, 6), [8, 7, 5, 12], target)
    assert [p.exact for p in (right, too_long, no_end, wrong_digit)] == [True, False, False, False]
    assert [p.token_matches for p in (right, too_long, no_end, wrong_digit)] == [4, 3, 3, 3]
    assert exact_match([right, too_long, no_end, wrong_digit]) == 0.25
