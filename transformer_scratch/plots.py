"""Pictures of a run: what the model answers, where it looks, how it learned.

The model records nothing: attention_weights computes the maps again from what its attention modules
are given. Colours are those of Okabe and Ito, which colour-blind readers can tell apart; sizes are
for a projector.

Shapes: H heads, T query positions, S key positions.
"""

import math
import sys
import textwrap
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import transformer_scratch.own_matplotlib  # noqa: F401 - imports matplotlib, so it comes first

# isort: split
import torch
from matplotlib import rc_context, rcParamsDefault
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import LogFormatter
from torch import Tensor, nn

from transformer_scratch.attention import MultiHeadAttention, attention_weights, causal_mask
from transformer_scratch.digits import Digits
from transformer_scratch.evaluation import Prediction
from transformer_scratch.fonts import choose_fonts, legible
from transformer_scratch.model import Transformer
from transformer_scratch.run_folder import read_metrics
from transformer_scratch.task import Pair, Task
from transformer_scratch.text_pairs import TextPairs

BLUE, LIGHT_BLUE, RED, ORANGE, GREY = "#0072B2", "#9FD3F2", "#D55E00", "#E69F00", "#D9D9D9"
MOST_LABELS = 30  # at a side of an attention map
STYLE = {
    "font.size": 16,
    "axes.titlesize": 16,
    "figure.titlesize": 20,
    "figure.dpi": 80,
    "lines.linewidth": 2.5,
}


class Attention(NamedTuple):
    """One attention module on one sequence.

    weights: (H, T, S), each row sums to 1; allowed: (T, S) bool, its mask.
    """

    weights: Tensor
    allowed: Tensor


@torch.inference_mode()
def record_attention(
    model: Transformer, source: list[int], decoder_input: list[int]
) -> dict[str, Attention]:
    """Run the model once. -> the weights of each attention module, by the module's name."""
    recorded = {}

    def remembering(name: str, attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def attend_and_remember(
            query: Tensor,
            key: Tensor,
            value: Tensor,
            mask: Tensor | None = None,
            causal: bool = False,
            **options,
        ) -> Tensor:
            seen_mask = causal_mask(query.size(2), query.device) if causal else mask
            weights = attention_weights(query, key, seen_mask)[0]  # (H, T, S)
            allowed = torch.ones_like(weights[0], dtype=torch.bool)
            allowed = allowed if seen_mask is None else allowed & seen_mask.squeeze()
            recorded[name] = Attention(weights.cpu(), allowed.cpu())
            return attend(query, key, value, mask, causal, **options)

        return attend_and_remember

    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, MultiHeadAttention)
    }
    for name, module in layers.items():
        module.attend = remembering(name, module.attend)
    device = next(model.parameters()).device
    try:
        model(torch.tensor([source], device=device), torch.tensor([decoder_input], device=device))
    finally:
        for module in layers.values():
            del module.attend  # the class's own is back
    return recorded


def label_tokens(axes: Axes, columns: list[str], rows: list[str], most: int) -> None:
    """Name the token of every row and column: of every second where there are more than most."""
    columns, rows = ([legible(token, 16) for token in tokens] for tokens in (columns, rows))
    across, down = (max(1, math.ceil(len(tokens) / most)) for tokens in (columns, rows))
    fits = len(columns) <= 7 and sum(len(token) + 1 for token in columns) <= 24
    axes.set_xticks(range(0, len(columns), across), columns[::across], rotation=0 if fits else 90)
    axes.set_yticks(range(0, len(rows), down), rows[::down])
    axes.tick_params(labelsize=14)


