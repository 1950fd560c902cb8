"""Each benchmark runs and prints its table; and what makes training fast changes no number. Nothing here is timed."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import train
from benchmarks import decode, scaling, startup, throughput, where_time_goes
from benchmarks.article_baseline import ArticleTransformer, article_loader
from benchmarks.measure import Timing, interleave
from benchmarks.ways import Ways, packed_loss, padded_loss
from transformer_scratch import attention
from transformer_scratch.attention import padding_mask
from transformer_scratch.data import PairDataset, Task, make_loader
from transformer_scratch.model import Transformer

TASK = Task()


# ------------------------------------------------------------------------------------------------ the commands


@pytest.mark.parametrize(
    ("benchmark", "name", "in_table"),
    [
        (throughput, "throughput-dim16", ["+ padding in between left out", "nn.Transformer, dropout 0"]),
        (decode, "decode", ["| 16 | cache |", "| 16 | article, fixed length |"]),
        (where_time_goes, "where-time-goes-dim16", ["| matrix products |", "| everything else |"]),
        pytest.param(scaling, "scaling", ["| processes | 2 |"], marks=pytest.mark.slow),
    ],
)
def test_prints_its_table_and_writes_its_files(benchmark, name, in_table, tmp_path, capsys):
    benchmark.main(["--quick", "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    assert all(text in printed for text in in_table), printed
    result = json.loads((tmp_path / f"{name}.json").read_text())
    assert result["machine"]["torch"] == torch.__version__
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_startup_prints_its_table_and_a_start_loads_nothing_that_training_does_not_use(tmp_path, capsys):
    """torch._dynamo, sympy and numpy come with PyTorch's own optimizers; what draws and what compares does not come."""
    startup.main(["--quick", "--output", str(tmp_path)])
    assert "| train.py --wandb disabled |" in capsys.readouterr().out and (tmp_path / "startup.png").exists()
    (imported,) = json.loads((tmp_path / "startup.json").read_text())["imported"].values()
    assert {"torch", "wandb", "tyro", "tqdm"} <= set(imported), "the list is that of train.py"
    assert not set(imported) & {"matplotlib", "PIL", "pandas", "pytorch_lightning", "torchvision", "pytest"}


def test_contenders_take_turns():
    order = []
    timings = interleave({name: lambda name=name: order.append(name) for name in "AB"}, rounds=3, description="")
    assert "".join(order) == "BA" + "ABBAAB" and [len(timing.seconds) for timing in timings.values()] == [3, 3]
    given = interleave({"A": iter([9.0, 3.0, 1.0, 2.0]).__next__}, rounds=3, description="")["A"]
    assert given.seconds == [3.0, 1.0, 2.0] and given.median == 2.0, "the first is a warm-up"
    assert Timing([4.0, 1.0, 2.0, 3.0, 100.0]).quartiles == (2.0, 4.0)


# ------------------------------------------------------------------------------- what is compared is the same work


@pytest.mark.parametrize("digits", [(4, 4), (2, 7)])
def test_useful_operations_are_those_that_pytorch_counts_where_nothing_is_padded(monkeypatch, digits):
    monkeypatch.setattr(attention, "is_fused_faster", lambda query, key: False)  # PyTorch cannot count in the kernel
    ways = Ways(dim=32, num_heads=2, num_layers=2, batch_size=8)
    ways.data = PairDataset(TASK, [digits] * 8)
    batch = ways.data[torch.arange(8), 0]
    with FlopCounterMode(display=False) as counter:
        packed_loss(ways.model(0.0).train(), batch, TASK.pad_id).backward()
    assert ways.useful_flops() == counter.get_total_flops()


def test_the_articles_way_is_padded_dropped_out_and_causal():
    torch.manual_seed(0)
    model = ArticleTransformer(TASK.vocab_size, dim=16, num_heads=2, num_layers=2, ffn_dim=64, dropout=0.1)
    source, decoder_input, target = next(iter(article_loader(TASK, TASK.all_pairs(), batch_size=8)))
    assert (source.shape, decoder_input.shape, target.shape) == ((8, 16), (8, 15), (8, 15))
    assert sum(isinstance(module, torch.nn.Dropout) for module in model.modules()) == 1 + 2 * (1 + 1 + 1) + 2 * (
        2 + 1 + 1
    )
    model.eval()
    logits, changed = model(source, decoder_input), decoder_input.clone()
    changed[:, 3:] = 0
    torch.testing.assert_close(model(source, changed)[:, :3], logits[:, :3])
    assert not torch.allclose(model(source, changed)[:, 3], logits[:, 3])


def test_every_way_of_the_waterfall_learns():
    ways = Ways(dim=16, num_heads=2, num_layers=1, batch_size=8)
    for name, step in {**throughput.waterfall(ways, torch.bfloat16), **throughput.against_torch(ways, None)}.items():
        (model,) = [cell.cell_contents for cell in step.__closure__ if isinstance(cell.cell_contents, torch.nn.Module)]
        before = {key: weight.detach().clone() for key, weight in model.named_parameters()}
        step()
        unmoved = [key for key, weight in model.named_parameters() if torch.equal(weight, before[key])]
        assert not unmoved, (name, unmoved)


