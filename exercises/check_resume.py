"""Is exercises/resume.py right? (PYTEST_DONT_REWRITE: a message is all that pytest shows.)"""

import pickle
from pathlib import Path
from types import SimpleNamespace

import torch

from exercises.resume import resume_from, state_to_save
from train import token_loss
from transformer_scratch.batches import Batch, BatchSampler, PairDataset
from transformer_scratch.digits import Digits
from transformer_scratch.model import Transformer
from transformer_scratch.optimizer import make_optimizer, make_schedule

TASK = Digits()
DATA = PairDataset(TASK, TASK.all_pairs()[:96])
BATCHES = [DATA[indices] for indices in BatchSampler(DATA, batch_size=16)]


def fresh() -> tuple:
    """Model, optimizer and schedule as a program makes them when it starts."""
    torch.manual_seed(0)
    model = Transformer(TASK.vocab_size, dim=16, num_layers=1, pad_id=TASK.pad_id).train()
    optimizer = make_optimizer(model, lr=0.01, weight_decay=0.1)
    return model, optimizer, make_schedule(optimizer, warmup_steps=5)


def train(model, optimizer, scheduler, batches: list[Batch]) -> list[float]:
    losses = []
    for batch in batches:
        loss = token_loss(model, batch, TASK.pad_id)
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def resumed(folder: Path) -> SimpleNamespace:
    """What was saved after three updates, and what came out of it in newly made objects."""
    saved = fresh()
    train(*saved, BATCHES[:3])
    state = state_to_save(*saved, 3)
    random_numbers = torch.get_rng_state()
    try:
        torch.save(state, folder / "last.pt")
        state = torch.load(folder / "last.pt", weights_only=True)
    except (pickle.PickleError, AttributeError, TypeError):  # which one depends on the object
        raise AssertionError(
            "state_to_save must hold nothing but tensors, numbers and strings, and dicts, lists "
            "and tuples of these: state_dict() of each object, not the object"
        ) from None
    loaded = fresh()
    step = resume_from(state, *loaded)
    return SimpleNamespace(saved=saved, loaded=loaded, step=step, random_numbers=random_numbers)


def test_step(tmp_path):
    step = resumed(tmp_path).step
    assert isinstance(step, int) and step == 3, (
        f"three updates were done before, but resume_from returns {step!s:.40}"
    )


def test_weights(tmp_path):
    run = resumed(tmp_path)
    before, after = run.saved[0].parameters(), run.loaded[0].parameters()
    assert all(a.equal(b) for a, b in zip(before, after, strict=True)), (
        "the weights are not those that were saved: model.state_dict(), model.load_state_dict()"
    )


def test_optimizer(tmp_path):
    run = resumed(tmp_path)
    before, after = (
        {
            (number, name): tensor
            for number, state in optimizer.state_dict()["state"].items()
            for name, tensor in state.items()  # two averages, and the number of updates
        }
        for _, optimizer, _ in (run.saved, run.loaded)
    )
    assert before.keys() == after.keys() and all(before[n].equal(after[n]) for n in before), (
        "AdamW has forgotten its averages: optimizer.state_dict(), optimizer.load_state_dict()"
    )


def test_schedule(tmp_path):
    run = resumed(tmp_path)
    before, after = run.saved[2].last_epoch, run.loaded[2].last_epoch
    assert before == after, (
        f"the schedule starts again at {after} instead of {before}: save its state_dict() too"
    )


def test_random_numbers(tmp_path):
    run = resumed(tmp_path)
    assert torch.get_rng_state().equal(run.random_numbers), (
        "dropout would draw other numbers than in a run without a break: "
        "RandomState().state_dict(), RandomState().load_state_dict()"
    )


def test_the_run_continues_as_if_it_had_never_stopped(tmp_path):
    run = resumed(tmp_path)
    losses = train(*run.loaded, BATCHES[run.step :])
    expected = train(*fresh(), BATCHES)[3:]
    assert losses == expected, f"the losses after the break should be {expected}, yours: {losses}"