def draw_answers(task: Digits, predictions: dict[Pair, Prediction]) -> Figure:
    """Start digit by end digit: right or wrong, trained or never seen."""
    size = task.num_categories
    groups = [
        ("right, trained", LIGHT_BLUE),
        ("right, never seen", BLUE),
        ("wrong, trained", ORANGE),
        ("wrong, never seen", RED),
    ]
    grid = torch.empty(size, size, dtype=torch.int64)  # an index into the groups for each pair
    for pair, prediction in predictions.items():
        grid[pair] = 2 * (not prediction.exact) + (not task.was_trained(pair))
    counts = grid.flatten().bincount(minlength=4).tolist()
    figure = Figure(figsize=(13, 10), layout="constrained")
    axes = figure.subplots()
    # pcolormesh draws each square with its own edge. White lines over imshow would leave a pixel of
    # a square on their other side here and there: the two are rounded to pixels separately.
    axes.pcolormesh(
        range(size),
        range(size),
        grid.numpy(),
        cmap=ListedColormap([colour for _, colour in groups]),
        vmin=0,
        vmax=3,
        edgecolors="white",
        linewidth=2 if size <= 12 else 0.7,
    )
    axes.set(xlabel="digit to stop at", ylabel="digit to start from", aspect="equal")
    ticks = range(0, size, 1 if size <= 12 else 5)
    axes.set(xticks=ticks, yticks=ticks)
    axes.invert_yaxis()
    wrong = [pair for pair, prediction in predictions.items() if not prediction.exact]
    for first, last in wrong:
        axes.text(
            last,
            first,
            "×",
            ha="center",
            va="center",
            fontsize=min(30, 320 / size),
            fontweight="bold",
        )

    handles = [
        Patch(color=colour, label=f"{name}: {count}")
        for (name, colour), count in zip(groups, counts, strict=True)
        if count
    ]
    axes.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(1.02, 1), frameon=False, title="pairs"
    )
    if wrong:
        answers = [" ".join(task.tokens(predictions[pair].tokens)) for pair in wrong[:8]]
        lines = [
            f"{a} {b} → {legible(text, 24)}" for (a, b), text in zip(wrong, answers, strict=False)
        ]
        lines += [f"… and {len(wrong) - 8} more"] if len(wrong) > 8 else []
        axes.text(
            1.05, 0.6, "\n".join(["wrong answers (×):", *lines]), transform=axes.transAxes, va="top"
        )
    parts = [f"{counts[0]} of {counts[0] + counts[2]} trained pairs"]
    if counts[1] + counts[3]:
        parts.append(f"{counts[1]} of the {counts[1] + counts[3]} it has never seen")
    figure.suptitle("Can the model count from one digit to the other?\nright: " + ", ".join(parts))
    return figure


def draw_attention(
    recorded: dict[str, Attention],
    kind: str,
    columns: list[str],
    rows: list[str],
    title: str,
) -> Figure:
    """A heat map for every layer and head of the decoder's cross_attention or self_attention."""
    layers = [
        item
        for name, item in recorded.items()
        if name.startswith("decoder") and name.endswith(kind)
    ]
    panels = [
        (f"layer {layer}, head {head}", weights.masked_fill(~item.allowed, math.nan))
        for layer, item in enumerate(layers, start=1)
        for head, weights in enumerate(item.weights, start=1)
    ]
    num_heads = len(layers[0].weights)
    across = num_heads if num_heads > 1 else min(3, len(panels))
    down = math.ceil(len(panels) / across)
    # A panel grows with its tokens, up to MOST_LABELS of them: each is to have its name.
    width = max(2.6, 0.2 * min(len(columns), MOST_LABELS) + 0.2)
    height = max(3.4, 0.25 * min(len(rows), MOST_LABELS) + 0.4)
    figure = Figure(
        figsize=(max(13, width * across + 2), max(6, height * down + 2)), layout="constrained"
    )
    grid = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True)
    for axes, (name, weights) in zip(grid.flat, panels, strict=False):
        axes.set_facecolor(GREY)  # shows where the mask leaves no weight
        image = axes.imshow(weights.numpy(), cmap="cividis", vmin=0, vmax=1, aspect="auto")
        axes.set_title(name)
        label_tokens(axes, columns, rows, MOST_LABELS)
    for axes in grid.flat[len(panels) :]:
        axes.axis("off")
    figure.colorbar(image, ax=grid, label="attention weight (a row sums to 1)", shrink=0.8)
    figure.supxlabel("token looked at")
    figure.supylabel("token about to be written")
    figure.suptitle(title)
    return figure


def plain_numbers(axes: Axes) -> None:
    """Label a logarithmic y axis 0.1, 1, 10 instead of with powers."""
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 0.7)))


