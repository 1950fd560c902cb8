"""Is exercises/loop.py right?"""

import json
from types import SimpleNamespace

import pytest
import torch

import train
from exercises.loop import train_epoch
from transformer_scratch.data import BatchSampler, Task, make_datasets, make_loader, split_pairs
from transformer_scratch.model import Transformer
from transformer_scratch.optimizer import make_optimizer, make_schedule
from transformer_scratch.runtime import seed_everything

FLAGS = (
    "--dim 16 --num-layers 1 --batch-size 32 --num-datas 160 --max-epochs 1 --lr 0.01 --warmup-steps 4 --wandb disabled"
)


@pytest.fixture
def setup() -> SimpleNamespace:
    """What train.py prepares before its loop, with the flags above."""
    seed_everything(42)
    task = Task()
    data, _, _ = make_datasets(task, split_pairs(task, 0.2, 42), 160, 42)
    model = Transformer(task.vocab_size, dim=16, num_layers=1, pad_id=task.pad_id)
    optimizer = make_optimizer(model, lr=0.01, weight_decay=0.1, fused=True)
    model.eval()  # as a validation would leave it
    return SimpleNamespace(
        model=model, batches=make_loader(BatchSampler(data, 32, True, 42)), optimizer=optimizer,
        scheduler=make_schedule(optimizer, warmup_steps=4),
    )  # fmt: skip


def run(setup: SimpleNamespace, clip_norm: float = 1.0) -> list[float]:
    losses = train_epoch(setup.model, setup.batches, setup.optimizer, setup.scheduler, clip_norm)
    assert isinstance(losses, list) and len(losses) == 5, (
        f"return a list with the loss of each of the 5 batches: {losses}"
    )
    return [float(loss) for loss in losses]


def test_the_weights_learn(setup):
    before = setup.model.output.weight.detach().clone()
    run(setup)
    assert not setup.model.output.weight.equal(before), "the weights have not moved: backward, then optimizer.step()"


def test_dropout_is_on(setup):
    run(setup)
    assert setup.model.training, (
        "dropout was off: validation leaves the model in eval mode, so call model.train() first"
    )


def test_no_gradient_is_left(setup):
    run(setup)
    left = [parameter for parameter in setup.model.parameters() if parameter.grad is not None and parameter.grad.any()]
    assert not left, "gradients are left over, and the next backward would add to them: optimizer.zero_grad()"


def test_schedule_moves(setup):
    run(setup)
    updates = setup.scheduler.last_epoch
    assert updates == 5, f"the schedule has moved {updates} times in 5 updates: scheduler.step() after each"


def test_gradient_is_clipped(setup):
    norms = []

    def look(optimizer, *_):
        gradients = [parameter.grad.norm() for parameter in setup.model.parameters() if parameter.grad is not None]
        norms.append(torch.stack(gradients).norm().item() if gradients else 0.0)

    setup.optimizer.register_step_pre_hook(look)
    run(setup, clip_norm=0.1)
    assert norms and max(norms) < 0.1001, (
        f"the gradient's norm at the update is {max(norms):.2f}, not at most 0.1: clip it"
    )


def test_same_losses_as_train_py(setup, tmp_path):
    losses = run(setup)
    train.main([*FLAGS.split(), "--run-dir", str(tmp_path / "run")])
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    expected = [row["train/loss_step"] for row in rows if "train/loss_step" in row]
    for step, (loss, right) in enumerate(zip(losses, expected, strict=True), start=1):
        assert loss == right, (
            f"at update {step} your loss is {loss:.6f}, that of train.py {right:.6f}: look at the order of the lines"
        )
