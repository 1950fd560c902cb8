"""What each line is for, by taking it out: train.py without one tagged line after the other, in a temporary copy.

python -m comparison.without                 every tag, in a few minutes
python -m comparison.without zero_grad ...   these tags
"""

import itertools
import re
import statistics
import sys
from pathlib import Path

from tqdm import tqdm

from comparison.watching import Observed, observe, observe_on_two_processes

PROJECT = Path(__file__).resolve().parent.parent
TAG = re.compile(r"#\s*\[hidden: (.+?)\]")

# Learns the task in ten seconds: nearly all pairs right at the end; with this seed the second epoch is the best.
TRAINING = ["--dim", "32", "--num-layers", "1", "--batch-size", "64", "--num-datas", "6400", "--max-epochs", "3",
            "--lr", "0.006", "--warmup-steps", "30", "--seed", "4", "--amp", "off", "--wandb", "disabled"]  # fmt: skip

# A line that others need cannot just go: this stands in its place. Every other tagged line becomes `pass`.
INSTEAD = {
    "no gradients outside training": "# (no decorator)",
    "no_sync": "if True:",
    "autocast": "if True:",
    "clipping": "grad_norm = nn.utils.clip_grad_norm_(parameters, math.inf)",
    "reading the loss only now and then": "if True:",
    "epoch mean": 'row["train/loss_epoch"] = loss.item()',
    "validation": 'row["val/loss_epoch"] = row["train/loss_epoch"]',
    "the best k": 'ranking = [[row["val/loss_epoch"], epoch], *ranking]',
}

# In plain float32 training on one CPU some lines rest. These are the flags that wake them.
FLAGS = {
    "autocast": ["--amp", "bf16"],
    "accumulation": ["--accumulate", "4"],
    "no_sync": ["--accumulate", "4", "--devices", "2"],
    "gradients averaged over the processes": ["--devices", "2"],
    "unscale before clipping": ["--amp", "fp16"],
    "scaler update": ["--amp", "fp16"],
    "the best k": ["--save-top-k", "1"],
}
# A line that moves tensors to the GPU does nothing on a CPU. PyTorch's meta device, which knows shapes and no numbers,
# stands in for a GPU: it, too, refuses tensors that lie elsewhere. A training there ends where a number is first read.
ON_META = {"model to the device", "batch to the device"}


def tags(source: str) -> list[str]:
    """The tags of a train.py, in the order of its lines."""
    return TAG.findall(source)


def take_out(source: str, tag: str) -> str:
    """The source without the line of this tag. Raises ValueError unless exactly one line has it."""
    lines = source.splitlines(keepends=True)
    found = [number for number, line in enumerate(lines) if tag in TAG.findall(line)]
    if len(found) != 1:
        raise ValueError(f"{len(found)} lines have the tag [hidden: {tag}]")
    line = lines[found[0]]
    indent = line[: len(line) - len(line.lstrip())]
    lines[found[0]] = f"{indent}{INSTEAD.get(tag, 'pass')}\n"
    return "".join(lines)


def effects(before: Observed, after: Observed) -> list[str]:
    """What is different without the line, the worst first."""
    found = []
    if after.crash != before.crash:
        found.append(
            f"stops after {after.batches} batches: {after.crash}"
            if after.crash
            else "does not stop"
        )
    if before.losses and not after.losses and not after.crash:
        found.append("no losses are written")
    pairs = list(zip(before.losses, after.losses, strict=False))
    if len(before.losses) != len(after.losses) and not after.crash:
        found.append(f"{len(after.losses)} updates instead of {len(before.losses)}")
    first = next((step for step, (a, b) in enumerate(pairs, start=1) if a != b), None)
    if first is not None:
        largest = max(abs(a - b) for a, b in pairs)
        found.append(f"losses differ from update {first} on, by up to {largest:.2g}")
    for name in (
        "train/loss_epoch",
        "val/loss_epoch",
        "val/exact_match",
        "test/loss_epoch",
        "test/exact_match",
    ):
        a, b = before.figures.get(name), after.figures.get(name)
        if a is not None and b is not None and a != b:
            form = (
                "{:.1%}"
                if "exact" in name
                else "{:.4g}"
                if abs(a - b) > 1e-3 * abs(a)
                else "{:.9g}"
            )
            found.append(f"{name} {form.format(a)} → {form.format(b)}")
    if after.crash is None:
        if after.best_epoch != before.best_epoch:
            found.append(f"best.pt is epoch {after.best_epoch}, not {before.best_epoch}")
        if len(after.epochs_kept) != len(before.epochs_kept):
            found.append(
                f"{len(after.epochs_kept)} epoch files kept instead of {len(before.epochs_kept)}"
            )
        if after.resume_step != before.resume_step:
            found.append(
                f"--resume goes back to update {after.resume_step}, not {before.resume_step}"
            )
        if after.logged != before.logged:
            found.append(f"W&B gets {after.logged} rows of updates instead of {before.logged}")
        if after.readings != before.readings:
            found.append(
                f"the loop waits for the device {after.readings} times instead of {before.readings}"
            )
        if after.exchanges != before.exchanges:
            found.append(
                f"the processes exchange gradients {after.exchanges} times instead of {before.exchanges}"
            )
        if after.kept_bytes != before.kept_bytes:
            found.append(
                f"evaluation keeps {after.kept_bytes / 2**20:.1f} MiB for a backward pass that never comes, "
                f"instead of {before.kept_bytes / 2**20:.1f}"
            )
    return found


def measure(tag: str, source: str, training: list[str], references: dict) -> tuple[list[str], str]:
    """The effects of taking this tag's line out, and the speed, which is never quite the same twice.

    references keeps the trainings with all lines, by their flags.
    """
    flags = [*training, *FLAGS.get(tag, [])]
    two, on_meta = "--devices" in flags, tag in ON_META

    def look(text: str) -> Observed:
        return observe_on_two_processes(text, flags) if two else observe(text, flags, on_meta)

    key = (*flags, on_meta)
    if key not in references:
        references[key] = look(source)
    before, after = references[key], look(take_out(source, tag))
    return effects(before, after), f"{batch_ms(before)} → {batch_ms(after)} ms a batch"


def batch_ms(seen: Observed) -> str:
    """The median time from one batch to the next."""
    steps = [b - a for a, b in itertools.pairwise(seen.times)]
    return f"{statistics.median(steps) * 1e3:.1f}" if steps else "-"


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    source = (PROJECT / "train.py").read_text()
    if unknown := set(arguments) - set(tags(source)):
        sys.exit(
            f"error: no line of train.py has the tag {', '.join(unknown)}; these exist: {', '.join(tags(source))}"
        )
    references: dict = {}
    useless = []
    for tag in tqdm(arguments or tags(source), unit="tag", disable=not sys.stderr.isatty()):
        found, speed = measure(tag, source, TRAINING, references)
        tqdm.write(
            f"{tag}\n    {' '.join(FLAGS.get(tag, []))}{'on a device that is not the CPU' * (tag in ON_META)}".rstrip()
        )
        for effect in found or ["NOTHING CHANGES"]:
            tqdm.write(f"    - {effect}")
        tqdm.write(f"    ({speed})")
        useless += [] if found else [tag]
    sys.exit(1 if useless else 0)


if __name__ == "__main__":
    main()
