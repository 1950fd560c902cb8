"""What does the start of the weights do? Trains with ours and with two others, on the same splits and data order.

python -m benchmarks.initialisation --seeds 101 102 103
"""

import contextlib
import io
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro
from torch import nn
from tqdm import tqdm

import evaluate
import train
from transformer_scratch.model import Transformer


class PyTorchStart(Transformer):
    """nn.Embedding's own start, N(0, 1)."""

    def initialise(self) -> None:
        for embedding in (self.source_embedding, self.target_embedding):
            embedding.reset_parameters()
        self.output.weight = self.target_embedding.weight


class XavierStart(Transformer):
    """Xavier's uniform start for every matrix, a common choice for Transformers."""

    def initialise(self) -> None:
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)


STARTS = {"ours: N(0, 1/dim)": Transformer, "PyTorch's N(0, 1)": PyTorchStart, "Xavier": XavierStart}


@dataclass
class Arguments:
    """Train the default configuration from three kinds of first weights; print a table."""

    seeds: tuple[int, ...] = (101, 102, 103)
    """The seeds, one run each and kind."""
    max_epochs: int = 3
    """Epochs a run."""


def run(start: type[Transformer], seed: int, max_epochs: int) -> dict:
    """Train and evaluate through the scripts' own main functions, with the model replaced in the training."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        flags = ["--seed", str(seed), "--max-epochs", str(max_epochs), "--wandb", "disabled"]
        train.Transformer = start
        with contextlib.redirect_stderr(io.StringIO()):
            train.main([*flags, "--run-dir", f"{folder}/run"])
        evaluate.main(["--run", f"{folder}/run"])
        first = json.loads((Path(folder) / "run/metrics.jsonl").read_text().splitlines()[0])
        result = json.loads((Path(folder) / "run/evaluation.json").read_text())
    return {
        "first loss": first["train/loss_step"],
        "trained": result["exact_match_seen"],
        "unseen": result["exact_match_unseen"],
    }


def main() -> None:
    arguments = tyro.cli(Arguments)
    print("| first weights | first loss | trained | unseen, by seed |")
    print("|---|---|---|---|")
    for name, start in STARTS.items():
        rows = [run(start, seed, arguments.max_epochs) for seed in tqdm(arguments.seeds, desc=name, leave=False)]
        first_loss, trained = (sum(row[key] for row in rows) / len(rows) for key in ("first loss", "trained"))
        unseen = " / ".join(f"{row['unseen']:.0%}" for row in rows)
        print(f"| {name} | {first_loss:.2f} | {trained:.1%} | {unseen} |", flush=True)


if __name__ == "__main__":
    main()
