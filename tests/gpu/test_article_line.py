"""The command line of the article, as the README shows it, to its end."""

import json
import re
import shlex
from pathlib import Path

import torch
from conftest import PROJECT
from metrics import read_metrics, step_losses

import evaluate

README = (PROJECT / "README.md").read_text(encoding="utf-8")
SMALL_ENOUGH_FOR_A_CPU = {"gpu": "cpu", "256": "64", "50000": "128", "512": "32"}


def test_it_trains_and_answers(accelerator, train):
    (line,) = re.findall(r"python3 train.py (--accelerator gpu [^`]*)", README)
    words = shlex.split(line)
    if accelerator == "cpu":
        words = [SMALL_ENOUGH_FOR_A_CPU.get(word, word) for word in words]
    run = train(*words)
    rows, updates = read_metrics(run), len(step_losses(run))
    assert updates == (1_950 if accelerator == "gpu" else 20)
    assert "test/exact_match" in rows[-1] and rows[-1]["step"] == updates
    assert torch.load(run / "last.pt", map_location="cpu", weights_only=True)["epoch"] == 10
    evaluate.main(["--run", str(run), "--accelerator", accelerator])
    result = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    assert Path(run / "pictures/answers.png").exists()
    if accelerator == "gpu":
        assert result["exact_match_seen"] > 0.99 and result["exact_match_unseen"] > 0.7
