"""Training samples a second: from the article's way to ours step by step, against nn.Transformer, against Lightning.

    python -m benchmarks.throughput                     dim 512, 8 heads, batch 64
    python -m benchmarks.throughput --dim 32 --num-heads 1 --batch-size 128
    python -m benchmarks.throughput --lightning         (needs comparison/requirements.txt)

A step is everything from fetching the batch to the updated weights. All ways train on the same pairs, in turn.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import tyro

from benchmarks.measure import Options, Timing, interleave, number, peak_flops, print_table, save_json, save_picture
from benchmarks.ways import Ways, padded_loss
from transformer_scratch.runtime import choose_precision, keep_freed_memory


@dataclass
class Arguments(Options):
    """Training samples a second and where they come from."""

    dim: int = 512
    """Width of the model."""
    num_heads: int = 8
    """Attention heads."""
    num_layers: int = 6
    """Blocks in the encoder, and as many in the decoder."""
    batch_size: int = 64
    """Samples a step."""
    amp: str = "auto"
    """Precision of the last step of the waterfall: auto, off, bf16."""
    rounds: int = 9
    """Steps of each way."""
    lightning: bool = False
    """Time whole runs of train.py and of its Lightning twin too."""


def waterfall(ways: Ways, dtype: torch.dtype | None) -> dict[str, Callable[[], None]]:
    """From the article's program to ours, one change after the other."""
    plain = {"loss_function": padded_loss, "data": ways.padded}
    steps = {
        "the article's way": ways.article(),
        "+ batches fetched whole": ways.article(item_by_item=False),
        "+ our model, dropped out only where the paper does": ways.ours(**plain, torch_dropout=True, fused=False),
        "+ dropout drawn four at a time": ways.ours(**plain, fused=False),
        "+ fused optimizer": ways.ours(**plain),
        "+ batches cut to their longest": ways.ours(padded_loss),
        "+ padding in between left out": ways.ours(),
    }
    if dtype is not None:
        steps["+ bfloat16"] = ways.ours(dtype=dtype)
    return steps


def against_torch(ways: Ways, dtype: torch.dtype | None) -> dict[str, Callable[[], None]]:
    """Same trimmed batches, same precision. nn.Transformer drops attention weights and inside the feed-forward too."""
    return {
        "nn.Transformer, its own dropout": ways.nn_transformer(0.1, dtype),
        "ours, every position computed": ways.ours(padded_loss, dtype=dtype),
        "ours": ways.ours(dtype=dtype),
        "nn.Transformer, dropout 0": ways.nn_transformer(0.0, dtype),
        "ours, every position computed, dropout 0": ways.ours(padded_loss, dropout=0.0, dtype=dtype),
        "ours, dropout 0": ways.ours(dropout=0.0, dtype=dtype),
    }


def against_lightning(options: Arguments) -> dict[str, Timing]:
    """Whole programs: train.py and its twin, all but W&B. The median update of each run counts."""
    from benchmarks.programs import run_lightning, run_train, update_seconds

    flags = {"dim": options.dim, "num-heads": options.num_heads, "num-layers": options.num_layers}
    flags |= {"batch-size": options.batch_size, "amp": options.amp}
    flags = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    updates = 2 if options.quick else 10

    def median_update(program: Callable) -> float:
        return Timing(update_seconds(program, flags, updates)).median

    programs = {"Lightning twin": lambda: median_update(run_lightning), "train.py": lambda: median_update(run_train)}
    return interleave(programs, max(1, options.rounds // 3), "against Lightning")


def rows_of(timings: dict[str, Timing], batch_size: int, ratio: str, base: Callable[[str], str]) -> list[dict]:
    """base: whose samples a second a way's are divided by."""
    return [
        {"way": name, "samples/s": batch_size / timing.median, "ms a step (middle half)": timing.show(),
         ratio: f"{timings[base(name)].median / timing.median:.2f}"}
        for name, timing in timings.items()
    ]  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    options = tyro.cli(Arguments, args=arguments)
    if options.quick:
        options.dim, options.num_heads, options.num_layers, options.batch_size, options.rounds = 16, 1, 1, 8, 2
    options.set_threads()
    keep_freed_memory()
    torch.manual_seed(0)
    dtype, reason = choose_precision(options.amp, torch.device("cpu"), options.dim)
    size = (
        f"dim {options.dim}, {options.num_heads} heads, batch {options.batch_size}, {torch.get_num_threads()} threads"
    )
    peak = peak_flops(dtype or torch.float32, 256 if options.quick else 1536)
    ways = Ways(options.dim, options.num_heads, options.num_layers, options.batch_size)

    falls = interleave(waterfall(ways, dtype), options.rounds, "from the article's way to ours")
    rows = rows_of(falls, options.batch_size, "x the article's", lambda _: "the article's way")
    print_table(f"{size}; precision {dtype or torch.float32}: {reason}", rows)
    last = list(falls.values())[-1]
    useful = ways.useful_flops()
    used = useful / last.median / peak
    print(
        f"\n{number(useful / 1e9)} useful GFLOP a step, {used:.0%} of what one large matrix product would reach in that"
    )
    print(f"time, {number(peak / 1e9)} GFLOP/s")

    theirs = interleave(against_torch(ways, dtype), options.rounds, "against nn.Transformer")

    def reference(name: str) -> str:
        return "nn.Transformer, dropout 0" if name.endswith("dropout 0") else "nn.Transformer, its own dropout"

    rows = rows_of(theirs, options.batch_size, "x nn.Transformer's", reference)
    print_table(f"{size}, against nn.Transformer on the same trimmed batches", rows)
    result = {"size": size, "useful FLOP": useful, "peak FLOP/s": peak, "used": used}
    groups = {"waterfall": falls, "nn.Transformer": theirs}
    if options.lightning:
        groups["lightning"] = against_lightning(options)
        rows = rows_of(groups["lightning"], options.batch_size, "x the twin's", lambda _: "Lightning twin")
        print_table(f"{size}, whole programs", rows)
    seconds = {name: {way: timing.seconds for way, timing in group.items()} for name, group in groups.items()}
    name = "throughput" if options.dim == 512 else f"throughput-dim{options.dim}"
    save_json(options, name, result | {"seconds": seconds})
    draw(options, name, falls, size)


def draw(options: Arguments, name: str, falls: dict[str, Timing], size: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.subplots()
    speeds = [options.batch_size / timing.median for timing in falls.values()]
    bars = axes.barh(list(falls), speeds, color=["#888", *["#8bc"] * (len(speeds) - 2), "#2a7"])
    axes.bar_label(bars, [f"{number(speed)}  ({speed / speeds[0]:.2f} x)" for speed in speeds], padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.3)
    axes.set_xlabel("training samples a second")
    axes.set_title(f"From the article's way to ours: {size}", fontsize=10)
    save_picture(options, name, figure)


if __name__ == "__main__":
    main()