# ---------------------------------------------------------------- leaving out the padding changes nothing


def make_model(**settings) -> Transformer:
    torch.manual_seed(0)
    return Transformer(TASK.vocab_size, **({"dim": 32, "num_heads": 2, "num_layers": 2, "dropout": 0.0} | settings))


def make_batch():
    """Every pair: answers of all lengths."""
    return PairDataset(TASK, TASK.all_pairs())[torch.arange(100), 0]


def test_packed_logits_are_the_padded_ones():
    model, batch = make_model(), make_batch()
    padded = model(batch.source, batch.decoder_input)
    packed = model(batch.source, batch.decoder_input, batch.tokens)
    assert len(batch.tokens) == batch.num_tokens == (batch.target != TASK.pad_id).sum() < padded[..., 0].numel() / 1.5
    torch.testing.assert_close(packed, padded.flatten(0, 1)[batch.tokens], rtol=1e-5, atol=1e-6)


def test_packed_gradients_are_the_padded_ones():
    batch, gradients = make_batch(), []
    for loss_function in (packed_loss, padded_loss):
        model = make_model().double()
        loss_function(model, batch, TASK.pad_id).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_train_computes_this_loss():
    model, batch = make_model(), make_batch()
    assert train.token_loss(model, batch).equal(packed_loss(model, batch, TASK.pad_id))
    padded = padded_loss(model, batch, TASK.pad_id)
    torch.testing.assert_close(train.token_loss(model, batch), padded, rtol=1e-6, atol=0)


def test_what_stands_in_the_padding_is_not_even_read():
    model, batch = make_model(), make_batch()
    decoder_input = batch.decoder_input.flatten()
    left_out = torch.ones(len(decoder_input), dtype=torch.bool)
    left_out[batch.tokens] = False
    scribbled = torch.where(left_out, torch.randint(10, (len(decoder_input),)), decoder_input)
    scribbled = scribbled.view_as(batch.decoder_input)
    assert not scribbled.equal(batch.decoder_input)
    expected = model(batch.source, batch.decoder_input, batch.tokens)
    assert model(batch.source, scribbled, batch.tokens).equal(expected)


def test_a_token_left_out_by_mistake_is_noticed():
    """So the tests above can fail: without its first digits, a longer answer comes out otherwise."""
    model, batch = make_model(), make_batch()
    wrong = batch.tokens[batch.tokens % batch.target.size(1) != 1]
    packed = model(batch.source, batch.decoder_input, wrong)
    right = model(batch.source, batch.decoder_input).flatten(0, 1)[wrong]
    later = wrong % batch.target.size(1) > 1
    assert torch.allclose(packed[~later], right[~later], atol=1e-6)
    assert not torch.isclose(packed[later], right[later], atol=1e-3).all(dim=1).any()


@pytest.mark.parametrize("fused", [True, False])
def test_packing_with_either_way_of_attention(monkeypatch, fused):
    monkeypatch.setattr(attention, "is_fused_faster", lambda query, key: fused)
    task = Task(num_categories=80, seq_len=90)
    torch.manual_seed(0)
    model = Transformer(task.vocab_size, 16, 2, 1, dropout=0.0, pad_id=task.pad_id)
    batch = PairDataset(task, [(0, 79), (3, 3), (50, 20)])[torch.arange(3), 0]
    padded = model(batch.source, batch.decoder_input).flatten(0, 1)[batch.tokens]
    packed = model(batch.source, batch.decoder_input, batch.tokens)
    torch.testing.assert_close(packed, padded, rtol=1e-5, atol=1e-6)


def test_a_mask_that_hides_nothing_is_left_out(monkeypatch):
    """To the last bit, gradients too."""
    batch, results = make_batch(), []
    assert make_model().source_mask(batch.source) is None, "four tokens each, cut to their longest"
    padded = torch.nn.functional.pad(batch.source, (0, 2), value=TASK.pad_id)
    assert make_model().source_mask(padded).shape == (100, 1, 1, 6)
    for mask in (Transformer.source_mask, lambda model, source: padding_mask(source, model.pad_id)):
        monkeypatch.setattr(Transformer, "source_mask", mask)
        model = make_model()
        loss = train.token_loss(model, batch)
        loss.backward()
        results.append([loss, *(parameter.grad for parameter in model.parameters())])
    assert all(one.equal(other) for one, other in zip(*results, strict=True))


def test_the_loader_counts_the_tokens_of_every_batch():
    ways = Ways(dim=16, num_heads=1, num_layers=1, batch_size=32)
    for batch in make_loader(ways.loader(ways.data).sampler):
        assert batch.tokens.equal((batch.target.flatten() != TASK.pad_id).nonzero().squeeze(1))
        assert batch.update_tokens == batch.num_tokens == len(batch.tokens)
