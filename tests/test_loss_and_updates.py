"""The numbers of training: the loss, the schedule, one update by hand, accumulation, averages over
an epoch."""

import math

import pytest
import torch
from metrics import read_metrics, step_losses
from samples import Counting, batch_of, trained_on_counting

import train as train_script
from transformer_scratch.batches import BatchSampler, PairDataset
from transformer_scratch.checkpoint import load_checkpoint
from transformer_scratch.digits import make_datasets, split_pairs
from transformer_scratch.evaluation import exact_match, predict
from transformer_scratch.model import Transformer
from transformer_scratch.optimizer import lr_factor, make_optimizer, make_schedule

TASK = Counting()
SMALL = ["--dim", 16, "--num-layers", 1, "--dropout", 0, "--warmup-steps", 0, "--seed", 7]


@pytest.fixture(autouse=True)
def counting():
    """The numbers below are those of this task, whatever train.py's is."""
    with trained_on_counting():
        yield


def first_batch(num_datas: int, batch_size: int):
    """What a run with SMALL sees first."""
    data = make_datasets(TASK, split_pairs(TASK, 0.2, 7), num_datas, seed=7)[0]
    sampler = BatchSampler(data, batch_size, shuffle=True, seed=7)
    return data[next(iter(sampler))]


def first_model() -> Transformer:
    """The weights a run with SMALL starts from."""
    torch.manual_seed(7)
    return Transformer(TASK.vocab_size, dim=16, num_layers=1, dropout=0.0)


def loss_by_hand(logits: torch.Tensor, target: torch.Tensor) -> float:
    """-log of the probability of each target token, by its definition, averaged over those that
    are not padding."""
    losses = []
    for scores, token in zip(logits.flatten(0, 1).tolist(), target.flatten().tolist(), strict=True):
        if token != TASK.pad_id:
            losses.append(math.log(sum(math.exp(score) for score in scores)) - scores[token])
    return sum(losses) / len(losses)


# ----------------------------------------------------------------------------------------- the loss


def test_the_loss_by_hand():
    batch, model = first_batch(32, 32), first_model()
    assert (batch.target == TASK.pad_id).any(), "there is padding to leave out"
    expected = loss_by_hand(model(batch.source, batch.decoder_input), batch.target)
    loss = train_script.token_loss(model, batch, TASK.pad_id)
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_the_reported_losses_are_token_means(train):
    """The epoch's means weigh each update by its tokens; validation and test are what the weights
    give, the test with the best ones. (The learning rate rises so far that the first are.)"""
    flags = "--num-datas 100 --batch-size 16 --max-epochs 2 --lr 20 --warmup-steps 100"
    run = train(*SMALL, *flags.split())
    rows = read_metrics(run)
    epochs = [row for row in rows if "val/loss_epoch" in row]
    data = make_datasets(TASK, split_pairs(TASK, 0.2, 7), 100, seed=7)[0]
    sampler = BatchSampler(data, 16, shuffle=True, seed=7)
    for epoch, losses in enumerate((step_losses(run)[:6], step_losses(run)[6:])):
        sampler.set_epoch(epoch)
        tokens = [indices.update_tokens for indices in sampler]
        assert len(set(tokens)) > 1
        mean = sum(loss * n for loss, n in zip(losses, tokens, strict=True)) / sum(tokens)
        assert epochs[epoch]["train/loss_epoch"] == pytest.approx(mean, rel=1e-6)

    best = load_checkpoint(run / "best.pt")
    validated = min(epochs, key=lambda row: row["val/loss_epoch"])
    assert best["epoch"] == validated["epoch"]
    model = first_model().eval()
    model.load_state_dict(best["model"])
    splits = split_pairs(TASK, 0.2, 7)
    for split, pairs, row in (("val", splits.val, validated), ("test", splits.test, rows[-1])):
        whole = batch_of(PairDataset(TASK, pairs))
        with torch.no_grad():
            expected = loss_by_hand(model(whole.source, whole.decoder_input), whole.target)
        assert row[f"{split}/loss_epoch"] == pytest.approx(expected, rel=1e-6)
        assert row[f"{split}/exact_match"] == exact_match(predict(model, TASK, pairs))


# ------------------------------------------------------------------------------------- the schedule


def test_the_schedule_in_numbers():
    assert [lr_factor(update, 4) for update in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert [lr_factor(update, 0) for update in range(3)] == [1.0, 1.0, 1.0]
    optimizer = make_optimizer(torch.nn.Linear(1, 1), lr=0.1, weight_decay=0.0, fused=False)
    scheduler = make_schedule(optimizer, warmup_steps=5)
    rates = []
    for _ in range(7):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1, 0.1, 0.1])


def test_the_learning_rate_of_each_line_is_the_one_used(train):
    flags = "--num-datas 96 --batch-size 16 --max-epochs 1 --warmup-steps 4 --lr 0.01"
    run = train(*SMALL, *flags.split())
    rates = [row["lr"] for row in read_metrics(run) if "lr" in row]
    assert rates == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01, 0.01])


# --------------------------------------------------------------------------------------- one update


