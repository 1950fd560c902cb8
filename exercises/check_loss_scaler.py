"""Is exercises/loss_scaler.py right? (PYTEST_DONT_REWRITE: a message is all that pytest shows.)"""

import contextlib
import functools
import io
import math
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

import train
from exercises.loss_scaler import train_update
from transformer_scratch.batches import Batch, BatchSampler, make_loader
from transformer_scratch.digits import Digits, make_datasets, split_pairs
from transformer_scratch.model import Transformer
from transformer_scratch.optimizer import make_optimizer, make_schedule
from transformer_scratch.random_state import seed_everything
from transformer_scratch.run_folder import read_metrics

# What prepare makes, as flags of train.py: ten updates of three batches each.
FLAGS = ["--dim", "16", "--num-layers", "1", "--batch-size", "16", "--num-datas", "480"]
FLAGS += ["--accumulate", "3", "--max-epochs", "1", "--lr", "0.01", "--warmup-steps", "4"]
FLAGS += ["--weight-decay", "0.1", "--clip-norm", "0.1", "--label-smoothing", "0"]
FLAGS += ["--average", "0", "--accelerator", "cpu", "--amp", "fp16", "--wandb", "disabled"]
CLIP_NORM = 0.1

# With these scales gradients overflow never; until the scale has fallen a few times; at once.
SMALL, LARGE, HUGE = 2.0**10, 2.0**22, 2.0**40


def prepare(scale: float, **options) -> SimpleNamespace:
    """What train.py prepares before its loop, with the batches of each update in a list."""
    seed_everything(42)
    task = Digits()
    data, _, _ = make_datasets(task, split_pairs(task, 0.2, 42), 480, 42)
    model = Transformer(task.vocab_size, dim=16, num_layers=1, pad_id=task.pad_id)
    optimizer = make_optimizer(model, lr=0.01, weight_decay=0.1)
    batches = list(make_loader(BatchSampler(data, 16, shuffle=True, seed=42, accumulate=3)))
    return SimpleNamespace(
        model=model,
        updates=[batches[first : first + 3] for first in range(0, 30, 3)],
        optimizer=optimizer,
        scheduler=make_schedule(optimizer, warmup_steps=4),
        scaler=torch.amp.GradScaler("cpu", init_scale=scale, **options),
    )


def run(setup: SimpleNamespace, batches: list[Batch]) -> tuple[float, bool]:
    result = train_update(
        setup.model,
        batches,
        setup.optimizer,
        setup.scheduler,
        setup.scaler,
        CLIP_NORM,
        setup.model.pad_id,
    )
    assert isinstance(result, tuple) and len(result) == 2, (
        f"return the norm of the gradient and whether the update was skipped; yours: {result}"
    )
    assert not isinstance(result[0], bool), (
        f"return the norm first, then whether the update was skipped; yours: {result}"
    )
    return float(result[0]), bool(result[1])


def gradient_norm(model: Transformer) -> float:
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return nn.utils.get_total_norm(gradients).item()


class Watch:
    """Notes what goes wrong in an update, in the order in which the lines run.

    PyTorch calls forward, backward and optimizer_step; the scaler's methods are followed.
    """

    def __init__(self, setup: SimpleNamespace):
        self.setup, self.scaler = setup, setup.scaler
        self.mistakes, self.gradients = [], []
        weight = setup.model.output.weight
        setup.model.register_forward_pre_hook(self.forward)
        weight.register_hook(self.gradients.append)
        weight.register_post_accumulate_grad_hook(self.backward)
        setup.optimizer.register_step_pre_hook(self.optimizer_step)
        for name in ("scale", "unscale_", "step", "update"):
            self.follow(name)

    def follow(self, name: str) -> None:
        """Call our method of this name first, then the scaler's."""
        notice, method = getattr(self, name), getattr(self.scaler, name)

        def both(*arguments):
            notice(*arguments)
            self.called.append(name)
            return method(*arguments)

        setattr(self.scaler, name, both)

    def note(self, wrong: bool, message: str) -> None:
        if wrong:
            self.mistakes.append(message)

    def start(self, batches: list[Batch]) -> None:
        self.num_batches, self.num_forward, self.num_backward = len(batches), 0, 0
        self.scaled, self.called = False, []

    def forward(self, *_) -> None:
        half = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.float16
        self.note(
            not half,
            'the loss is not computed in fp16: with torch.amp.autocast("cpu", dtype=torch.float16)',
        )
        self.num_forward += 1

    def scale(self, loss: Tensor) -> None:
        self.scaled = True

    def backward(self, weight: Tensor) -> None:
        alone = weight.grad.equal(self.gradients[-1])
        self.note(not self.scaled, "the loss is not scaled: scaler.scale(...).backward()")
        self.note(
            self.num_backward == 0 and not alone,
            "the gradients of the update before are still there, and backward adds to them: "
            "optimizer.zero_grad() once an update",
        )
        self.note(
            self.num_backward > 0 and alone,
            "the gradients of the batches before are gone: optimizer.zero_grad() once an update, "
            "not at each batch",
        )
        self.num_backward += 1

    def note_batches(self, line: str, advice: str) -> None:
        self.note(
            self.num_forward < self.num_batches,
            f"{line} after {self.num_forward} of {self.num_batches} batches: {advice}",
        )
        self.note(
            self.num_backward < self.num_forward,
            f"{self.num_forward} batches have gone forward and {self.num_backward} backward: "
            "scaler.scale(...).backward() for each batch by itself",
        )

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        self.note_batches(
            "scaler.unscale_()", "once an update, when all its batches have gone backward"
        )

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        self.note_batches("scaler.step()", "one update for all of them, not one for each")
        self.note(
            "unscale_" not in self.called,
            "the gradient is still multiplied by the scale when you clip it: "
            "scaler.unscale_(optimizer) before clipping",
        )
        norm = gradient_norm(self.setup.model)
        self.note(
            norm == 0,
            "there is no gradient at the update: zero_grad after scaler.step(), not before",
        )
        self.note(
            norm > CLIP_NORM * 1.001,
            f"the norm of the gradient at the update is {norm!r}, not at most {CLIP_NORM}: "
            "clip it between scaler.unscale_() and scaler.step()",
        )
        self.note(
            norm < CLIP_NORM / 10,
            f"the norm of the gradient at the update is {norm!r}, far below {CLIP_NORM}: it was "
            "clipped while it was still scaled; scaler.unscale_(optimizer) before clipping",
        )

    def optimizer_step(self, *_) -> None:
        self.note(
            "step" not in self.called,
            "optimizer.step() would use gradients that have overflowed: scaler.step(optimizer)",
        )

    def update(self) -> None:
        self.note(
            "step" not in self.called, "scaler.update() has no scaler.step(optimizer) before it"
        )

    def end(self, updates: int) -> None:
        self.note(self.num_forward == 0, "no batch has gone through the model")
        self.note("step" not in self.called, "the weights have not moved: scaler.step(optimizer)")
        self.note(
            "update" not in self.called,
            "scaler.update() is missing after scaler.step(): the scale would never change",
        )
        moved = self.setup.scheduler.last_epoch
        self.note(
            moved != updates,
            f"after update {updates} the schedule has moved {moved} times: "
            "scheduler.step() after each that was not skipped",
        )


