"""Evaluate a trained run: let the model answer by itself, and count the right answers.

python evaluate.py                  the newest run's best weights, and a pair it has never seen
python evaluate.py --pair 8 4       a pair of your choice
python evaluate.py --source "8 4"   only answer; --source - reads questions from standard input
python evaluate.py --beam 5         follow the five likeliest answers at once
python evaluate.py --run runs/<name> --checkpoint last
python evaluate.py --list           which runs there are
"""

import itertools
import json
import math
import os
import sys
from collections.abc import Iterator
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
from transformer_scratch.checkpoint import (
    CheckpointError,
    load_checkpoint,
    load_first_good,
    load_state,
)
from transformer_scratch.commands import python_command
from transformer_scratch.config import config_of_checkpoint, from_home
from transformer_scratch.digits import Digits
from transformer_scratch.errors import BadInput, exits_cleanly
from transformer_scratch.evaluation import (
    Prediction,
    exact_match,
    example_to_show,
    predict,
    token_error_rate,
)
from transformer_scratch.hardware import choose_device, choose_threads, keep_freed_memory
from transformer_scratch.model import Transformer
from transformer_scratch.run_folder import newest_run, read_metrics
from transformer_scratch.run_list import print_runs
from transformer_scratch.task import Pair, Task
from transformer_scratch.task_of_run import load_task

ANSWERS_AT_ONCE, MOST_BEAMS = 1_000, 1_000


@dataclass
class Arguments:
    """Let a trained model answer: print one pair in full, count the exact answers."""

    run: str | None = None
    """Folder of the run. None: the newest in runs/."""
    checkpoint: str = "best"
    """best (lowest validation loss), last, or the path of a checkpoint file."""
    pair: tuple[int, ...] = ()
    """The two digits to print in full: --pair 8 4. Not given: a test pair with a long answer."""
    source: tuple[str, ...] = ()
    """Only answer these: --source transformer attention. - reads one a line from standard input."""
    beam: int = 1
    """Answers to follow at once (beam search, section 6.1). 1 = greedy: the likeliest token."""
    length_penalty: float = 0.6
    """How much a beam favours long answers: score = log probability / ((5 + length) / 6)^this."""
    accelerator: Literal["auto", "cpu", "gpu", "mps"] = "auto"
    """Where to compute; auto takes a GPU if there is one."""
    pictures: bool = True
    """Draw what the model answers, where it looks and how it learned, in the run's pictures/."""
    list: bool = False
    """Only list the runs in runs/: seed, size, epochs, exact match, date."""


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
def mean_loss(
    model: Transformer, dataset: PairDataset, device: torch.device, batch_size: int = 128
) -> float:
    """The teacher-forced cross-entropy, as in training: its mean over all target tokens."""
    loss_sum, num_tokens = 0.0, 0
    for batch in make_loader(BatchSampler(dataset, batch_size)):
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


def chosen_pair(arguments: Arguments, task: Task) -> Pair:
    """The pair to print in full: --pair, or one of the test's. Raises BadInput."""
    if not arguments.pair:
        return example_to_show(task, task.splits.test)
    if not isinstance(task, Digits):
        raise BadInput(
            "--pair is for digits; this run was trained on something else: ask with --source"
        )
    if len(arguments.pair) != 2:
        raise BadInput("--pair takes two digits, for example --pair 8 4")
    return task.question(" ".join(map(str, arguments.pair)))


def sources_to_answer(arguments: Arguments, task: Task) -> Iterator[Pair]:
    """The sources to answer. Raises BadInput where the task has no such one."""
    if arguments.source != ("-",):
        yield from map(task.question, arguments.source)
        return
    for number, line in enumerate(sys.stdin.buffer, start=1):
        try:
            text = line.decode("utf-8").removeprefix("\ufeff").strip()
        except UnicodeDecodeError:
            raise BadInput(f"--source -: line {number} is not UTF-8") from None
        if not text:
            continue
        try:
            question = task.question(text)
        except BadInput as error:
            raise BadInput(f"--source -: line {number}: {error}") from None
        yield question


def print_article_block(task: Task, prediction: Prediction) -> None:
    """One pair the way the article shows it: all sequences padded to the same length."""

    def padded(ids: list[int], length: int) -> list[int]:
        return (ids + [task.pad_id] * length)[:length]

    length = task.max_target_len
    decoded = padded(prediction.tokens, length)
    print(f"x           : [{padded(task.encode_source(prediction.pair), task.seq_len)}]")
    # What the decoder was fed: its own answer.
    print(f"dec_input   : [{[task.start_id, *decoded[:-1]]}]")
    print(f"target      : [{padded(prediction.nearest, length)}]")
    print(f"prediction  : [{decoded}]")
    print(f"accuracy    : {prediction.token_matches / len(prediction.nearest):.4g}")
    print(f"chance rate : {1 / task.vocab_size:.4g}")


def results(predictions: dict[Pair, Prediction], task: Task, loss: float, beam: int) -> dict:
    """What evaluation.json holds."""

    def share_exact(pairs: list[Pair]) -> float | None:
        return exact_match([predictions[pair] for pair in pairs]) if pairs else None

    seen = [pair for pair in predictions if task.was_trained(pair)]
    unseen = [pair for pair in predictions if not task.was_trained(pair)]
    answers = predictions.values()
    return {
        "beam": beam,
        "exact_match_seen": share_exact(seen),
        "exact_match_unseen": share_exact(unseen),
        "exact_match_val": share_exact(task.splits.val),
        "exact_match_test": share_exact(task.splits.test),
        "token_accuracy": sum(p.token_matches for p in answers)
        / sum(len(p.nearest) for p in answers),
        "token_error_rate": token_error_rate([predictions[pair] for pair in task.splits.test]),
        "loss": loss,
        "num_seen": len(seen),
        "num_unseen": len(unseen),
        "predictions": [
            {**task.record(pair, p.tokens), "exact": p.exact, "seen": task.was_trained(pair)}
            for pair, p in predictions.items()
        ],
    }


