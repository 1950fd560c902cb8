"""What a training step spends its time on, by PyTorch's profiler: matrix products, dropout, copies, the optimizer, ...

python -m benchmarks.where_time_goes                    dim 512, 8 heads, batch 64
python -m benchmarks.where_time_goes --dim 32 --num-heads 1 --batch-size 128
"""

from collections import Counter
from dataclasses import dataclass

import torch
import tyro
from torch.profiler import ProfilerActivity, profile

from benchmarks.measure import Options, number, print_table, save_json, save_picture
from benchmarks.ways import Ways
from transformer_scratch.runtime import choose_precision, keep_freed_memory

# The operators that do the work, without those that only call them.
KINDS = {
    "matrix products": {"mm", "addmm", "bmm", "mkldnn_linear", "_mkl_linear", "baddbmm"},
    "attention's kernel": {f"_scaled_dot_product_flash_attention_for_cpu{way}" for way in ("", "_backward")},
    "softmax and masks": {"_softmax", "_softmax_backward_data", "masked_fill", "masked_fill_", "bitwise_not", "tril"},
    "layer norm": {"native_layer_norm", "native_layer_norm_backward"},
    "dropout's random numbers": {"random_", "ge", "bernoulli_"},
    "element by element": {"add", "add_", "mul", "mul_", "div", "div_", "clamp_min", "threshold_backward", "sum"},
    "copies, casts, packing": {"copy_", "cat", "index_select", "index_copy_", "index_add_", "fill_"},
    "optimizer and clipping": {"_fused_adamw_", "linalg_vector_norm", "_foreach_norm", "_foreach_mul_", "stack"},
}


@dataclass
class Arguments(Options):
    """Where the time of a training step goes."""

    dim: int = 512
    """Width of the model."""
    num_heads: int = 8
    """Attention heads."""
    num_layers: int = 6
    """Blocks in the encoder, and as many in the decoder."""
    batch_size: int = 64
    """Samples a step."""
    amp: str = "auto"
    """Precision: auto, off, bf16."""
    steps: int = 8
    """Training steps to profile."""


def main(arguments: list[str] | None = None) -> None:
    options = tyro.cli(Arguments, args=arguments)
    if options.quick:
        options.dim, options.num_heads, options.num_layers, options.batch_size, options.steps = 16, 1, 1, 8, 2
    options.set_threads()
    keep_freed_memory()
    torch.manual_seed(0)
    dtype, _ = choose_precision(options.amp, torch.device("cpu"), options.dim)
    step = Ways(options.dim, options.num_heads, options.num_layers, options.batch_size).ours(dtype=dtype)
    for _ in range(3):
        step()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(options.steps):
            step()

    kind_of = {f"aten::{operator}": kind for kind, operators in KINDS.items() for operator in operators}
    milliseconds, calls = Counter(dict.fromkeys([*KINDS, "everything else"], 0)), Counter()
    for event in profiler.key_averages():
        kind = kind_of.get(event.key, "everything else")  # views, allocation, autograd, Python's part in calling them
        milliseconds[kind] += event.self_cpu_time_total / options.steps / 1e3
        calls[kind] += event.count // options.steps
    total = sum(milliseconds.values())
    rows = [
        {"kind": kind, "ms a step": value, "share": f"{value / total:.0%}", "calls a step": str(calls[kind])}
        for kind, value in milliseconds.items()
    ]
    size = f"dim {options.dim}, {options.num_heads} heads, batch {options.batch_size}, {dtype or torch.float32}"
    size += f", {torch.get_num_threads()} threads"
    print_table(f"Where a training step's {number(total)} ms go: {size}", rows)
    name = f"where-time-goes-dim{options.dim}"
    save_json(options, name, {"size": size, "milliseconds": milliseconds, "calls": calls})
    draw(options, name, milliseconds, size)


def draw(options: Options, name: str, milliseconds: dict[str, float], size: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3), layout="constrained")
    axes = figure.subplots()
    total = sum(milliseconds.values())
    bars = axes.barh(list(milliseconds), list(milliseconds.values()), color="#2a7")
    axes.bar_label(bars, [f"{value / total:.0%}" for value in milliseconds.values()], padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("ms a training step")
    axes.set_title(f"Where a training step spends its time: {size}", fontsize=10)
    save_picture(options, name, figure)


if __name__ == "__main__":
    main()
