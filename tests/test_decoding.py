"""Greedy decoding with its cache against the slow way without; and how answers are judged."""

import pytest
import torch
from torch.nn import functional as F

from transformer_scratch.attention import padding_mask
from transformer_scratch.blocks import DecoderBlock
from transformer_scratch.decoding import KeyValueCache, block_step, decode_step, greedy_decode
from transformer_scratch.digits import Digits
from transformer_scratch.evaluation import Prediction, exact_match, predict
from transformer_scratch.model import Transformer

TASK = Digits()
PAIRS = TASK.all_pairs()
SOURCE = torch.tensor([TASK.encode_source(pair) for pair in PAIRS])
IDS = (TASK.start_id, TASK.end_id, TASK.max_target_len)  # what greedy_decode is told of the task
NOT_THE_SAME = (
    "decoding.py goes through a block in an order of its own: decode_step and block_step no longer "
    "do what Transformer.decode and DecoderBlock.forward do. Change both alike"
)


@pytest.fixture(scope="module")
def model() -> Transformer:
    """Untrained, but with strong attention: its answers differ in content and in length."""
    torch.manual_seed(6)
    model = Transformer(
        TASK.vocab_size, dim=16, num_heads=2, num_layers=2, dropout=0.1, tie_embeddings=False
    ).double()
    with torch.no_grad():
        for block in model.decoder:
            block.self_attention.output.weight.mul_(4)
            block.cross_attention.output.weight.mul_(4)
            block.cross_attention.query.weight.mul_(8)
    return model.eval()


def decode_without_cache(model: Transformer, source: torch.Tensor) -> list[list[int]]:
    """The whole prefix anew for every token, padding left in, cut at the end token."""
    tokens = torch.full((len(source), 1), TASK.start_id)
    for _ in range(TASK.max_target_len):
        tokens = torch.cat([tokens, model(source, tokens)[:, -1:].argmax(dim=-1)], dim=1)
    answers = tokens[:, 1:].tolist()
    return [a[: a.index(TASK.end_id) + 1] if TASK.end_id in a else a for a in answers]


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
    decoded = greedy_decode(model, SOURCE, *IDS)
    expected = [
        answer + [TASK.pad_id] * (TASK.max_target_len - len(answer)) for answer in slow_answers
    ]
    assert decoded.tolist() == expected, NOT_THE_SAME


@pytest.mark.parametrize("batch_size", [3, 1_000])
def test_batches_and_dropped_rows_change_no_answer(model, batch_size):
    predictions = predict(model, TASK, PAIRS, batch_size)
    alone = [predict(model, TASK, [pair])[0].tokens for pair in PAIRS[::7]]
    assert len({len(answer) for answer in alone}) > 1, "some rows finish early"
    assert [prediction.tokens for prediction in predictions[::7]] == alone
    assert [prediction.pair for prediction in predictions] == PAIRS


def test_sources_of_many_lengths_in_one_batch(model):
    """Each is decoded as if it were alone, also after others have finished and left the batch."""
    torch.manual_seed(0)
    lengths = torch.randint(2, 10, (30,)).tolist()
    start, end = torch.tensor([TASK.start_id]), torch.tensor([TASK.end_id])
    alone = [torch.cat([start, torch.randint(10, (length - 2,)), end]) for length in lengths]
    together = torch.nn.utils.rnn.pad_sequence(alone, batch_first=True, padding_value=TASK.pad_id)
    decoded = greedy_decode(model, together, *IDS)
    assert len((decoded != TASK.pad_id).sum(dim=1).unique()) > 3, "they finish at different times"
    for source, answer in zip(alone, decoded, strict=True):
        assert torch.equal(greedy_decode(model, source[None], *IDS)[0], answer)


def test_logits_step_by_step_equal_those_of_the_whole_prefix(model):
    tokens = torch.randint(TASK.vocab_size, (5, 9))
    source = F.pad(SOURCE[:5], (0, 3), value=TASK.pad_id)
    memory, mask = model.encode(source), padding_mask(source, TASK.pad_id)
    caches = [KeyValueCache(block, memory, max_len=9) for block in model.decoder]
    steps = [decode_step(model, tokens[:, t : t + 1], t, caches, mask) for t in range(9)]
    expected = model.decode(tokens, memory, mask)
    torch.testing.assert_close(torch.stack(steps, dim=1), expected, msg=NOT_THE_SAME)
    assert not torch.allclose(expected, model.decode(tokens, memory)), "the mask hides something"


