"""Greedy decoding with and without a key-value cache: sequences a second, and how the cost grows with the length.

    python -m benchmarks.decode         dim 512, 8 heads, 100 pairs at once

The weights are random and no answer ends before the full length: the most that decoding can cost. (In real use finished
answers are dropped on the way, which the ways without a cache cannot do at a fixed length.)
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import tyro
from torch import Tensor

from benchmarks.article_baseline import ArticleTransformer
from benchmarks.measure import Options, Timing, interleave, print_table, save_json, save_picture
from transformer_scratch.data import PairDataset, Task
from transformer_scratch.decoding import greedy_decode
from transformer_scratch.model import Transformer
from transformer_scratch.runtime import keep_freed_memory

NEVER = -1  # an end token that no model writes


@dataclass
class Arguments(Options):
    """Sequences a second of greedy decoding."""

    dim: int = 512
    """Width of the model."""
    num_heads: int = 8
    """Attention heads."""
    num_layers: int = 6
    """Blocks in the encoder, and as many in the decoder."""
    lengths: tuple[int, ...] = (16, 32, 64, 128)
    """Tokens to decode."""
    rounds: int = 5
    """Runs of each way and length."""


@torch.inference_mode()
def seconds_without_cache(decode: Callable, memory: Tensor, positions: list[int], length: int) -> float:
    """Seconds to write `length` tokens when earlier ones go through the decoder again for each of them.

    Timed are single tokens, one for each number of positions that the decoder then sees; their mean stands for all.
    """
    started = time.perf_counter()
    for count in positions:
        decode(torch.ones(len(memory), count, dtype=torch.int64), memory)[:, -1].argmax(dim=-1)
    return (time.perf_counter() - started) / len(positions) * length


def ways_to_decode(options: Arguments, length: int) -> dict[str, Callable[[], object]]:
    """The encoder counts for our way alone."""
    task = Task()
    source = PairDataset(task, task.all_pairs()).source  # (100, seq_len), padding included
    model = Transformer(task.vocab_size, options.dim, options.num_heads, options.num_layers).eval()
    article = ArticleTransformer(
        task.vocab_size, options.dim, options.num_heads, options.num_layers, 4 * options.dim, dropout=0.1
    ).eval()
    memory = torch.randn(*source.shape, options.dim)
    growing = [length * eighth // 8 for eighth in (1, 3, 5, 7)]  # on average as long as 1, 2, ..., length
    return {
        "cache": lambda: greedy_decode(model, source[:, :4], task.start_id, NEVER, length),
        "whole prefix": lambda: seconds_without_cache(model.decode, memory[:, :4], growing, length),
        "article, fixed length": lambda: seconds_without_cache(article.decode, memory, [length], length),
    }


def main(arguments: list[str] | None = None) -> None:
    options = tyro.cli(Arguments, args=arguments)
    if options.quick:
        options.dim, options.num_heads, options.num_layers, options.lengths, options.rounds = 16, 1, 1, (8, 16), 1
    options.set_threads()
    keep_freed_memory()
    torch.manual_seed(0)
    timings: dict[str, dict[int, Timing]] = {"cache": {}, "whole prefix": {}, "article, fixed length": {}}
    for length in options.lengths:
        measured = interleave(ways_to_decode(options, length), options.rounds, f"{length} tokens")
        for name, timing in measured.items():
            timings[name][length] = timing

    size = f"dim {options.dim}, {options.num_heads} heads, 100 pairs at once, {torch.get_num_threads()} threads"
    rows = [
        {"tokens": str(length), "way": name, "sequences/s": 100 / by_length[length].median,
         "s for 100 (middle half)": by_length[length].show(1), "ms a token of 100":
         by_length[length].median / length * 1e3,
         "x the article's": f"{timings['article, fixed length'][length].median / by_length[length].median:.1f}"}
        for length in options.lengths for name, by_length in timings.items()
    ]  # fmt: skip
    print_table(f"Greedy decoding, {size}", rows)
    seconds = {name: {n: timing.seconds for n, timing in by_length.items()} for name, by_length in timings.items()}
    save_json(options, "decode", {"size": size, "seconds": seconds})
    draw(options, timings, size)


def draw(options: Arguments, timings: dict[str, dict[int, Timing]], size: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for (name, by_length), color in zip(timings.items(), ("#2a7", "#8bc", "#888"), strict=True):
        axes.plot(list(by_length), [timing.median for timing in by_length.values()], "o-", label=name, color=color)
    first = timings["cache"][options.lengths[0]].median
    linear = [first * length / options.lengths[0] for length in options.lengths]
    axes.plot(options.lengths, linear, ":", color="#2a7", label="linear growth")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(options.lengths, [str(length) for length in options.lengths])
    axes.set_xlabel("tokens decoded")
    axes.set_ylabel("seconds for 100 sequences")
    axes.set_title(size, fontsize=10)
    axes.legend()
    save_picture(options, "decode", figure)


if __name__ == "__main__":
    main()
