"""Evaluate a trained run: let the model answer every pair by itself, and count the right answers.

python evaluate.py                  the newest run's best weights, and a pair it has never seen
python evaluate.py --pair 8 4       a pair of your choice
python evaluate.py --run runs/<name> --checkpoint last
"""

import json
import math
import os
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import transformer_scratch  # noqa: F401 - first: it says which variable PyTorch cannot read

# isort: split
import torch
import tyro
from torch.nn import functional as F

from transformer_scratch.batches import BatchSampler, PairDataset, make_loader
from transformer_scratch.checkpoint import CheckpointError, load_checkpoint, load_first_good
from transformer_scratch.commands import python_command
from transformer_scratch.config import config_of_checkpoint, from_home
from transformer_scratch.errors import BadInput, exits_cleanly
from transformer_scratch.evaluation import Prediction, exact_match, pair_to_show, predict
from transformer_scratch.hardware import choose_device, choose_threads, keep_freed_memory
from transformer_scratch.model import Transformer
from transformer_scratch.run_folder import newest_run, read_metrics
from transformer_scratch.task import Pair, Splits, Task, split_pairs


@dataclass
class Arguments:
    """Let a trained model answer every pair: print one in full, count the exact answers."""

    run: str | None = None
    """Folder of the run. None: the newest in runs/."""
    checkpoint: str = "best"
    """best (lowest validation loss), last, or the path of a checkpoint file."""
    pair: tuple[int, ...] = ()
    """The two digits to print in full: --pair 8 4. Not given: the first longer test pair."""
    accelerator: Literal["auto", "cpu", "gpu", "mps"] = "auto"
    """Where to compute; auto takes a GPU if there is one."""
    pictures: bool = True
    """Draw what the model answers, where it looks and how it learned, in the run's pictures/."""


def load_run(arguments: Arguments) -> tuple[dict, Path, Path]:
    """-> the checkpoint's content, its file and the folder of the run. Raises BadInput.

    Where best.pt or last.pt is damaged, another good file of the run is taken, with a warning.
    """
    given = None if arguments.run is None else Path(from_home(arguments.run, "--run"))
    if given and not given.is_dir():
        raise BadInput(f"--run {given}: no such folder; give a run's, runs/<name>")
    if arguments.checkpoint not in ("best", "last"):
        file = Path(from_home(arguments.checkpoint, "--checkpoint"))
        if not file.is_file():
            raise BadInput(
                f"--checkpoint {file}: no such file; give best, last or a path, "
                "runs/<name>/epoch=3.pt"
            )
        return load_checkpoint(file), file, given or file.parent
    folder = given or newest_run()
    others = {
        "best": [*epoch_files(folder), folder / "last.pt"],
        "last": [folder / "previous.pt"],
    }
    candidates = [folder / f"{arguments.checkpoint}.pt", *others[arguments.checkpoint]]
    if not any(file.exists() for file in candidates):
        raise CheckpointError(
            f"--run {folder}: there is no checkpoint in it; train one with: "
            f"{python_command('train.py')}"
        )
    content, file = load_first_good(candidates)
    return content, file, folder


def epoch_files(folder: Path) -> list[Path]:
    """The weights of single epochs, those with the lowest validation loss first."""
    losses = {}
    with suppress(OSError, ValueError):  # metrics.jsonl may be damaged: any epoch will do then
        rows = read_metrics(folder)
        losses = {row["epoch"]: row["val/loss_epoch"] for row in rows if "val/loss_epoch" in row}
    by_name = {f"epoch={epoch}.pt": loss for epoch, loss in losses.items()}
    files = folder.glob("epoch=*.pt")
    return sorted(files, key=lambda file: by_name.get(file.name, math.inf))


@torch.inference_mode()
def mean_loss(model: Transformer, dataset: PairDataset, device: torch.device) -> float:
    """The teacher-forced cross-entropy, as in training: its mean over all target tokens."""
    loss_sum, num_tokens = 0.0, 0
    for batch in make_loader(BatchSampler(dataset, batch_size=1_000)):
        batch = batch.to(device)
        logits = model(batch.source, batch.decoder_input, batch.source_is_padded)  # (B, T, V)
        loss = F.cross_entropy(
            logits.flatten(0, 1),
            batch.target.flatten(),
            ignore_index=model.pad_id,
            reduction="sum",
        )
        loss_sum += loss.item()
        num_tokens += batch.num_tokens
    return loss_sum / num_tokens


def print_article_block(task: Task, prediction: Prediction) -> None:
    """One pair the way the article shows it."""
    y = task.encode_target(prediction.pair)
    decoded = task.pad(prediction.tokens)[: task.max_target_len]
    print(f"x           : [{task.encode_source(prediction.pair)}]")
    print(
        f"dec_input   : [{[task.start_id, *decoded[:-1]]}]"
    )  # what the decoder was fed: its own answer
    print(f"target      : [{y[1:]}]")
    print(f"prediction  : [{decoded}]")
    print(f"accuracy    : {prediction.token_matches / len(prediction.target):.4g}")
    print(f"chance rate : {1 / task.vocab_size:.4g}")


