"""Greedy decoding with and without a key-value cache: sequences a second, by length.

    python -m benchmarks.decoding       dim 512, 8 heads, 100 pairs at once

The weights are random and no answer ends before the full length: the most that decoding can cost.
In real use finished answers are dropped on the way, which is impossible at a fixed length.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import tyro
from torch import Tensor

from benchmarks.lib.article_baseline import ArticleTransformer
from benchmarks.lib.measure import (
    Options,
    Timing,
    interleave,
    print_table,
    save_json,
    save_picture,
    threads,
)
from transformer_scratch.decoding import greedy_decode
from transformer_scratch.digits import Digits
from transformer_scratch.errors import exits_cleanly
from transformer_scratch.hardware import keep_freed_memory
from transformer_scratch.model import Transformer

NEVER = -1  # an end token that no model writes
ARTICLE = "article, fixed length"


@dataclass
class Arguments(Options):
    """Measure sequences a second of greedy decoding."""

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
def seconds_without_cache(
    decode: Callable, memory: Tensor, prefixes: list[int], length: int
) -> float:
    """-> seconds to write `length` tokens when the prefix is decoded again for each of them.

    Only one token is timed for each length in `prefixes`; their mean stands for all.
    """
    started = time.perf_counter()
    for prefix in prefixes:
        decode(torch.ones(len(memory), prefix, dtype=torch.int64), memory)[:, -1].argmax(dim=-1)
    return (time.perf_counter() - started) / len(prefixes) * length


def ways_to_decode(options: Arguments, length: int) -> dict[str, Callable[[], object]]:
    """The time of the encoder counts for the way with the cache only."""
    task = Digits()
    source = torch.tensor([task.encode_source(pair) for pair in task.all_pairs()])  # (100, 4)
    sizes = (task.vocab_size, options.dim, options.num_heads, options.num_layers)
    model = Transformer(*sizes).eval()
    article = ArticleTransformer(*sizes, ffn_dim=4 * options.dim, dropout=0.1).eval()
    memory = torch.randn(len(source), task.seq_len, options.dim)  # the article's is padded
    growing = [length * eighth // 8 for eighth in (1, 3, 5, 7)]  # on average 1, 2, ..., length
    return {
        "cache": lambda: greedy_decode(
            model, source, task.start_id, NEVER, length, source_is_padded=False
        ),
        "whole prefix": lambda: seconds_without_cache(model.decode, memory[:, :4], growing, length),
        ARTICLE: lambda: seconds_without_cache(article.decode, memory, [length], length),
    }


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    options = tyro.cli(Arguments, args=arguments)
    if options.quick:
        options.dim, options.num_heads, options.num_layers = 16, 1, 1
        options.lengths, options.rounds = (8, 16), 1
    options.set_threads()
    keep_freed_memory()
    torch.manual_seed(0)
    timings: dict[int, dict[str, Timing]] = {
        length: interleave(ways_to_decode(options, length), options.rounds, f"{length} tokens")
        for length in options.lengths
    }

    size = f"dim {options.dim}, {options.num_heads} heads, 100 pairs at once"
    size += f", {threads()}"
    rows = [
        {
            "tokens": str(length),
            "way": name,
            "sequences/s": 100 / timing.median,
            "s for 100 (middle half)": timing.show(1),
            "ms a token of 100": timing.median / length * 1e3,
            "x the article's": f"{ways[ARTICLE].median / timing.median:.1f}",
        }
        for length, ways in timings.items()
        for name, timing in ways.items()
    ]
    print_table(f"Greedy decoding, {size}", rows)
    seconds = {
        length: {name: timing.seconds for name, timing in ways.items()}
        for length, ways in timings.items()
    }
    save_json(options, "decoding", {"size": size, "seconds": seconds})
    save_picture(options, "decoding", lambda: draw(options, timings, size))


def draw(options: Arguments, timings: dict[int, dict[str, Timing]], size: str) -> object:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for name, color in (("cache", "#2a7"), ("whole prefix", "#8bc"), (ARTICLE, "#888")):
        seconds = [ways[name].median for ways in timings.values()]
        axes.plot(options.lengths, seconds, "o-", label=name, color=color)
    first = options.lengths[0]
    linear = [timings[first]["cache"].median * length / first for length in options.lengths]
    axes.plot(options.lengths, linear, ":", color="#2a7", label="linear growth")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(options.lengths, [str(length) for length in options.lengths])
    axes.set_xlabel("tokens decoded")
    axes.set_ylabel("seconds for 100 sequences")
    axes.set_title(size, fontsize=10)
    axes.legend()
    return figure


if __name__ == "__main__":
    main()