def draw_curves(rows: list[dict], vocab_size: int) -> Figure:
    """Loss and exact match over the updates of a run. rows: the lines of metrics.jsonl."""

    def points(key: str) -> tuple[list, list]:
        found = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
        return [step for step, _ in found], [value for _, value in found]

    figure = Figure(figsize=(15, 7), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(
        *points("train/loss_step"),
        color="#999999",
        label="training, each update\n(as it is minimised)",
        linewidth=1.5,
    )
    left.plot(*points("train/loss_epoch"), "o-", color=ORANGE, label="training, mean of the epoch")
    left.plot(
        *points("val/loss_epoch"),
        "s-",
        color=BLUE,
        label="validation (no dropout,\nno label smoothing)",
    )
    guessing = f"guessing: ln {vocab_size} = {math.log(vocab_size):.2f}"
    left.axhline(math.log(vocab_size), color="black", linestyle=":", label=guessing)
    left.set(yscale="log", xlabel="update", ylabel="loss per token (log scale)")
    left.set_title("Loss: how far below guessing?")
    plain_numbers(left)
    left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2, frameon=False)
    right.plot(*points("val/exact_match"), "s-", color=BLUE, label="validation pairs")
    right.plot(
        *points("test/exact_match"), "*", color=RED, markersize=22, label="test pairs, best weights"
    )
    right.set(
        ylim=(-0.03, 1.03),
        xlim=left.get_xlim(),
        xlabel="update",
        ylabel="share of whole answers right",
    )
    right.set_title("Exact match: are whole answers right?")
    right.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    for axes in (left, right):
        axes.locator_params(axis="x", integer=True)
    right.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2, frameon=False)
    figure.suptitle(
        "How the run learned: the loss should fall, and the model's own answers come out right"
    )
    return figure