def print_summary(
    result: dict, task: Task, predictions: dict[Pair, Prediction], file: Path
) -> None:
    print(f"\ncheckpoint      {file}")
    decoding = "greedy" if result["beam"] == 1 else f"a beam of {result['beam']}"
    print(f"decoding        {decoding}")
    print(f"trained pairs   {result['exact_match_seen']:.1%} exact, of {result['num_seen']:,}")
    if result["num_unseen"]:
        print(
            f"unseen pairs    {result['exact_match_unseen']:.1%} exact, of "
            f"{result['num_unseen']:,} (validation {result['exact_match_val']:.1%}, "
            f"test {result['exact_match_test']:.1%})"
        )
    else:
        print("unseen pairs    none: this run trained on every pair that is asked")
    wrong = f"{1 - result['exact_match_test']:.2%} of the answers"
    print(f"test errors     {wrong}, {result['token_error_rate']:.2%} of the tokens (edits)")
    tokens = f"{result['token_accuracy']:.1%} of the tokens right"
    print(f"all pairs       {tokens}, loss {result['loss']:.4f}")
    wrong = [answer for answer in predictions.values() if not answer.exact]
    for answer in wrong[:20]:
        kind = "trained" if task.was_trained(answer.pair) else "unseen"
        said = f"{task.source_text(answer.pair)} -> {task.text(answer.tokens)}"
        print(
            f"wrong           {said} ({kind}; right: {' or '.join(task.target_texts(answer.pair))})"
        )
    if len(wrong) > 20:
        print(f"                ... and {len(wrong) - 20:,} more")


def require_output() -> None:
    """Raise BadInput where what was printed got lost, and stands nowhere else."""
    sys.stdout.flush()
    if lost := getattr(sys.stdout, "lost", None):
        raise BadInput(f"the output could not be written: {lost.strerror}")


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
    given = sys.argv[1:] if arguments is None else arguments
    arguments = tyro.cli(Arguments, args=arguments)
    if arguments.list:
        print_runs()
        require_output()
        return
    if not arguments.source and "--source" in given:
        raise BadInput("--source is empty; give one or more, or - for standard input")
    if not 1 <= arguments.beam <= MOST_BEAMS:
        raise BadInput(f"--beam {arguments.beam} must be from 1 to {MOST_BEAMS}")
    if not 0 <= arguments.length_penalty <= 10:
        raise BadInput(f"--length-penalty {arguments.length_penalty} must be from 0 to 10")
    try:
        content, file, folder = load_run(arguments)
    except OSError as error:
        raise BadInput(f"{error.filename} cannot be read: {error.strerror}") from None
    config = config_of_checkpoint(content, file)
    device, _ = choose_device(arguments.accelerator)
    choose_threads(config.dim, config.batch_size)
    keep_freed_memory()
    task = load_task(config, content, None if arguments.source else folder)

    model = Transformer.from_config(config, task).to(device)
    # Where the weights are averaged, last.pt holds both; best.pt holds those that were judged.
    load_state(model, content.get("averaged") or content["model"], file)
    model.eval()
    decoding = {"beam": arguments.beam, "length_penalty": arguments.length_penalty}

    if arguments.source:
        if arguments.source == ("-",) and sys.stdin is None:
            raise BadInput("--source -: standard input is closed")
        pairs = sources_to_answer(arguments, task)
        typed = arguments.source == ("-",) and sys.stdin.isatty()
        at_once = 1 if typed else ANSWERS_AT_ONCE  # whoever types wants the answer now
        while chunk := list(itertools.islice(pairs, at_once)):
            for answer in predict(model, task, chunk, **decoding):
                print(f"{task.source_text(answer.pair)}\t{task.text(answer.tokens)}", flush=True)
        require_output()
        return

    example = chosen_pair(arguments, task)
    pairs = task.splits.every()
    answers = predict(model, task, pairs, **decoding)
    predictions = dict(zip(pairs, answers, strict=True))
    loss = mean_loss(model, PairDataset(task, task.every_line()), device, config.batch_size)
    result = results(predictions, task, loss, arguments.beam)
    print_article_block(task, predictions[example])
    said = f"{task.source_text(example)} -> {task.text(predictions[example].tokens)}"
    trained = "trained" if task.was_trained(example) else "never trained"
    ids = f"{task.start_id} starts, {task.end_id} ends, {task.pad_id} pads"
    print(f"({said}, which was {trained}; {ids})")
    print_summary(result, task, predictions, file)
    save_results(result, folder / "evaluation.json")
    if not arguments.pictures:
        return
    try:
        from transformer_scratch.plots import draw_run, draw_training, save_pictures
    except Exception as error:  # matplotlib is not installed, or broken
        print(f"warning: no pictures: {type(error).__name__}: {error}", file=sys.stderr)
        return
    drawings = draw_run(model, task, answers, example)
    drawings |= draw_training(folder, task.vocab_size, config.clip_norm)
    if pictures := save_pictures(drawings, folder / "pictures"):
        print(f"pictures        {', '.join(picture.name for picture in pictures)}")
        print(f"next            look at {pictures[0]}")


if __name__ == "__main__":
    main()
