"""What the loop costs: a step with train.py against one with the Lightning twin, at three sizes, logging included.

    python -m comparison.speed          a few minutes
    python -m comparison.speed small    that size alone

Both programs write W&B's files (offline) and read the loss every ten updates. They take turns, so that whatever else
the machine does hits both: a ratio is taken in each round, and the median of the rounds counts. "Around the model" is
what is left of a step when fetching the batch, forward, loss, backward, clipping, AdamW's step and zero_grad, which
both call alike, are taken off.
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from comparison.compare import number_of_updates, start
from transformer_scratch.config import load_config, settle_config
from transformer_scratch.runtime import ALONE

SIZES = {
    "small": ["--dim", "16", "--num-layers", "1", "--batch-size", "8", "--num-datas", "8000", "--max-epochs", "1"],
    "default": ["--num-datas", "12800", "--max-epochs", "1"],
    "paper": ["--dim", "512", "--num-heads", "8", "--batch-size", "32", "--num-datas", "960", "--max-epochs", "1"],
}
ROUNDS = {"small": 9, "default": 7, "paper": 5}


def measure(folder: Path, side: str, flags: list[str]) -> dict:
    config, *_ = settle_config(load_config(flags)[0], ALONE)
    file = folder / f"{side}.json"
    start(None, "comparison.measured", side, file, number_of_updates(config), config.log_every, time.time(), *flags,
          "--wandb", "offline", "--run-dir", folder / side)  # fmt: skip
    return json.loads(file.read_text())


def compare_speed(flags: list[str], rounds: int) -> dict[str, tuple[float, float, float]]:
    """-> for milliseconds of a step and microseconds around the model: (train.py, Lightning, Lightning / train.py)."""
    results: dict[str, list[dict]] = {"plain": [], "unrecorded": []}
    for number in range(rounds):
        for side in sorted(results, reverse=number % 2):  # A B B A: neither always runs after the other
            with tempfile.TemporaryDirectory() as folder:
                results[side].append(measure(Path(folder), side, flags))
    found = {}
    for name in ("step_ms", "around_us"):
        ours, theirs = ([result[name] for result in results[side]] for side in results)
        ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
        found[name] = tuple(map(statistics.median, (ours, theirs, ratios)))
    return found


def main() -> None:
    sizes = sys.argv[1:] or list(SIZES)
    lines = []
    for size in sizes:
        found = compare_speed(SIZES[size], ROUNDS[size])
        (our_step, their_step, step_ratio), (our_rest, their_rest, rest_ratio) = found["step_ms"], found["around_us"]
        lines.append(
            f"{size:<8}  step {our_step:.2f} ms, Lightning {their_step:.2f} ms: {step_ratio:.2f} times as long; "
            f"around the model {our_rest:.0f} µs, Lightning {their_rest:.0f} µs: {1 / rest_ratio:.2f} of it\n"
            f"{'':<10}({' '.join(SIZES[size])})"
        )
    print("\n".join(lines))


if __name__ == "__main__":
    main()
