"""train.py and evaluate.py end to end, as their user runs them: command line in, files and exit codes out."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import PROJECT, TINY
from metrics import read_metrics

from transformer_scratch.data import Task, split_pairs

TASK = Task()
NAME = "sn-data-320-head1-dim16-lr0.01"
FLAGS = [*TINY, "--lr", "0.01", "--warmup-steps", "5", "--wandb", "disabled"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, script) -> Path:
    """One run trained and evaluated through the command lines. -> the folder with runs/ and what was printed."""
    folder = tmp_path_factory.mktemp("finished")
    for name, flags in (("train.py", FLAGS), ("evaluate.py", ["--pair", "8", "4", "--no-pictures"])):
        process = script(name, *flags, cwd=folder)
        assert process.returncode == 0, process.stderr
        (folder / f"{name}.out").write_text(process.stdout)
        (folder / f"{name}.err").write_text(process.stderr)
    return folder


# ------------------------------------------------------------------------------------------------------------ train.py


def test_a_run_is_one_folder(finished):
    assert sorted(path.name for path in finished.iterdir() if path.is_dir()) == ["runs"]
    run = finished / "runs" / NAME
    names = {path.name for path in run.iterdir()}
    assert names >= {"config.json", "metrics.jsonl", "last.pt", "previous.pt", "best.pt", "epoch=0.pt", "epoch=1.pt"}
    assert not [name for name in names if name.endswith(".tmp")]


def test_the_settings_are_saved_as_plain_json(finished):
    config = json.loads((finished / "runs" / NAME / "config.json").read_text())
    assert (config["dim"], config["num_layers"], config["lr"], config["seed"]) == (16, 1, 0.01, 42)
    assert config["ffn_dim"] == 64 and config["seq_len"] == 16, "what was chosen stands there too"


def test_metrics_lines(finished):
    rows = read_metrics(finished / "runs" / NAME)
    steps = [row for row in rows if "train/loss_step" in row]
    assert [row["step"] for row in steps] == list(range(1, 21))
    assert [row["epoch"] for row in steps] == [0] * 10 + [1] * 10
    for row in steps:
        assert set(row) == {"step", "epoch", "train/loss_step", "lr", "grad_norm"}
        assert all(isinstance(row[key], float) for key in ("train/loss_step", "lr", "grad_norm"))
    assert any(len(repr(row["train/loss_step"])) > 12 for row in steps), "in full precision"
    assert [row["lr"] for row in steps[:6]] == pytest.approx([0.002, 0.004, 0.006, 0.008, 0.01, 0.01])
    epochs = [row for row in rows if "val/loss_epoch" in row]
    assert [rows.index(row) for row in epochs] == [10, 21], "right behind the epoch's steps"
    for row in epochs:
        assert row.keys() >= {"epoch", "train/loss_epoch", "val/loss_epoch", "val/exact_match"}
    assert rows[-1].keys() >= {"test/loss_epoch", "test/exact_match"} and len(rows) == 23


def test_checkpoints_hold_what_the_contract_says(finished):
    run = finished / "runs" / NAME
    last = torch.load(run / "last.pt", weights_only=True)
    assert last.keys() >= {"model", "optimizer", "scheduler", "scaler", "epoch", "step", "rng", "config"}
    assert (last["epoch"], last["step"]) == (2, 20)
    json.dumps(last["config"])
    losses = {row["epoch"]: row["val/loss_epoch"] for row in read_metrics(run) if "val/loss_epoch" in row}
    best = torch.load(run / "best.pt", weights_only=True)
    assert best.keys() >= {"model", "config", "epoch", "step"} and "optimizer" not in best
    assert best["epoch"] == min(losses, key=losses.get)
    for epoch in (0, 1):
        content = torch.load(run / f"epoch={epoch}.pt", weights_only=True)
        assert (content["epoch"], content["step"]) == (epoch, 10 * (epoch + 1))
    # Weights tied and named as in the model.
    assert torch.equal(last["model"]["output.weight"], last["model"]["source_embedding.weight"])


def test_the_summary_says_everything(finished):
    text = (finished / "train.py.out").read_text()
    for part in ("cpu x 1", "float32", "parameters: dim 16, 1 head,", "80 trained, 10 validation, 10 test", "lr 0.01",
                 "right one time in 14", f"runs/{NAME}", "disabled (as asked)", "exact match", "best.pt",
                 f"python evaluate.py --run runs/{NAME}"):  # fmt: skip
        assert re.search(re.escape(part).replace(r"lr\ 0", r"lr\s+0"), text), part
    assert len(re.findall(r"^epoch \d: train loss", text, re.M)) == 2


def test_a_reader_of_the_output_who_leaves_is_no_fault():
    """As `head` does."""
    command = [sys.executable, str(PROJECT / "train.py"), "--help"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.wait() == 1 and process.stderr.read() == ""


def test_the_progress_bar_survives_a_pipe(finished):
    """No flicker of control characters: a line now and then, on stderr, the last with the whole count and the loss."""
    text = (finished / "train.py.err").read_text()
    assert "20/20" in text and "loss=" in text
    assert text.count("\r") < 20 and "\x1b[" not in text


def test_only_the_best_k_are_kept(train):
    """The learning rate rises until training falls apart, so the best epochs are the first."""
    flags = "--num-datas 100 --batch-size 16 --max-epochs 4 --lr 20 --warmup-steps 100 --clip-norm 0 --seed 7"
    run = train(*TINY, *flags.split(), "--save-top-k", 2)
    losses = {row["epoch"]: row["val/loss_epoch"] for row in read_metrics(run) if "val/loss_epoch" in row}
    best = sorted(losses, key=losses.get)[:2]
    assert best[0] != 3
    assert {path.name for path in run.glob("epoch=*.pt")} == {f"epoch={epoch}.pt" for epoch in best}
    assert torch.load(run / "best.pt", weights_only=True)["epoch"] == best[0]


def test_a_new_run_takes_the_next_free_name(train):
    runs = [train(*TINY, "--max-epochs", 1) for _ in range(3)]
    first = runs[0].name
    assert [run.name for run in runs] == [first, f"{first}-2", f"{first}-3"]
    assert read_metrics(runs[0]) == read_metrics(runs[1]), "and gives the same numbers"


def test_the_name_has_the_articles_form(train):
    assert train(*TINY, "--max-epochs", 1, "--lr", "0.0001").name == "sn-data-320-head1-dim16-lr0.0001"


def test_run_dir(train):
    train(*TINY, "--max-epochs", 1, "--run-dir", "some/where")
    assert (Path("some/where") / "best.pt").exists() and not Path("runs").exists()


def test_a_resumed_run_goes_on_and_a_finished_one_says_so(train, capsys):
    whole = train(*TINY, "--max-epochs", 3)
    part = train(*TINY, "--max-epochs", 2)
    train("--resume", part)
    assert "has finished its 2 epochs" in capsys.readouterr().out
    train("--resume", part, "--max-epochs", 3)
    steps = [row for row in read_metrics(part) if "train/loss_step" in row]
    assert steps == [row for row in read_metrics(whole) if "train/loss_step" in row], "each step once, same numbers"


def test_the_same_seed_gives_the_same_run_and_another_does_not(train):
    one, again, other = (train(*TINY, "--seed", seed) for seed in (5, 5, 6))
    assert read_metrics(one) == read_metrics(again) != read_metrics(other)


def test_what_is_only_read_changes_no_number(train):
    """Logging, validation data workers, the number of kept checkpoints: the training must not notice."""
    plain = train(*TINY)
    for flags in ("--log-every 1", "--save-top-k 1", "--num-workers 1", "--save-every 3"):
        assert read_metrics(train(*TINY, *flags.split())) == read_metrics(plain), flags


@pytest.mark.parametrize("flags", [
    "--no-tie-embeddings --num-heads 4", "--holdout 0 --batch-size 160", "--num-categories 6 --holdout 0.1",
    "--num-categories 12 --seq-len 30", "--dropout 0 --clip-norm 0 --weight-decay 0 --warmup-steps 0",
    "--accumulate 3", "--ffn-dim 8 --num-layers 2", "--dim 15", "--debug",
])  # fmt: skip
def test_other_settings_run(train, flags):
    run = train(*TINY, "--max-epochs", 1, *flags.split())
    assert "test/exact_match" in read_metrics(run)[-1]


# --------------------------------------------------------------------------------------------------------- evaluate.py


def test_evaluation_json(finished):
    result = json.loads((finished / "runs" / NAME / "evaluation.json").read_text())
    assert result.keys() >= {
        "exact_match_seen", "exact_match_unseen", "exact_match_val", "exact_match_test", "token_accuracy", "loss",
        "num_seen", "num_unseen", "predictions",
    }  # fmt: skip
    assert (result["num_seen"], result["num_unseen"]) == (80, 20)
    predictions = {tuple(row["pair"]): row for row in result["predictions"]}
    assert sorted(predictions) == TASK.all_pairs() and len(result["predictions"]) == 100
    splits = split_pairs(TASK, 0.2, 42)
    for pair, row in predictions.items():
        assert row.keys() == {"pair", "prediction", "exact", "seen"}
        assert row["seen"] == (pair in splits.train)
        assert row["exact"] == (row["prediction"] == TASK.answer(pair)) and TASK.end_id not in row["prediction"]

    def share(pairs):
        return sum(predictions[pair]["exact"] for pair in pairs) / len(pairs)

    assert result["exact_match_seen"] == pytest.approx(share(splits.train))
    assert result["exact_match_val"] == pytest.approx(share(splits.val))
    assert result["exact_match_test"] == pytest.approx(share(splits.test))
    assert result["exact_match_unseen"] == pytest.approx(share([*splits.val, *splits.test]))
    rows = read_metrics(finished / "runs" / NAME)
    assert result["exact_match_test"] == rows[-1]["test/exact_match"]


def test_the_articles_block(finished):
    lines = (finished / "evaluate.py.out").read_text().splitlines()
    assert [line.split(":")[0].strip() for line in lines[:6]] == [
        "x", "dec_input", "target", "prediction", "accuracy", "chance rate"]  # fmt: skip
    values = [line.split(": ")[1] for line in lines[:6]]
    assert values[0] == str([TASK.encode_source((8, 4))])
    assert values[2] == str([TASK.encode_target((8, 4))[1:]])
    dec_input, prediction = json.loads(values[1])[0], json.loads(values[3])[0]
    assert len(dec_input) == len(prediction) == 15 and dec_input == [11, *prediction[:-1]]
    assert 0 <= float(values[4]) <= 1 and values[5] == "0.07143"
    assert any("of 80" in line for line in lines) and any("of 20" in line for line in lines)


@pytest.mark.slow
def test_evaluation_of_a_model_that_has_learned(script):
    """Through both command lines with the default settings: trained pairs exact, the chosen pair answered."""
    assert script("train.py", "--wandb", "disabled", timeout=300).returncode == 0
    process = script("evaluate.py", "--pair", 8, 4)
    assert "prediction  : [[8, 7, 6, 5, 4, 12, 13, 13, 13, 13, 13, 13, 13, 13, 13]]" in process.stdout
    assert "accuracy    : 1\n" in process.stdout
    (run,) = Path("runs").iterdir()
    result = json.loads((run / "evaluation.json").read_text())
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
        return text, json.loads(Path(written).read_text())

    return run


def test_without_flags_the_newest_run_and_an_unseen_pair(train, evaluate):
    old, new = train(*TINY, "--seed", 1, "--max-epochs", 1), train(*TINY, "--seed", 2, "--max-epochs", 1)
    os.utime(old / "last.pt", (1, 1))
    text, _ = evaluate()
    assert f"{new / 'best.pt'}" in text and not (old / "evaluation.json").exists()
    pair = tuple(json.loads(text.splitlines()[0].split(": ")[1])[0][1:3])
    assert pair in split_pairs(TASK, 0.2, 2).test
    evaluate("--run", old)
    assert (old / "evaluation.json").exists()


def test_which_checkpoint(train, evaluate):
    run = train(*TINY, "--max-epochs", 3, "--lr", 0.02)
    losses = {row["epoch"]: row["val/loss_epoch"] for row in read_metrics(run) if "val/loss_epoch" in row}
    assert len(set(losses.values())) == 3
    found = {name: evaluate("--run", run, "--checkpoint", name)[1]["loss"] for name in ("best", "last")}
    by_file = {epoch: evaluate("--checkpoint", run / f"epoch={epoch}.pt")[1]["loss"] for epoch in range(3)}
    assert found["best"] == by_file[min(losses, key=losses.get)] and found["last"] == by_file[2]
    assert len(set(by_file.values())) == 3


def test_nothing_held_out(train, evaluate):
    train(*TINY, "--max-epochs", 1, "--holdout", 0, "--batch-size", 160)
    text, result = evaluate()
    assert result["exact_match_unseen"] is None and (result["num_seen"], result["num_unseen"]) == (100, 0)
    assert "trained on every pair" in text
