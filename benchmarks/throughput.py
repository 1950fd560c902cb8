"""Training samples a second: the article's way step by step to ours, nn.Transformer, Lightning.

    python -m benchmarks.throughput                     the default size: dim 32, batch 128
    python -m benchmarks.throughput --dim 512 --num-heads 8 --batch-size 64
    python -m benchmarks.throughput --lightning         (needs comparison/requirements.txt)

A step is everything from fetching the batch to the updated weights. All ways train on the same
pairs, in turn.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import tyro

from benchmarks.lib.measure import (
    Options,
    Timing,
    interleave,
    number,
    print_table,
    ratio,
    save_json,
    save_picture,
    threads,
)
from benchmarks.lib.training_steps import TrainingStep, TrainingSteps
from transformer_scratch.errors import exits_cleanly
from transformer_scratch.hardware import (
    AUTOCAST_TYPES,
    choose_precision,
    choose_threads,
    keep_freed_memory,
)


@dataclass
class Arguments(Options):
    """Compare training samples a second: the article, nn.Transformer, Lightning and ours."""

    dim: int = 32
    """Width of the model."""
    num_heads: int = 1
    """Attention heads."""
    num_layers: int = 6
    """Blocks in the encoder, and as many in the decoder."""
    batch_size: int = 128
    """Samples a step."""
    amp: str = "auto"
    """Precision of ours and of nn.Transformer: auto, off, bf16."""
    rounds: int = 9
    """Turns of each way, three steps each: a short batch, a middling one and a long one."""
    lightning: bool = False
    """Compare whole updates of train.py and of its Lightning twin, too."""


def from_article_to_ours(
    steps: TrainingSteps, dtype: torch.dtype | None
) -> dict[str, TrainingStep]:
    """One change after the other."""
    ways = {
        "the article's way": steps.article(),
        "+ batches fetched whole": steps.article(item_by_item=False),
        "+ our model": steps.ours(padded=True, fused=False),
        "+ fused optimizer": steps.ours(padded=True),
        "+ batches of about the same length, cut to their longest": steps.ours(),
    }
    if dtype is not None:
        ways["+ bfloat16"] = steps.ours(dtype=dtype)
    return ways


def against_torch(steps: TrainingSteps, dtype: torch.dtype | None) -> dict[str, TrainingStep]:
    """The same batches, the same precision.

    nn.Transformer also drops attention weights and inside the feed-forward network: hence the pair
    without dropout.
    """
    return {
        "nn.Transformer": steps.nn_transformer(0.1, dtype),
        "ours": steps.ours(dtype=dtype),
        "nn.Transformer, dropout 0": steps.nn_transformer(0.0, dtype),
        "ours, dropout 0": steps.ours(0.0, dtype=dtype),
    }


def against_lightning(options: Arguments) -> dict[str, Timing]:
    """Whole programs, without W&B. The mean update of each run counts."""
    from benchmarks.lib.programs import run_lightning, run_train, update_seconds

    flags = {"dim": options.dim, "num-heads": options.num_heads, "num-layers": options.num_layers}
    flags |= {"batch-size": options.batch_size, "amp": options.amp, "accelerator": "cpu"}
    flags = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    updates = 3 if options.quick else 12

    def mean_update(program: Callable) -> float:
        return sum(update_seconds(program, flags, updates)) / updates

    programs = {
        "the Lightning twin": lambda: mean_update(run_lightning),
        "train.py": lambda: mean_update(run_train),
    }
    return interleave(programs, max(1, options.rounds // 3), "against Lightning")


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    options = tyro.cli(Arguments, args=arguments)
    if options.quick:
        options.dim, options.num_heads, options.num_layers = 16, 1, 1
        options.batch_size, options.rounds = 8, 2
    if options.threads is None:
        choose_threads(options.dim, options.batch_size)  # as train.py does
    options.set_threads()
    keep_freed_memory()
    torch.manual_seed(0)
    precision, reason = choose_precision(options.amp, torch.device("cpu"), options.dim)
    dtype = AUTOCAST_TYPES[precision]
    steps = TrainingSteps(options.dim, options.num_heads, options.num_layers, options.batch_size)
    heads = "1 head" if options.num_heads == 1 else f"{options.num_heads} heads"
    size = f"dim {options.dim}, {heads}, batch {options.batch_size}"
    size += f", {threads()}, {str(dtype or torch.float32).removeprefix('torch.')} ({reason})"

    ways = from_article_to_ours(steps, dtype)
    groups = {"from the article's way to ours": interleave(ways, options.rounds, "article")}
    ways = against_torch(steps, dtype)
    groups["against nn.Transformer"] = interleave(ways, options.rounds, "nn.Transformer")
    if options.lightning:
        groups["against Lightning"] = against_lightning(options)

    for title, timings in groups.items():
        print_table(f"{title}: {size}", rows_of(timings, options.batch_size))
    seconds = {
        title: {way: timing.seconds for way, timing in timings.items()}
        for title, timings in groups.items()
    }
    name = f"throughput-dim{options.dim}"
    save_json(options, name, {"size": size, "seconds": seconds})
    ways = groups["from the article's way to ours"]
    save_picture(options, name, lambda: draw(options, ways))


def rows_of(timings: dict[str, Timing], batch_size: int) -> list[dict]:
    """The baseline is the first way; for those without dropout, the first without."""
    names = list(timings)

    def base(name: str) -> str:
        return next(other for other in names if ("dropout 0" in other) == ("dropout 0" in name))

    return [
        {
            "way": name,
            "samples/s": batch_size / timing.median,
            "ms a step (middle half)": timing.show(),
            "x the baseline": f"{ratio(timings[base(name)], timing).median:.2f}",
        }
        for name, timing in timings.items()
    ]


def draw(options: Arguments, timings: dict[str, Timing]) -> object:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 2.8), layout="constrained")
    axes = figure.subplots()
    speeds = [options.batch_size / timing.median for timing in timings.values()]
    bars = axes.barh(list(timings), speeds, color=["#888", *["#8bc"] * (len(speeds) - 2), "#2a7"])
    first = next(iter(timings.values()))
    ratios = [ratio(first, timing).median for timing in timings.values()]
    labels = [f"{number(speed)}  ({x:.2f} x)" for speed, x in zip(speeds, ratios, strict=True)]
    axes.bar_label(bars, labels, padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.3)
    axes.set_xlabel("training samples a second")
    axes.set_title(
        f"From the article's way to ours: dim {options.dim}, batch {options.batch_size}",
        fontsize=10,
    )
    return figure


if __name__ == "__main__":
    main()