@pytest.mark.parametrize("clip_norm", [0, 0.5])
def test_one_update_by_hand(train, clip_norm):
    """AdamW with the paper's betas, on clipped gradients: from the first weights to those in
    last.pt."""
    lr, decay, eps = 0.01, 0.3, 1e-8
    flags = f"--max-epochs 1 --lr {lr} --weight-decay {decay} --clip-norm {clip_norm}"
    flags += " --label-smoothing 0"
    run = train(*SMALL, "--num-datas", 32, "--batch-size", 32, *flags.split())
    model = first_model()
    loss = train_script.token_loss(model, first_batch(32, 32), TASK.pad_id)
    loss.backward()
    norm = math.sqrt(
        sum(parameter.grad.double().square().sum().item() for parameter in model.parameters())
    )
    assert norm > 0.5, "there is something to clip"
    row = read_metrics(run)[0]
    assert row["train/loss_step"] == pytest.approx(loss.item(), rel=1e-6)
    assert row["grad_norm"] == pytest.approx(norm, rel=1e-5), "logged as it was before clipping"

    after = load_checkpoint(run / "last.pt")
    state = after["optimizer"]["state"]
    for index, (name, parameter) in enumerate(model.named_parameters()):
        gradient = parameter.grad * (min(1, clip_norm / norm) if clip_norm else 1)
        # First step: both moments, corrected for their start at zero, are the gradient and its
        # square.
        expected = parameter - lr * decay * parameter - lr * gradient / (gradient.abs() + eps)
        torch.testing.assert_close(state[index]["exp_avg"], 0.1 * gradient, rtol=1e-4, atol=1e-8)
        torch.testing.assert_close(
            state[index]["exp_avg_sq"], 0.02 * gradient.square(), rtol=1e-4, atol=1e-12
        )
        clear = gradient.abs() > 1e-6  # of a gradient of rounding errors alone, the sign is chance
        torch.testing.assert_close(
            after["model"][name][clear], expected.detach()[clear], rtol=1e-4, atol=1e-6
        )


# ------------------------------------------------------------------------------------- accumulation


def weights_and_losses(train, *flags) -> tuple[list[float], dict[str, torch.Tensor]]:
    run = train(*SMALL, "--num-datas", 640, "--max-epochs", 2, "--log-every", 1, *flags)
    return step_losses(run), load_checkpoint(run / "last.pt")["model"]


def test_accumulation_gives_the_update_of_the_whole_batch(train):
    losses, weights = weights_and_losses(train, "--batch-size", 64)
    accumulated = weights_and_losses(train, "--batch-size", 16, "--accumulate", 4)
    assert len(losses) == 20
    # Sums are taken in another order, over twenty updates.
    assert accumulated[0] == pytest.approx(losses, rel=1e-5)
    for name, weight in weights.items():
        torch.testing.assert_close(accumulated[1][name], weight, rtol=1e-4, atol=1e-5)


def test_batches_that_count_alike_whatever_their_tokens_are_caught(train, monkeypatch):
    """The fault of most loops: loss / accumulate. Then the check above has to fail, clearly."""
    losses, _ = weights_and_losses(train, "--batch-size", 64)
    getitem = PairDataset.__getitem__

    def alike(dataset, item):
        batch = getitem(dataset, item)
        return batch._replace(mean_update_tokens=4 * batch.num_tokens)

    monkeypatch.setattr(PairDataset, "__getitem__", alike)
    faulty, _ = weights_and_losses(train, "--batch-size", 16, "--accumulate", 4)
    differences = [abs(a - b) / b for a, b in zip(faulty, losses, strict=True)]
    assert max(differences) > 1e-3


def test_the_last_window_of_an_epoch_may_be_short(train):
    """Five batches, four to an update: two updates an epoch, the second of one batch."""
    run = train(*SMALL, "--num-datas", 80, "--batch-size", 16, "--accumulate", 4, "--max-epochs", 2)
    assert [row["step"] for row in read_metrics(run) if "grad_norm" in row] == [1, 2, 3, 4]
    whole = train(*SMALL, "--num-datas", 80, "--batch-size", 64, "--max-epochs", 1)
    assert step_losses(run)[0] == pytest.approx(step_losses(whole)[0], rel=1e-6)


# ------------------------------------------------------------------------------------ does it learn


def test_a_batch_is_overfitted():
    """Twelve pairs, no more: a model that cannot memorise these cannot learn."""
    torch.manual_seed(0)
    pairs = TASK.all_pairs()[::9]
    data = PairDataset(TASK, pairs)
    batch = batch_of(data)
    model = Transformer(TASK.vocab_size, dim=32, num_layers=1, dropout=0.0)
    optimizer = make_optimizer(model, lr=3e-3, weight_decay=0.0, fused=True)
    for _ in range(600):
        loss = train_script.token_loss(model, batch, TASK.pad_id)
        if loss < 0.02:
            break
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.02
    share = exact_match(predict(model.eval(), TASK, pairs))
    assert share == 1.0, "what the model has learned by heart is not what decoding gives"


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_half_precision_on_a_cpu_follows_float32(train, amp, capsys):
    flags = [*SMALL, "--num-datas", 640, "--batch-size", 32, "--max-epochs", 1]
    exact, half = step_losses(train(*flags)), step_losses(train(*flags, "--amp", amp))
    assert half != exact, "something is computed in half precision"
    assert half == pytest.approx(exact, rel=0.05)
    slow = [line for line in capsys.readouterr().out.splitlines() if "slow" in line]
    has_bf16_units = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    assert len(slow) == (amp == "fp16" or not has_bf16_units), (
        "what a CPU is slow in, it says in one line"
    )
