"""What each line of train.py is for, measured by removing it: one training with it, one without.

    python -m comparison.hidden_steps.remove_lines                 every tag, in a few minutes
    python -m comparison.hidden_steps.remove_lines zero_grad ...   these tags

Exit code 0 if every removal has an effect.
"""

import re
import sys

from tqdm import tqdm

from comparison.hidden_steps.observe import NO_NUMBERS, PROJECT, Observed, observe
from transformer_scratch.errors import exits_cleanly

TAG = re.compile(r"#\s*\[hidden: (.+?)\]")

# Learns the task in ten seconds: nearly all pairs are right at the end.
TRAINING = (
    "--dim 32 --num-layers 1 --batch-size 64 --num-datas 6400 --max-epochs 3 --lr 0.006 "
    "--warmup-steps 30 --weight-decay 0.1 --label-smoothing 0 --average 0 --seed 4 --amp off "
    "--accelerator cpu --wandb disabled"
)

# What replaces a line that others depend on. Every other tagged line becomes `pass`.
INSTEAD = {
    "no gradients outside training": "# (no decorator)",
    "autocast": "if True:",
    "clipping": "grad_norm = nn.utils.clip_grad_norm_(model.parameters(), math.inf)",
    "reading the loss only now and then": "if True:",
    "epoch mean": 'row["train/loss_epoch"] = loss.item()',
    "validation": 'row["val/loss_epoch"] = row["train/loss_epoch"]',
    "the best k": "progress.ranking = ranking",
}

# Some lines have no effect in float32 on one CPU; these flags activate them.
FLAGS = {
    "autocast": ["--amp", "bf16"],
    "accumulation": ["--accumulate", "4"],
    "no_sync": ["--accumulate", "4", "--devices", "2"],
    "gradients averaged over the processes": ["--devices", "2"],
    "averaging": ["--average", "0.99"],
    "unscale before clipping": ["--amp", "fp16"],
    "scaler update": ["--amp", "fp16"],
    "the best k": ["--save-top-k", "1"],
}

# These have no effect on a CPU at all: they are measured on a device that stands in for a GPU.
ON_META = {"model to the device", "batch to the device"}

# How a number of Observed that differs is reported: without the line, with it.
SENTENCES = {
    "updates": "{} updates instead of {}",
    "best_epoch": "best.pt is epoch {}, not {}",
    "epochs_kept": "{} epoch files are kept instead of {}",
    "resume_step": "--resume goes back to update {}, not {}",
    "rows_logged": "W&B gets {} rows of updates instead of {}",
    "readings": "the loop waits for the device {} times instead of {}",
    "exchanges": "the processes exchange gradients {} times instead of {}",
    "kib_kept": "evaluation keeps {} KiB for a backward pass that never comes, instead of {}",
}


def tags(source: str) -> list[str]:
    """The tags of a train.py, in the order of its lines."""
    return TAG.findall(source)


def remove(source: str, tag: str) -> str:
    """The source without the line of this tag. Raises ValueError unless exactly one line has it."""
    lines = source.splitlines(keepends=True)
    found = [number for number, line in enumerate(lines) if tag in tags(line)]
    if len(found) != 1:
        raise ValueError(f"{len(found)} lines have the tag [hidden: {tag}]")
    line = lines[found[0]]
    indent = line[: len(line) - len(line.lstrip())]
    lines[found[0]] = f"{indent}{INSTEAD.get(tag, 'pass')}\n"
    return "".join(lines)


def effects(before: Observed, after: Observed) -> list[str]:
    """What differs without the line."""
    if after.crash != before.crash:
        return [f"stops in batch {after.batches}: {after.crash}" if after.crash else "no crash"]
    found = []
    pairs = list(zip(before.losses, after.losses, strict=False))
    steps = [step for step, (a, b) in enumerate(pairs, start=1) if a != b]
    if steps:
        largest = max(abs(a - b) for a, b in pairs)
        found.append(f"losses differ from update {steps[0]} on, by up to {largest:.2g}")
    for name, a in before.figures.items():
        b = after.figures.get(name)
        if a != b:
            found.append(f"{name} {a:.4g} → {b:.4g}")
    for name, sentence in SENTENCES.items():
        a, b = getattr(before, name), getattr(after, name)
        if a != b:
            found.append(sentence.format(b, a))
    return found


def measure(tag: str, source: str, training: list[str], references: dict) -> list[str]:
    """The effects of removing the line. references: trainings with all lines, by their flags."""
    flags, on_meta = [*training, *FLAGS.get(tag, [])], tag in ON_META
    key = (*flags, on_meta)
    if key not in references:
        references[key] = observe(source, flags, on_meta)
    before = references[key]
    if before.crash and not (on_meta and NO_NUMBERS in before.crash):
        raise RuntimeError(f"the training with all lines failed: {before.crash}")
    return effects(before, observe(remove(source, tag), flags, on_meta))


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    chosen = sys.argv[1:] if arguments is None else arguments
    source = (PROJECT / "train.py").read_text(encoding="utf-8")
    if unknown := set(chosen) - set(tags(source)):
        sys.exit(
            f"error: no line of train.py has the tag {', '.join(sorted(unknown))}; "
            f"these exist: {', '.join(tags(source))}"
        )
    references: dict = {}
    without_effect = 0
    for tag in tqdm(chosen or tags(source), unit="tag", disable=not sys.stderr.isatty()):
        found = measure(tag, source, TRAINING.split(), references)
        without_effect += not found
        condition = "on a stand-in for a GPU" if tag in ON_META else " ".join(FLAGS.get(tag, []))
        tqdm.write(f"{tag}  {condition}".rstrip())
        for effect in found or ["NOTHING CHANGES"]:
            tqdm.write(f"    {effect}")
        sys.stdout.flush()
    if without_effect:
        sys.exit(1)


if __name__ == "__main__":
    main()