def results(predictions: dict[Pair, Prediction], splits: Splits, loss: float) -> dict:
    """What evaluation.json holds."""

    def share_exact(pairs: list[Pair]) -> float:
        return exact_match([predictions[pair] for pair in pairs])

    seen = set(splits.train)
    unseen = [pair for pair in predictions if pair not in seen]
    return {
        "exact_match_seen": share_exact(splits.train),
        "exact_match_unseen": share_exact(unseen) if unseen else None,
        "exact_match_val": share_exact(splits.val),
        "exact_match_test": share_exact(splits.test),
        "token_accuracy": sum(p.token_matches for p in predictions.values())
        / sum(len(p.target) for p in predictions.values()),
        "loss": loss,
        "num_seen": len(seen),
        "num_unseen": len(unseen),
        "predictions": [
            {
                "pair": list(pair),
                "prediction": [token for token in p.tokens if token != p.target[-1]],
                "exact": p.exact,
                "seen": pair in seen,
            }
            for pair, p in predictions.items()
        ],
    }


def print_summary(result: dict, task: Task, file: Path) -> None:
    print(f"\ncheckpoint      {file}")
    print(f"trained pairs   {result['exact_match_seen']:.1%} exact, of {result['num_seen']}")
    if result["num_unseen"]:
        print(
            f"unseen pairs    {result['exact_match_unseen']:.1%} exact, of {result['num_unseen']} "
            f"(validation {result['exact_match_val']:.1%}, test {result['exact_match_test']:.1%})"
        )
    else:
        print("unseen pairs    none: this run trained on every pair (--holdout 0)")
    tokens = f"{result['token_accuracy']:.1%} of the tokens right"
    print(f"all pairs       {tokens}, loss {result['loss']:.4f}")
    wrong = [row for row in result["predictions"] if not row["exact"]]
    for row in wrong[:20]:
        kind = "trained" if row["seen"] else "unseen"
        ids = (row["pair"], row["prediction"], task.answer(row["pair"]))
        pair, said, right = (" ".join(map(str, sequence)) for sequence in ids)
        print(f"wrong           {pair} -> {said} ({kind}; right: {right})")
    if len(wrong) > 20:
        print(f"                ... and {len(wrong) - 20} more")


def save_results(result: dict, file: Path) -> None:
    """Write evaluation.json; a warning where that fails, as in somebody else's run."""
    temporary = file.with_name(f"{file.name}.tmp")
    try:
        temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, file)
    except OSError as error:
        reason = error.strerror or error
        print(f"warning: {file} could not be written: {reason}", file=sys.stderr)
        with suppress(OSError):
            temporary.unlink()
    else:
        print(f"written         {file}")


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    arguments = tyro.cli(Arguments, args=arguments)
    content, file, folder = load_run(arguments)
    config = config_of_checkpoint(content, file)
    device, _ = choose_device(arguments.accelerator)
    choose_threads(config.dim, config.batch_size)
    keep_freed_memory()
    task = Task.from_config(config)
    splits = split_pairs(task, config.holdout, config.seed)
    pair = arguments.pair or pair_to_show(task, splits.test)
    if len(pair) != 2:
        raise BadInput("--pair takes two digits, for example --pair 8 4")
    if not all(0 <= digit < task.num_categories for digit in pair):
        raise BadInput(
            f"--pair {pair[0]} {pair[1]}: this run knows the digits 0 to {task.num_categories - 1}"
        )

    model = Transformer.from_config(config, task).to(device)
    model.load_state_dict(content["model"])
    model.eval()

    predictions = {
        prediction.pair: prediction for prediction in predict(model, task, task.all_pairs())
    }
    result = results(
        predictions, splits, mean_loss(model, PairDataset(task, task.all_pairs()), device)
    )
    print_article_block(task, predictions[pair])
    print(
        f"({pair[0]} {pair[1]} was {'trained' if pair in splits.train else 'never trained'}; "
        f"{task.start_id} starts, {task.end_id} ends, {task.pad_id} pads)"
    )
    print_summary(result, task, file)
    save_results(result, folder / "evaluation.json")
    if not arguments.pictures:
        return
    try:
        from transformer_scratch.plots import draw_run, draw_training, save_pictures
    except Exception as error:  # matplotlib is not installed, or broken
        print(f"warning: no pictures: {type(error).__name__}: {error}", file=sys.stderr)
        return
    drawings = draw_run(model, task, splits, predictions, pair)
    drawings |= draw_training(folder, task.vocab_size, config.clip_norm)
    if pictures := save_pictures(drawings, folder / "pictures"):
        print(f"pictures        {', '.join(picture.name for picture in pictures)}")
        print(f"next            look at {pictures[0]}")


if __name__ == "__main__":
    main()
