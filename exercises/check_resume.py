"""Is exercises/resume.py right?"""

import torch

from exercises.resume import go_on_from, state_to_save
from train import token_loss
from transformer_scratch.data import BatchSampler, PairDataset, Task
from transformer_scratch.model import Transformer
from transformer_scratch.optimizer import make_optimizer, make_schedule

TASK = Task()
DATA = PairDataset(TASK, TASK.all_pairs(), torch.arange(96))
BATCHES = [DATA[item] for item in BatchSampler(DATA, batch_size=16)]


def fresh():
    """Model, optimizer and schedule as a program makes them when it starts."""
    torch.manual_seed(0)
    model = Transformer(TASK.vocab_size, dim=16, num_layers=1, pad_id=TASK.pad_id).train()
    optimizer = make_optimizer(model, lr=0.01, weight_decay=0.1, fused=True)
    return model, optimizer, make_schedule(optimizer, warmup_steps=5)


def train(model, optimizer, scheduler, batches) -> list[float]:
    losses = []
    for batch in batches:
        loss = token_loss(model, batch)
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def stopped_and_resumed(tmp_path):
    """-> (before, after, step): the objects as they were saved after three updates, and as they are resumed."""
    before = fresh()
    train(*before, BATCHES[:3])
    torch.save(state_to_save(*before, 3), tmp_path / "last.pt")
    random_numbers = torch.get_rng_state()
    after = fresh()
    step = go_on_from(torch.load(tmp_path / "last.pt", weights_only=True), *after)
    return before, after, step, random_numbers


def test_step(tmp_path):
    *_, step, _ = stopped_and_resumed(tmp_path)
    assert step == 3, f"three updates were done before; go_on_from says {step}, so batches would be seen twice or never"


def test_weights(tmp_path):
    (before, *_), (after, *_), *_ = stopped_and_resumed(tmp_path)
    same = all(a.equal(b) for a, b in zip(before.parameters(), after.parameters(), strict=True))
    assert same, "the weights are not those that were saved: model.state_dict(), model.load_state_dict()"


def test_optimizer(tmp_path):
    (_, before, _), (_, after, _), *_ = stopped_and_resumed(tmp_path)
    averages = [{key: value["exp_avg"] for key, value in o.state_dict()["state"].items()} for o in (before, after)]
    same = averages[0].keys() == averages[1].keys() and all(averages[0][k].equal(averages[1][k]) for k in averages[0])
    assert same, "AdamW has forgotten its averages: optimizer.state_dict(), optimizer.load_state_dict()"


def test_schedule(tmp_path):
    (*_, before), (*_, after), *_ = stopped_and_resumed(tmp_path)
    assert before.last_epoch == after.last_epoch, (
        f"the schedule starts again at {after.last_epoch} instead of {before.last_epoch}: save its state_dict() too"
    )


def test_random_numbers(tmp_path):
    *_, random_numbers = stopped_and_resumed(tmp_path)
    same = torch.get_rng_state().equal(random_numbers)
    assert same, "dropout would draw other numbers than the run that was not stopped: rng_state(), set_rng_state()"


def test_the_run_goes_on_as_if_it_had_never_stopped(tmp_path):
    expected = train(*fresh(), BATCHES)
    _, after, step, _ = stopped_and_resumed(tmp_path)
    losses = train(*after, BATCHES[step:])
    assert losses == expected[3:], f"the losses after the break should be {expected[3:]}, yours: {losses}"
