"""In every precision a GPU trains and answers as the CPU does in float32, up to rounding."""

import functools
import itertools
import json
import random
import shlex
from pathlib import Path

import pytest
import torch
from metrics import read_metrics, step_losses

import evaluate

# Without dropout, whose random numbers are other ones on a GPU.
FLAGS = shlex.split(
    "--dim 32 --num-heads 2 --num-layers 2 --dropout 0 --batch-size 128 --max-epochs 1 "
    "--lr 0.003 --warmup-steps 10"
)


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> list[str]:
    """Words and their letters backwards, of different lengths, so that sources are padded."""
    draw = random.Random(0)
    words = {"".join(draw.choices("abcdefgh", k=draw.randint(2, 8))) for _ in range(2_500)}
    file = tmp_path_factory.mktemp("pairs") / "backwards.tsv"
    lines = [f"{word}\t{word[::-1]}\n" for word in sorted(words)]
    file.write_text("".join(lines), encoding="utf-8")
    return [*FLAGS, "--pairs", str(file)]


@pytest.fixture(scope="module")
def on_cpu(flags, tmp_path_factory) -> Path:
    """The same training on the CPU, in float32."""
    import train

    run = tmp_path_factory.mktemp("cpu") / "run"
    train.main([*flags, "--accelerator", "cpu", "--amp", "off", "--run-dir", str(run)])
    return run


# How much a loss may differ. In half precision on a CPU it is 4e-4 in the first ten updates, and
# 2e-3 in all twenty. "off" is TF32 on a GPU, which has as many bits as fp16.
EARLY, LATER = 0.002, 0.02


@pytest.mark.parametrize("amp", ["off", "fp16", "bf16"])
def test_training(amp, accelerator, flags, on_cpu, train):
    run = train(*flags, "--accelerator", accelerator, "--amp", amp)
    losses, theirs = step_losses(on_cpu), step_losses(run)
    assert theirs[:10] == pytest.approx(losses[:10], rel=EARLY)
    assert theirs == pytest.approx(losses, rel=LATER)
    assert losses[-1] < 0.8 * losses[0], "this has trained"
    for row, (theirs, ours) in zip(("val", "test"), last_rows(on_cpu, run), strict=True):
        name = f"{row}/loss_epoch"
        assert ours[name] == pytest.approx(theirs[name], rel=LATER)


def last_rows(*runs: Path) -> list[tuple[dict, dict]]:
    """The row of validation, and that of the test, of each of the runs."""
    return list(zip(*(read_metrics(run)[-2:] for run in runs), strict=True))


@pytest.mark.parametrize("beam", [1, 4])
def test_evaluation(beam, accelerator, on_cpu):
    """Of the same weights. Of two tokens that are about as likely each may be taken."""
    results = []
    for name in ("cpu", accelerator):
        asked = ["--run", str(on_cpu), "--beam", str(beam), "--accelerator", name]
        evaluate.main([*asked, "--no-pictures"])
        results.append(json.loads((on_cpu / "evaluation.json").read_text(encoding="utf-8")))
    on_the_cpu, elsewhere = results
    assert elsewhere["loss"] == pytest.approx(on_the_cpu["loss"], rel=1e-4)
    pairs = zip(on_the_cpu["predictions"], elsewhere["predictions"], strict=True)
    others = sum(a["prediction"] != b["prediction"] for a, b in pairs)
    assert others <= 0.02 * len(on_the_cpu["predictions"])


def test_half_precision_can_be_evaluated_anywhere(accelerator, flags, train):
    """A run of the GPU opens on the CPU, and a run of the CPU on the GPU."""
    for trained_on, asked_on in ((accelerator, "cpu"), ("cpu", accelerator)):
        run = train(*flags, "--accelerator", trained_on, "--amp", "bf16")
        evaluate.main(["--run", str(run), "--accelerator", asked_on, "--no-pictures"])
        result = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
        assert 0 < result["loss"] < 3 and result["predictions"]


def test_an_overflow_skips_the_update_and_halves_the_scale(accelerator, flags, train, monkeypatch):
    too_large = functools.partial(torch.amp.GradScaler, init_scale=2.0**24, growth_interval=3)
    monkeypatch.setattr("torch.amp.GradScaler", too_large)
    fp16 = ["--amp", "fp16", "--warmup-steps", "100"]
    run = train(*flags, *fp16, "--accelerator", accelerator)
    rows = [row for row in read_metrics(run) if "lr" in row]
    skipped = [row["step"] for row in rows if row.get("skipped")]
    assert len(rows) > len(skipped) > 0
    for before, row in itertools.pairwise(rows):
        assert (row["lr"] == before["lr"]) == bool(before.get("skipped")), "the schedule waits"
    scaler = torch.load(run / "last.pt", map_location="cpu", weights_only=True)["scaler"]
    grown = (len(rows) - len(skipped) - scaler["_growth_tracker"]) // 3
    assert scaler["scale"] == 2.0 ** (24 - len(skipped) + grown)
