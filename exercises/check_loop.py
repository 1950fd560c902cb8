"""Is exercises/loop.py right? (PYTEST_DONT_REWRITE: a message is all that pytest shows.)"""

import contextlib
import io
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch import nn

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
    return train_epoch(
        setup.model,
        setup.batches,
        setup.optimizer,
        setup.scheduler,
        clip_norm,
        setup.model.pad_id,
    )


def gradient_norm(model: Transformer) -> float:
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return nn.utils.get_total_norm(gradients).item()


def watch(setup: SimpleNamespace, clip_norm: float) -> tuple[list[str], list[float]]:
    """-> what goes wrong, the first first, and the gradient norm of each update; both fill later.

    PyTorch calls these functions at each forward pass, gradient and step.
    """
    mistakes, norms, gradients = [], [], []

    def forward(*_):
        if not setup.model.training:
            mistakes.append(
                "dropout is off: a validation leaves the model in eval mode, so model.train() first"
            )

    def backward(weight):
        if not weight.grad.equal(gradients[-1]):
            mistakes.append(
                "the gradient of the batch before is still there, and backward adds to it: "
                "optimizer.zero_grad() once a batch"
            )

    def step(*_):
        norm, moved = gradient_norm(setup.model), setup.scheduler.last_epoch
        if norm == 0:
            mistakes.append(
                "there is no gradient at the update: backward before optimizer.step(), "
                "zero_grad not between the two"
            )
        if norm > clip_norm * 1.001:
            mistakes.append(
                f"the norm of the gradient at the update is {norm!r}, not at most {clip_norm}: "
                "clip it between backward and optimizer.step()"
            )
        if moved > 0 and not norms:
            mistakes.append("the schedule moves before the update: scheduler.step() after it")
        if moved > len(norms) > 0:
            mistakes.append(
                f"after update {len(norms)} the schedule has moved {moved} times: "
                "scheduler.step() once an update, without an argument"
            )
        if moved < len(norms):
            mistakes.append(
                f"after update {len(norms)} the schedule has moved {moved} times: "
                "scheduler.step() after each update"
            )
        norms.append(norm)

    weight = setup.model.output.weight
    setup.model.register_forward_pre_hook(forward)
    weight.register_hook(gradients.append)
    weight.register_post_accumulate_grad_hook(backward)
    setup.optimizer.register_step_pre_hook(step)
    return mistakes, norms


def test_each_line(setup):
    mistakes, norms = watch(setup, clip_norm=0.1)
    run(setup, clip_norm=0.1)
    assert not mistakes, mistakes[0]
    assert norms, "the weights have not moved: backward, then optimizer.step()"
    assert len(norms) == 5, f"each of the 5 batches makes one update; yours: {len(norms)} updates"
    moved = setup.scheduler.last_epoch
    assert moved == 5, f"after 5 updates the schedule has moved {moved} times: scheduler.step()"


def test_a_loss_for_each_batch(setup):
    losses = run(setup)
    assert isinstance(losses, list) and len(losses) == 5, (
        f"return a list with the loss of each of the 5 batches; yours: {losses}"
    )
    assert all(isinstance(loss, float) for loss in losses), (
        "return numbers, loss.item(): a tensor keeps all that its backward pass needs in memory"
    )


def test_every_token_counts_the_same(setup):
    # As if the other updates of the epoch were huge: these few tokens must hardly count.
    setup.batches = [batch._replace(mean_update_tokens=1e9) for batch in setup.batches]
    for module in setup.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # nothing random: the gradient is known
    first = setup.batches[0]
    loss = train.token_loss(setup.model, first, setup.model.pad_id)
    (loss * (first.num_tokens / first.mean_update_tokens)).backward()
    right = gradient_norm(setup.model)
    setup.optimizer.zero_grad()

    _, norms = watch(setup, clip_norm=1.0)
    losses = run(setup)
    assert math.isclose(losses[0], loss.item(), rel_tol=1e-6), (
        f"the first loss is {losses[0]!r}, not {loss.item()!r}, the plain mean over the tokens: "
        "token_loss(model, batch, pad_id), before the step"
    )
    assert math.isclose(norms[0], right, rel_tol=1e-3), (
        "the loss that goes backward must be loss * (batch.num_tokens / batch.mean_update_tokens)"
    )


def test_same_losses_as_train_py(setup, tmp_path: Path):
    losses = run(setup)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        train.main([*FLAGS, "--run-dir", str(tmp_path / "run")])
    rows = read_metrics(tmp_path / "run")
    expected = [row["train/loss_step"] for row in rows if "train/loss_step" in row]
    for step, (loss, right) in enumerate(zip(losses, expected, strict=True), start=1):
        assert math.isclose(loss, right, rel_tol=1e-5), (
            f"at update {step} your loss is {loss!r}, that of train.py {right!r}: something is "
            "done in another order, or once too often"
        )