def test_each_line():
    setup = prepare(SMALL)
    watch = Watch(setup)
    for updates, batches in enumerate(setup.updates[:3], start=1):
        watch.start(batches)
        error = None
        try:
            run(setup, batches)
            watch.end(updates)
        except Exception as caught:  # the scaler has noticed the mistake, too
            error = caught
        assert not watch.mistakes, watch.mistakes[0]
        if error:
            raise error


def test_every_token_counts_the_same():
    setup = prepare(SMALL)
    for module in setup.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # nothing random: the gradient is known
    for batch in setup.updates[0]:
        loss = train.token_loss(setup.model, batch, setup.model.pad_id)
        (loss * (batch.num_tokens / batch.mean_update_tokens)).backward()
    right = gradient_norm(setup.model)
    setup.optimizer.zero_grad()

    norm, _ = run(setup, setup.updates[0])
    assert not math.isclose(norm, SMALL * right, rel_tol=0.02), (
        f"the norm that you return, {norm!r}, is still multiplied by the scale: "
        "take what clip_grad_norm_ returns, after scaler.unscale_()"
    )
    assert not math.isclose(norm, CLIP_NORM, rel_tol=0.001), (
        f"the norm that you return, {norm!r}, is the one after clipping: "
        "take what clip_grad_norm_ returns, the one before"
    )
    assert math.isclose(norm, right, rel_tol=0.02), (
        f"the norm of the gradient is {norm!r} instead of {right!r}: the loss of each batch must "
        "be weighted, then scaled, loss * (batch.num_tokens / batch.mean_update_tokens)"
    )


def test_an_overflow():
    setup = prepare(HUGE)
    _, skipped = run(setup, setup.updates[0])
    assert skipped, "the scale has fallen, so this update was skipped, but you return False"
    moved = setup.scheduler.last_epoch
    assert moved == 0, "a skipped update must not move the schedule"
    setup.scaler.update(SMALL)
    _, skipped = run(setup, setup.updates[1])
    assert not skipped, (
        "the gradients that have overflowed are still there in the next update: "
        "optimizer.zero_grad() after a skipped update, too"
    )


def test_a_scale_that_grows():
    setup = prepare(SMALL, growth_interval=1)
    _, skipped = run(setup, setup.updates[0])
    assert not skipped, "the scale has grown, not fallen: this update was not skipped"


def train_py(folder: Path) -> list[dict]:
    """The rows that train.py writes, one for each update."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        train.main([*FLAGS, "--run-dir", str(folder)])
    return [row for row in read_metrics(folder) if "train/loss_step" in row]


def test_same_updates_as_train_py(monkeypatch, tmp_path: Path):
    setup = prepare(LARGE)
    yours = [run(setup, batches) for batches in setup.updates]
    # train.py, too, starts with this scale, and skips some updates.
    large = functools.partial(torch.amp.GradScaler, init_scale=LARGE)
    monkeypatch.setattr(torch.amp, "GradScaler", large)
    rows = train_py(tmp_path / "run")
    for (norm, skipped), row in zip(yours, rows, strict=True):
        step, right = row["step"], row["grad_norm"]
        assert skipped == row.get("skipped", False), (
            f"update {step}: skipped={skipped}, in train.py {not skipped}"
        )
        assert skipped or math.isclose(norm, right, rel_tol=0.01), (
            f"update {step}: the norm of your gradient is {norm!r}, that of train.py {right!r}"
        )