def make_block() -> tuple[DecoderBlock, torch.Tensor, torch.Tensor]:
    """A decoder block in float64, its input (3, 6, 8) and its memory (3, 4, 8)."""
    torch.manual_seed(0)
    block = DecoderBlock(8, 2, 32, dropout=0.0).double()
    return block, torch.randn(3, 6, 8).double(), torch.randn(3, 4, 8).double()


def test_a_decoder_block_step_by_step_equals_all_at_once():
    block, x, memory = make_block()
    mask = padding_mask(torch.tensor([[1, 1, 1, 1], [1, 1, 13, 13], [1, 1, 1, 13]]), pad_id=13)
    cache = KeyValueCache(block, memory, max_len=6)
    steps = [block_step(block, x[:, t : t + 1], t, cache, mask) for t in range(6)]
    torch.testing.assert_close(torch.cat(steps, dim=1), block(x, memory, mask), msg=NOT_THE_SAME)


def test_a_cache_forgets_finished_rows():
    block, x, memory = make_block()
    rows = torch.tensor([0, 2])
    whole, kept = (KeyValueCache(block, memory, max_len=2) for _ in range(2))
    for cache in (whole, kept):
        block_step(block, x[:, :1], 0, cache, None)
    kept.keep_rows(rows)
    step = block_step(block, x[rows, 1:2], 1, kept, None)
    torch.testing.assert_close(step, block_step(block, x[:, 1:2], 1, whole, None)[rows])


def test_a_source_without_padding_needs_no_mask(model):
    without = greedy_decode(model, SOURCE[:, :4], *IDS, source_is_padded=False)
    assert torch.equal(without, greedy_decode(model, SOURCE, *IDS))


def test_decoding_leaves_the_model_as_it_was():
    """Also past max_len: a table kept from inference mode could not be trained with."""
    torch.manual_seed(0)
    model = Transformer(TASK.vocab_size, dim=16, num_layers=1, dropout=0.0, max_len=4)
    never = -1  # no token ends an answer, so every one grows to the full length
    before = {**vars(model), **dict(model.named_parameters()), **dict(model.named_buffers())}
    values = {name: value.clone() for name, value in model.state_dict().items()}
    decoded = greedy_decode(model, SOURCE, TASK.start_id, never, 20)
    assert decoded.shape == (len(SOURCE), 20)

    after = {**vars(model), **dict(model.named_parameters()), **dict(model.named_buffers())}
    assert before.keys() == after.keys() and all(after[name] is before[name] for name in before)
    for name, value in model.state_dict().items():
        assert torch.equal(value, values[name])
    model(SOURCE, SOURCE).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_decoding_stops_when_all_rows_have_finished(model, monkeypatch):
    calls = []

    def always_end(model, token, position, caches, memory_mask):
        calls.append(position)
        end = torch.full((len(token),), TASK.end_id)
        return torch.nn.functional.one_hot(end, TASK.vocab_size).double()

    monkeypatch.setattr("transformer_scratch.decoding.decode_step", always_end)
    decoded = greedy_decode(model, SOURCE[:3], *IDS)
    padding = [TASK.pad_id] * (TASK.max_target_len - 1)
    assert calls == [0] and decoded.tolist() == [[TASK.end_id, *padding]] * 3


def test_an_answer_is_exact_only_as_a_whole():
    target = [[8, 7, 6, 12]]
    right = Prediction((8, 6), [8, 7, 6, 12], target)
    too_long = Prediction((8, 6), [8, 7, 6, 5, 12], target)
    no_end = Prediction((8, 6), [8, 7, 6], target)
    wrong_digit = Prediction((8, 6), [8, 7, 5, 12], target)
    assert [p.exact for p in (right, too_long, no_end, wrong_digit)] == [True, False, False, False]
    assert [p.token_matches for p in (right, too_long, no_end, wrong_digit)] == [4, 3, 3, 3]
    assert exact_match([right, too_long, no_end, wrong_digit]) == 0.25
