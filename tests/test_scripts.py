"""train.py and evaluate.py end to end: command line in, files and exit codes out."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from conftest import TINY

import train as train_script
from transformer_scratch.checkpoint import load_checkpoint
from transformer_scratch.config import Config
from transformer_scratch.digits import split_pairs
from transformer_scratch.run_folder import read_metrics
from transformer_scratch.task_of_run import make_task

TASK = make_task(Config())  # that of a run
NAME = "sn-data-320-head1-dim16-lr0.01"
FLAGS = [*TINY, "--lr", "0.01", "--warmup-steps", "5", "--wandb", "disabled"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, script) -> Path:
    """A run trained and evaluated through the command lines. -> the folder of runs/ and outputs."""
    folder = tmp_path_factory.mktemp("finished")
    evaluation = ["--pair", "8", "4", "--no-pictures"]
    for name, flags in (("train.py", FLAGS), ("evaluate.py", evaluation)):
        process = script(name, *flags, cwd=folder)
        assert process.returncode == 0, process.stderr
        (folder / f"{name}.out").write_text(process.stdout, encoding="utf-8")
        (folder / f"{name}.err").write_text(process.stderr, encoding="utf-8")
    return folder


def output(finished: Path, name: str) -> str:
    return (finished / name).read_text(encoding="utf-8")


def read_json(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8"))


def val_losses(run: Path) -> dict[int, float]:
    """The validation loss of each epoch."""
    rows = read_metrics(run)
    return {row["epoch"]: row["val/loss_epoch"] for row in rows if "val/loss_epoch" in row}


# --------------------------------------------------------------------------------------- train.py


def test_a_run_is_one_folder(finished):
    assert sorted(path.name for path in finished.iterdir() if path.is_dir()) == ["runs"]
    run = finished / "runs" / NAME
    names = {path.name for path in run.iterdir()}
    checkpoints = {"last.pt", "previous.pt", "best.pt", "epoch=0.pt", "epoch=1.pt"}
    assert names >= {"config.json", "metrics.jsonl", *checkpoints}
    assert not [name for name in names if name.endswith(".tmp")]


def test_the_settings_are_saved_as_plain_json(finished):
    config = read_json(finished / "runs" / NAME / "config.json")
    assert (config["dim"], config["num_layers"], config["lr"], config["seed"]) == (16, 1, 0.01, 42)
    assert config["ffn_dim"] == 64 and config["seq_len"] == 16, "so is what was chosen"


def test_metrics_lines(finished):
    rows = read_metrics(finished / "runs" / NAME)
    steps = [row for row in rows if "train/loss_step" in row]
    assert [row["step"] for row in steps] == list(range(1, 21))
    assert [row["epoch"] for row in steps] == [0] * 10 + [1] * 10
    for row in steps:
        assert all(isinstance(row[key], float) for key in ("train/loss_step", "lr", "grad_norm"))
        assert "skipped" not in row
    assert any(len(repr(row["train/loss_step"])) > 12 for row in steps), "in full precision"
    rates = [row["lr"] for row in steps[:6]]
    assert rates == pytest.approx([0.002, 0.004, 0.006, 0.008, 0.01, 0.01])
    epochs = [row for row in rows if "val/loss_epoch" in row]
    assert [rows.index(row) for row in epochs] == [10, 21], "right behind the epoch's steps"
    for row in epochs:
        assert row.keys() >= {"epoch", "train/loss_epoch", "val/loss_epoch", "val/exact_match"}
    assert rows[-1].keys() >= {"test/loss_epoch", "test/exact_match"} and len(rows) == 23


@pytest.mark.parametrize(("warmup", "never"), [(11, True), (10, False)])
def test_a_learning_rate_that_is_never_reached_is_named(warmup, never, train, capsys):
    train(*TINY, "--max-epochs", 1, "--warmup-steps", warmup)
    said = f"reached after {warmup} updates: never, as this run has about 10\n"
    assert (said in capsys.readouterr().out) == never


def test_checkpoints_hold_what_the_contract_says(finished):
    run = finished / "runs" / NAME
    last = torch.load(run / "last.pt", weights_only=True)
    assert last.keys() >= {"model", "optimizer", "scheduler", "scaler"}
    assert last.keys() >= {"epoch", "step", "rng", "config"}
    assert (last["epoch"], last["step"]) == (2, 20)
    json.dumps(last["config"])
    losses = val_losses(run)
    best = torch.load(run / "best.pt", weights_only=True)
    assert best.keys() >= {"model", "config", "epoch", "step"} and "optimizer" not in best
    assert best["epoch"] == min(losses, key=losses.get)
    for epoch in (0, 1):
        content = torch.load(run / f"epoch={epoch}.pt", weights_only=True)
        assert (content["epoch"], content["step"]) == (epoch, 10 * (epoch + 1))
    weights = last["model"]
    assert torch.equal(weights["output.weight"], weights["source_embedding.weight"]), "tied"


def test_the_summary_says_everything(finished):
    text = output(finished, "train.py.out")
    for part in (
        "cpu x 1",
        "float32",
        "parameters: dim 16, 1 head,",
        "80 trained, 10 validation, 10 test",
        "right one time in 14",
        f"runs/{NAME}",
        "disabled (as asked)",
        "exact match",
        "best.pt",
        f"evaluate.py --run runs/{NAME}",
    ):
        assert part in text
    assert re.search(r"^lr +0\.01\b", text, re.M)
    assert len(re.findall(r"^epoch \d: train loss", text, re.M)) == 2


def test_the_progress_bar_survives_a_pipe(finished):
    """A line now and then, on stderr, without control characters; the last has all updates."""
    text = output(finished, "train.py.err")
    assert "20/20" in text and "loss=" in text
    assert text.count("\r") < 20 and "\x1b[" not in text


def test_only_the_best_k_are_kept(train, monkeypatch):
    losses = iter([0.2, 0.1, 0.4, 0.3, 0.0])  # of four epochs, and of the test

    def evaluate(*arguments: object) -> tuple[torch.Tensor, int, list]:
        return torch.tensor(next(losses)), 1, []

    monkeypatch.setattr(train_script, "evaluate", evaluate)
    run = train(*TINY, "--max-epochs", 4, "--save-top-k", 2)
    assert {path.name for path in run.glob("epoch=*.pt")} == {"epoch=0.pt", "epoch=1.pt"}
    assert torch.load(run / "best.pt", weights_only=True)["epoch"] == 1
    assert load_checkpoint(run / "last.pt")["epoch"] == 4


def test_a_new_run_takes_the_next_free_name(train):
    runs = [train(*TINY, "--max-epochs", 1) for _ in range(3)]
    first = runs[0].name
    assert [run.name for run in runs] == [first, f"{first}-2", f"{first}-3"]
    assert read_metrics(runs[0]) == read_metrics(runs[1]), "and gives the same numbers"


def test_the_name_has_the_articles_form(train):
    assert (
        train(*TINY, "--max-epochs", 1, "--lr", "0.0001").name == "sn-data-320-head1-dim16-lr0.0001"
    )


def test_run_dir(train):
    train(*TINY, "--max-epochs", 1, "--run-dir", "some/where")
    assert (Path("some/where") / "best.pt").exists() and not Path("runs").exists()


def test_a_finished_run_says_so_and_can_be_trained_longer(train, capsys):
    whole = train(*TINY, "--max-epochs", 2)
    part = train(*TINY, "--max-epochs", 1)
    metrics = read_metrics(part)
    train("--resume", part)
    text = capsys.readouterr().out
    assert "has finished its epoch already" in text and "Train longer with: " in text
    assert read_metrics(part) == metrics
    train("--resume", part, "--max-epochs", 2)
    assert read_metrics(part) == read_metrics(whole), "each step once, the same numbers"


def test_the_same_seed_gives_the_same_run_and_another_does_not(train):
    one, again, other = (train(*TINY, "--seed", seed) for seed in (5, 5, 6))
    assert read_metrics(one) == read_metrics(again) != read_metrics(other)


def test_what_is_only_read_changes_no_number(train):
    """Logging, saving and data workers must not touch the training."""
    plain = train(*TINY)
    for flags in ("--log-every 1 --save-top-k 1 --save-every 3", "--num-workers 1"):
        assert read_metrics(train(*TINY, *flags.split())) == read_metrics(plain), flags


@pytest.mark.parametrize(
    "flags",
    [
        "--no-tie-embeddings --num-heads 4",
        "--holdout 0 --batch-size 160",
        "--num-categories 6 --holdout 0.1",
        "--num-categories 12 --seq-len 30",
        "--dropout 0 --clip-norm 0 --weight-decay 0 --warmup-steps 0",
        "--accumulate 3",
        "--ffn-dim 8 --num-layers 2",
        "--dim 15",
        "--debug",
    ],
)
def test_other_settings_run(train, flags):
    run = train(*TINY, "--max-epochs", 1, *flags.split())
    assert "test/exact_match" in read_metrics(run)[-1]


# ------------------------------------------------------------------------------------ evaluate.py


def test_evaluation_json(finished):
    result = read_json(finished / "runs" / NAME / "evaluation.json")
    assert result.keys() >= {"token_accuracy", "loss", "predictions"}
    assert (result["num_seen"], result["num_unseen"]) == (80, 20)
    predictions = {tuple(row["pair"]): row for row in result["predictions"]}
    assert sorted(predictions) == TASK.all_pairs() and len(result["predictions"]) == 100
    splits = split_pairs(TASK, 0.2, 42)
    for pair, row in predictions.items():
        assert row["seen"] == (pair in splits.train)
        assert row["exact"] == (row["prediction"] == TASK.answer(pair))
        assert TASK.end_id not in row["prediction"]

    def share(pairs):
        return sum(predictions[pair]["exact"] for pair in pairs) / len(pairs)

    assert result["exact_match_seen"] == pytest.approx(share(splits.train))
    assert result["exact_match_val"] == pytest.approx(share(splits.val))
    assert result["exact_match_test"] == pytest.approx(share(splits.test))
    assert result["exact_match_unseen"] == pytest.approx(share([*splits.val, *splits.test]))
    rows = read_metrics(finished / "runs" / NAME)
    assert result["exact_match_test"] == rows[-1]["test/exact_match"]


def test_the_articles_block(finished):
    lines = output(finished, "evaluate.py.out").splitlines()
    names = [line.split(":")[0].strip() for line in lines[:6]]
    assert names == ["x", "dec_input", "target", "prediction", "accuracy", "chance rate"]
    values = [line.split(": ")[1] for line in lines[:6]]
    source, (target,) = TASK.encode_source((8, 4)), TASK.answers((8, 4))
    for shown, ids, length in ((values[0], source, 16), (values[2], target, 15)):
        assert shown == str([ids + [TASK.pad_id] * (length - len(ids))])
    dec_input, prediction = json.loads(values[1])[0], json.loads(values[3])[0]
    assert len(dec_input) == len(prediction) == 15 and dec_input == [11, *prediction[:-1]]
    assert 0 <= float(values[4]) <= 1 and values[5] == "0.07143"
    assert any("of 80" in line for line in lines) and any("of 20" in line for line in lines)


@pytest.mark.slow
def test_evaluation_of_a_model_that_has_learned(script):
    """With the default settings: trained pairs exact, the chosen pair answered."""
    assert script("train.py", "--wandb", "disabled", timeout=300).returncode == 0
    process = script("evaluate.py", "--pair", 8, 4)
    (target,) = TASK.answers((8, 4))
    prediction = target + [TASK.pad_id] * (TASK.max_target_len - len(target))
    assert f"prediction  : [{prediction}]" in process.stdout
    assert "accuracy    : 1\n" in process.stdout
    (run,) = Path("runs").iterdir()
    result = read_json(run / "evaluation.json")
    assert result["exact_match_seen"] == 1.0 and result["exact_match_unseen"] > 0.5


@pytest.fixture
def evaluate(capsys):
    """evaluate.py inside this process. -> its output and evaluation.json"""
    import evaluate as evaluate_script

    def run(*flags: object) -> tuple[str, dict]:
        capsys.readouterr()
        evaluate_script.main([*map(str, flags), "--no-pictures"])
        text = capsys.readouterr().out
        (written,) = re.findall(r"^written +(.*)$", text, re.M)
        return text, read_json(Path(written))

    return run


def test_without_flags_the_newest_run_and_an_unseen_pair(train, evaluate):
    old, new = (train(*TINY, "--seed", seed, "--max-epochs", 1) for seed in (1, 2))
    os.utime(old / "last.pt", (1, 1))
    text, _ = evaluate()
    assert f"{new / 'best.pt'}" in text and not (old / "evaluation.json").exists()
    pair = tuple(json.loads(text.splitlines()[0].split(": ")[1])[0][1:3])
    assert pair in split_pairs(TASK, 0.2, 2).test
    evaluate("--run", old)
    assert (old / "evaluation.json").exists()


def test_which_checkpoint(train, evaluate):
    run = train(*TINY, "--max-epochs", 3, "--lr", 0.02)
    losses = val_losses(run)
    assert len(set(losses.values())) == 3

    def loss(*flags: object) -> float:
        return evaluate(*flags)[1]["loss"]

    by_file = {epoch: loss("--checkpoint", run / f"epoch={epoch}.pt") for epoch in range(3)}
    assert len(set(by_file.values())) == 3
    assert loss("--run", run, "--checkpoint", "last") == by_file[2]
    assert loss("--run", run, "--checkpoint", "best") == by_file[min(losses, key=losses.get)]


def test_nothing_held_out(train, evaluate):
    train(*TINY, "--max-epochs", 1, "--holdout", 0, "--batch-size", 160)
    text, result = evaluate()
    assert result["exact_match_unseen"] is None and (result["num_seen"], result["num_unseen"]) == (
        100,
        0,
    )
    assert "trained on every pair" in text