def draw_schedule(rows: list[dict], clip_norm: float) -> Figure:
    """The learning rate and the gradient norm of every update, as they were used."""
    steps = [row for row in rows if "lr" in row]
    figure = Figure(figsize=(13, 9), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    top.plot([row["step"] for row in steps], [row["lr"] for row in steps], color=BLUE)
    top.set(ylabel="learning rate", ylim=(0, None), title="Learning rate of each update")
    norms = [(row["step"], row["grad_norm"]) for row in steps if row["grad_norm"] is not None]
    bottom.plot(*zip(*norms, strict=True), color=ORANGE, linewidth=1.5, label="gradient norm")
    if clip_norm:
        bottom.axhline(clip_norm, color="black", linestyle=":", label=f"--clip-norm {clip_norm:g}")
    if skipped := [row["step"] for row in steps if row.get("skipped")]:
        bottom.plot(
            skipped,
            [clip_norm or 1.0] * len(skipped),
            "x",
            color=RED,
            markersize=14,
            label="skipped: overflow",
        )
    bottom.set(xlabel="update", ylabel="gradient norm (log scale)", yscale="log")
    bottom.locator_params(axis="x", integer=True)
    plain_numbers(bottom)
    bottom.set_title(
        "Gradient norm"
        + (": above the dotted line it is scaled down to it" if clip_norm else ", not clipped")
    )
    bottom.legend(loc="upper right")
    figure.suptitle("How large a step each update took")
    return figure


def draw_positions(positions: Tensor) -> Figure:
    """The encoding added to the embeddings, and how alike any two positions are.

    positions: (length, dim).
    """
    figure = Figure(figsize=(16, 7), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    image = left.imshow(
        positions.numpy(), cmap="PuOr", vmin=-1, vmax=1, aspect="auto", interpolation="nearest"
    )
    left.set(xlabel="dimension (fast waves left, slow ones right)", ylabel="position of the token")
    left.set_title("One row is added to the token at that position")
    figure.colorbar(image, ax=left, label="value added")
    unit = nn.functional.normalize(positions, dim=1)
    image = right.imshow((unit @ unit.T).numpy(), cmap="cividis")
    right.set(xlabel="position", ylabel="position", title="Cosine between two rows")
    figure.colorbar(image, ax=right, label="1 = the same direction", shrink=0.8)
    figure.suptitle(
        "Positional encoding: every position has its own pattern, and neighbours are alike"
    )
    return figure


def draw_masks(recorded: dict[str, Attention], source: list[str], written: list[str]) -> Figure:
    """Which keys each query of the first layer may attend to, where both sides are padded."""
    panels = [
        ("encoder.0.self_attention", "Encoder: padding hidden", source, source),
        ("decoder.0.self_attention", "Decoder: the future hidden", written, written),
        ("decoder.0.cross_attention", "Decoder to source: padding hidden", source, written),
    ]
    figure = Figure(figsize=(18, 7), layout="constrained")
    for axes, (name, title, columns, rows) in zip(figure.subplots(1, 3), panels, strict=True):
        axes.imshow(
            recorded[name].allowed.numpy(),
            cmap=ListedColormap([GREY, BLUE]),
            vmin=0,
            vmax=1,
            aspect="auto",
        )
        label_tokens(axes, columns, rows, most=20)
        axes.set_xticks([edge - 0.5 for edge in range(1, len(columns))], minor=True)
        axes.set_yticks([edge - 0.5 for edge in range(1, len(rows))], minor=True)
        most = max(len(columns), len(rows))
        axes.grid(which="minor", color="white", linewidth=min(0.8, 30 / most))
        axes.tick_params(which="minor", length=0)
        axes.set(title=title, xlabel="token looked at (key)", ylabel="token that looks (query)")
    handles = [Patch(color=BLUE, label="may look"), Patch(color=GREY, label="hidden by the mask")]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle("Masks: a token may look only where the square is blue")
    return figure


def draw_run(
    model: Transformer, task: Task, answers: list[Prediction], example: Pair
) -> dict[str, Callable[[], Figure]]:
    """What the model itself shows, and its attention while it answers one of the questions.

    -> by file name, the functions that draw the pictures, for save_pictures.
    """
    # It takes its colours from this file, which can therefore not import it earlier.
    from transformer_scratch import plots_text

    predictions = {answer.pair: answer for answer in answers}
    source, answer = task.encode_source(example), predictions[example].tokens
    written = [task.start_id, *answer[:-1]]
    padding = [task.pad_id] * 3
    source_tokens, drawings = task.tokens(source), {}
    if isinstance(task, Digits):
        drawings = {"answers": lambda: draw_answers(task, predictions)}
    elif isinstance(task, TextPairs):
        source_tokens = plots_text.source_tokens(task, example)
        drawings = {
            "errors_by_length": lambda: plots_text.draw_errors_by_length(task, answers),
            "confusions": lambda: plots_text.draw_confusions(task, answers),
        }

    def attention(kind: str, columns: list[str], title: str) -> Figure:
        recorded = record_attention(model, source, written)
        rows = task.tokens(answer)
        asked = f"{legible(task.source_text(example), 32)} → {legible(' '.join(rows), 40)}"
        return draw_attention(recorded, kind, columns, rows, f"{title}\n{asked}")

    def masks() -> Figure:
        recorded = record_attention(model, source + padding, written + padding)
        pads = task.tokens(padding)
        return draw_masks(recorded, source_tokens + pads, task.tokens(written) + pads)

    return drawings | {
        "attention_cross": lambda: attention(
            "cross_attention",
            source_tokens,
            "Where the decoder looks in the question while it answers",
        ),
        "attention_self": lambda: attention(
            "self_attention",
            task.tokens(written),
            "Where the decoder looks in its own answer so far",
        ),
        "positions": lambda: draw_positions(model.positions[: task.seq_len].cpu()),
        "masks": masks,
    }


def draw_training(
    folder: Path, vocab_size: int, clip_norm: float
) -> dict[str, Callable[[], Figure]]:
    """How the run in this folder learned; nothing where it has no metrics."""
    if not (folder / "metrics.jsonl").exists():
        return {}
    return {
        "curves": lambda: draw_curves(read_metrics(folder), vocab_size),
        "schedule": lambda: draw_schedule(read_metrics(folder), clip_norm),
    }


def save_pictures(
    drawings: dict[str, Callable[[], Figure]], folder: Path, style: dict[str, object] = STYLE
) -> list[Path]:
    """Draw each picture and save it as folder/name.png. -> the files.

    What goes wrong with a picture costs that picture and a warning. What a matplotlibrc or the
    notebook that calls this has set is put aside meanwhile.
    """
    settings = {name: rcParamsDefault[name] for name in rcParamsDefault if name != "backend"}
    files, failed = [], {}
    for name, draw in drawings.items():
        file = folder / f"{name}.png"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with rc_context(settings | style):
                figure = draw()
                choose_fonts(figure)
                figure.savefig(file)
            files.append(file)
        except Exception as error:
            reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
            failed.setdefault(textwrap.shorten(reason, 200), []).append(file.name)
            with suppress(OSError):
                file.unlink()  # half a picture, or one from before
    for reason, names in failed.items():
        print(f"warning: no {', '.join(names)} in {folder}: {reason}", file=sys.stderr)
    return files
