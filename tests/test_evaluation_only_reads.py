"""Evaluating, decoding and drawing leave the model as it is trained on: its tensors, its modes, its
attributes. A tensor of inference mode that gets into it would end the training after the epoch.
"""

from collections.abc import Callable

import pytest
import torch
from torch import nn

import evaluate as evaluate_script
import train as train_script
from transformer_scratch import plots
from transformer_scratch.attention import MultiHeadAttention
from transformer_scratch.batches import BatchSampler, PairDataset, make_loader
from transformer_scratch.decoding import greedy_decode
from transformer_scratch.digits import Digits
from transformer_scratch.evaluation import predict
from transformer_scratch.model import Transformer

TASK = Digits(10, 16)
CPU = torch.device("cpu")
# As long as the answers are that the model is asked for: longer than the positions it has.
SHORT = 4


@pytest.fixture
def model() -> Transformer:
    torch.manual_seed(0)
    sizes = {"vocab_size": TASK.vocab_size, "dim": 16, "num_layers": 1, "pad_id": TASK.pad_id}
    return Transformer(**sizes, max_len=SHORT).eval()


def batches() -> torch.utils.data.DataLoader:
    return make_loader(BatchSampler(PairDataset(TASK, TASK.all_pairs()), batch_size=50))


def everything_about(model: nn.Module) -> dict[str, object]:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        "modes": {name: module.training for name, module in model.named_modules()},
        "attributes": {name: attributes(module) for name, module in model.named_modules()},
        "tensors": {name: id(tensor) for name, tensor in tensors.items()},
        "values": {name: tensor.detach().numpy().tobytes() for name, tensor in tensors.items()},
        "of inference mode": [name for name, tensor in tensors.items() if tensor.is_inference()],
        "with gradient": [name for name, tensor in tensors.items() if tensor.requires_grad],
        "gradients": [name for name, tensor in tensors.items() if tensor.grad is not None],
    }


def attributes(module: nn.Module) -> dict[str, object]:
    """Hooks, parameters and modules lie in dicts of their own."""
    return {
        name: list(value) if isinstance(value, dict) else id(value)
        for name, value in vars(module).items()
        if name != "training"
    }


def train_evaluate(model: Transformer) -> None:
    autocast = torch.amp.autocast("cpu", dtype=torch.bfloat16)
    train_script.evaluate(model, batches(), autocast, CPU)


def mean_loss(model: Transformer) -> None:
    evaluate_script.mean_loss(model, PairDataset(TASK, TASK.all_pairs()), CPU)


def predict_all(model: Transformer) -> None:
    predict(model, TASK, TASK.all_pairs())


def decode_far(model: Transformer) -> None:
    greedy_decode(model, torch.tensor([[11, 8, 4, 12]]), 11, end_id=-1, max_len=100)


def record_attention(model: Transformer) -> None:
    plots.record_attention(model, [11, 8, 4, 12, 13, 13], [11, 8, 7, 6, 5, 4, 12])


def record_attention_and_fail(model: Transformer) -> None:
    """A token that the model does not know."""
    with pytest.raises(IndexError):
        plots.record_attention(model, [11, 8, 4, 12], [99])


def draw_everything(model: Transformer) -> None:
    answers = predict(model, TASK, TASK.all_pairs())
    drawings = plots.draw_run(model, TASK, answers, (8, 4))
    for draw in drawings.values():
        draw()


READERS = [
    train_evaluate,
    mean_loss,
    predict_all,
    decode_far,
    record_attention,
    record_attention_and_fail,
    pytest.param(draw_everything, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("read", READERS)
def test_the_model_is_as_before(model, read: Callable):
    before = everything_about(model)
    read(model)
    after = everything_about(model)
    assert {name for name in before if after[name] != before[name]} == set()


@pytest.mark.parametrize("read", READERS)
def test_training_goes_on_as_if_nothing_had_been(model, read: Callable):
    def update() -> list[torch.Tensor]:
        """Gradients of a batch of sequences longer than the model's positions."""
        model.zero_grad()
        batch = next(iter(batches()))
        train_script.token_loss(model, batch, TASK.pad_id).backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    wanted = update()
    model.zero_grad()
    read(model)
    for got, gradient in zip(update(), wanted, strict=True):
        assert torch.equal(got, gradient)


def test_attention_fails_in_the_middle_and_stays_the_classs_own(model, monkeypatch):
    """After the encoder's attention, within the decoder's."""
    calls = iter(range(1, 100))
    weights = plots.attention_weights

    def fails_at_2(*arguments: object) -> torch.Tensor:
        if next(calls) == 2:
            raise MemoryError
        return weights(*arguments)

    monkeypatch.setattr(plots, "attention_weights", fails_at_2)
    with pytest.raises(MemoryError):
        record_attention(model)
    for module in model.modules():
        if isinstance(module, MultiHeadAttention):
            assert "attend" not in vars(module)
