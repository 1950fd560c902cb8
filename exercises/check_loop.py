"""Is exercises/loop.py right?"""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train
from exercises.loop import train_epoch
from transformer_scratch.batches import BatchSampler, make_loader
from transformer_scratch.digits import Digits, make_datasets, split_pairs
from transformer_scratch.model import Transformer
from transformer_scratch.optimizer import make_optimizer, make_schedule
from transformer_scratch.random_state import seed_everything
from transformer_scratch.run_folder import read_metrics

# What setup prepares, as flags of train.py.
FLAGS = ["--dim", "16", "--num-layers", "1", "--batch-size", "32", "--num-datas", "160"]
FLAGS += ["--max-epochs", "1", "--lr", "0.01", "--warmup-steps", "4"]
FLAGS += ["--weight-decay", "0.1", "--label-smoothing", "0", "--average", "0"]
FLAGS += ["--accelerator", "cpu", "--amp", "off", "--wandb", "disabled"]


@pytest.fixture(autouse=True)
def one_thread():
    """As train.py runs a model of this size: more threads would round sums differently."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def setup() -> SimpleNamespace:
    """What train.py prepares before its loop."""
    seed_everything(42)
    task = Digits()
    data, _, _ = make_datasets(task, split_pairs(task, 0.2, 42), 160, 42)
    model = Transformer(task.vocab_size, dim=16, num_layers=1, pad_id=task.pad_id)
    optimizer = make_optimizer(model, lr=0.01, weight_decay=0.1)
    model.eval()  # as a validation would leave it
    return SimpleNamespace(
        model=model,
        batches=make_loader(BatchSampler(data, 32, shuffle=True, seed=42)),
        optimizer=optimizer,
        scheduler=make_schedule(optimizer, warmup_steps=4),
    )


def run(setup: SimpleNamespace, clip_norm: float = 1.0) -> list[float]:
    losses = train_epoch(
        setup.model,
        setup.batches,
        setup.optimizer,
        setup.scheduler,
        clip_norm,
        setup.model.pad_id,
    )
    assert isinstance(losses, list) and len(losses) == 5, (
        f"return a list with the loss of each of the 5 batches: {losses}"
    )
    return [float(loss) for loss in losses]


def gradient_norm(model: Transformer) -> float:
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return torch.nn.utils.get_total_norm(gradients).item()


def test_the_weights_learn(setup):
    before = setup.model.output.weight.detach().clone()
    run(setup)
    assert not setup.model.output.weight.equal(before), (
        "the weights have not moved: backward, then optimizer.step()"
    )


def test_dropout_is_on(setup):
    run(setup)
    assert setup.model.training, (
        "dropout was off: validation leaves the model in eval mode, so call model.train() first"
    )


def test_no_gradient_is_left(setup):
    run(setup)
    assert gradient_norm(setup.model) == 0, (
        "gradients are left over, and the next backward would add to them: optimizer.zero_grad()"
    )


def test_schedule_moves(setup):
    run(setup)
    updates = setup.scheduler.last_epoch
    assert updates == 5, (
        f"the schedule has moved {updates} times in 5 updates: scheduler.step() after each"
    )


def test_gradient_is_clipped(setup):
    norms = []
    setup.optimizer.register_step_pre_hook(lambda *_: norms.append(gradient_norm(setup.model)))
    run(setup, clip_norm=0.1)
    assert norms and max(norms) < 0.1001, (
        f"the norm of the gradient at the update is {max(norms):.2f}, not at most 0.1: clip it"
    )


def test_every_token_counts_the_same(setup):
    norms = []
    setup.optimizer.register_step_pre_hook(lambda *_: norms.append(gradient_norm(setup.model)))
    # As if the other updates of the epoch were huge: these few tokens must hardly count.
    setup.batches = [batch._replace(mean_update_tokens=1e9) for batch in setup.batches]
    run(setup)
    assert norms and max(norms) < 1e-3, (
        "the loss that goes backward must be loss * (batch.num_tokens / batch.mean_update_tokens)"
    )


def test_same_losses_as_train_py(setup, tmp_path: Path):
    losses = run(setup)
    train.main([*FLAGS, "--run-dir", str(tmp_path / "run")])
    rows = read_metrics(tmp_path / "run")
    expected = [row["train/loss_step"] for row in rows if "train/loss_step" in row]
    for step, (loss, right) in enumerate(zip(losses, expected, strict=True), start=1):
        assert loss == right, (
            f"at update {step} your loss is {loss:.6f}, that of train.py {right:.6f}: "
            "look at the order of the lines"
        )
