"""Pictures of a run on a file of pairs: which questions are hard, which tokens are mixed up."""

import math
from collections import Counter

import transformer_scratch.own_matplotlib  # noqa: F401 - imports matplotlib, so it comes first

# isort: split
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from transformer_scratch.evaluation import Prediction
from transformer_scratch.fonts import legible
from transformer_scratch.plots import BLUE, LIGHT_BLUE, ORANGE, RED
from transformer_scratch.task import Pair
from transformer_scratch.text_pairs import TextPairs

FEWEST, MOST_GROUPS = 10, 12  # questions in a group of lengths; groups
MOST_CONFUSIONS = 20
# What should have been written, what was written instead; None: nothing.
Confusion = tuple[str | None, str | None]


def own_token(task: TextPairs, token: str) -> str:
    """How to print a token of the file; the model is only shown that it is none it knows."""
    return token if token in task.ids else f"unknown: {token}"


def source_tokens(task: TextPairs, pair: Pair) -> list[str]:
    """start, the tokens of the question as they stand in the file, end"""
    start, *_, end = task.tokens(task.encode_source(pair))
    return [start, *(own_token(task, token) for token in task.columns[0].split(pair[0])), end]


# ------------------------------------------------------------------------------------- by length


def draw_errors_by_length(task: TextPairs, answers: list[Prediction]) -> Figure:
    """The share of whole answers that are right, by the tokens of the question."""
    kinds = {"trained": LIGHT_BLUE, "never seen in training": BLUE}
    asked: dict[str, Counter[int]] = {kind: Counter() for kind in kinds}
    right: dict[str, Counter[int]] = {kind: Counter() for kind in kinds}
    for answer in answers:
        kind = "trained" if task.was_trained(answer.pair) else "never seen in training"
        length = len(task.columns[0].split(answer.pair[0]))
        asked[kind][length] += 1
        right[kind][length] += answer.exact
    kinds = {kind: colour for kind, colour in kinds.items() if asked[kind]}
    groups = group_lengths([asked[kind] for kind in kinds])

    figure = Figure(figsize=(15, 9), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    bar_width = 0.8 / len(kinds)
    for number, (kind, colour) in enumerate(kinds.items()):
        places = [
            place + (number - (len(kinds) - 1) / 2) * bar_width for place in range(len(groups))
        ]
        all_asked = [sum(asked[kind][length] for length in group) for group in groups]
        all_right = [sum(right[kind][length] for length in group) for group in groups]
        shares = [part / max(1, whole) for part, whole in zip(all_right, all_asked, strict=True)]
        # Rounded down: 100% means that none is wrong. No question, no number.
        percents = [
            f"{100 * part // whole}%" if whole else ""
            for part, whole in zip(all_right, all_asked, strict=True)
        ]
        style = {"width": 0.94 * bar_width, "color": colour}
        top.bar_label(top.bar(places, shares, label=kind, **style), percents, fontsize=13)
        numbers = [f"{number:,}" for number in all_asked]
        bottom.bar_label(bottom.bar(places, all_asked, **style), numbers, fontsize=13)
    names = [f"{group[0]}–{group[-1]}" if len(group) > 1 else str(group[0]) for group in groups]
    bottom.set_xticks(range(len(groups)), names)
    half_a_group = max(0.5, 2 - len(groups) / 2)  # a single one is not to fill the picture
    bottom.set_xlim(-half_a_group, len(groups) - 1 + half_a_group)
    bottom.set(xlabel="tokens in the question", ylabel="questions asked")
    bottom.set_title("Of how many questions? A share of few says little")
    bottom.margins(y=0.2)
    bottom.locator_params(axis="y", integer=True, nbins=4)
    top.set(ylim=(0, 1.12), yticks=[0, 0.25, 0.5, 0.75, 1], ylabel="whole answers right")
    top.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    handles, labels = top.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    parts = [f"{right[kind].total():,} of {asked[kind].total():,} {kind}" for kind in kinds]
    figure.suptitle("Are long questions harder?\nWhole answers right: " + ", ".join(parts))
    return figure


def group_lengths(counts: list[Counter[int]]) -> list[list[int]]:
    """The lengths that occur, neighbours together where there are too few questions of them.

    counts: for each kind of question, how many there are of each length. A group has FEWEST of each
    kind or more (of a kind that is rare, a quarter), so that its share says something.
    """
    fewest = FEWEST
    while len(groups := groups_of(counts, fewest)) > MOST_GROUPS:
        fewest *= 2
    return groups


def groups_of(counts: list[Counter[int]], fewest: int) -> list[list[int]]:
    needed = [min(fewest, math.ceil(count.total() / 4)) for count in counts]
    groups: list[list[int]] = [[]]
    for length in sorted({length for count in counts for length in count}):
        groups[-1].append(length)
        sizes = [sum(count[length] for length in groups[-1]) for count in counts]
        if all(size >= least for size, least in zip(sizes, needed, strict=True)):
            groups.append([])
    *groups, rest = groups
    if not groups:
        return [rest]
    groups[-1] += rest
    return groups


# ------------------------------------------------------------------------------------ confusions


def draw_confusions(task: TextPairs, answers: list[Prediction]) -> Figure:
    """The most frequent mistakes in answers to questions that were never trained."""
    unseen = [answer for answer in answers if not task.was_trained(answer.pair)]
    asked = unseen or answers  # where nothing was held out
    kind = "never seen in training" if unseen else "of the training set"
    counts = count_confusions(task, asked)
    shown = counts.most_common(MOST_CONFUSIONS)
    figure = Figure(figsize=(14, max(6, 0.4 * len(shown) + 3)), layout="constrained")
    axes = figure.subplots()
    questions = f"{len(asked):,} {'question' if len(asked) == 1 else 'questions'}"
    mistakes = f"{counts.total():,} {'mistake' if counts.total() == 1 else 'mistakes'}"
    figure.suptitle(f"Which tokens are mixed up?\n{mistakes} in answers to {questions} {kind}")
    if not shown:
        axes.axis("off")
        axes.text(0.5, 0.5, "None: every answer is right.", ha="center", va="center", fontsize=24)
        return figure

    colours = [
        ORANGE if written is None else RED if right is None else BLUE
        for (right, written), _ in shown
    ]
    bars = axes.barh(range(len(shown)), [count for _, count in shown], color=colours)
    axes.bar_label(bars, [f"{count:,}" for _, count in shown], padding=4)
    axes.set_yticks(range(len(shown)), [in_words(confusion) for confusion, _ in shown])
    axes.set_ylim(max(len(shown), 4) - 0.4, -0.6)  # the most frequent on top
    axes.margins(x=0.1)
    axes.locator_params(axis="x", integer=True)
    axes.set_xlabel("how often")
    if len(counts) > len(shown):
        axes.set_title(f"the {len(shown)} most frequent of {len(counts):,} kinds of mistakes")
    words = {BLUE: "right token → token written instead", ORANGE: "left out", RED: "added"}
    handles = [Patch(color=colour, label=words[colour]) for colour in words if colour in colours]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    return figure


def in_words(confusion: Confusion) -> str:
    right, written = (token and legible(token, 18) for token in confusion)
    if right is None:
        return f"added: {written}"
    return f"left out: {right}" if written is None else f"{right} → {written}"


def count_confusions(task: TextPairs, answers: list[Prediction]) -> Counter[Confusion]:
    """Align each answer with the right one that is nearest to it, and count where they differ."""
    names = task.tokens(list(range(task.vocab_size)))
    counts: Counter[Confusion] = Counter()
    for answer in answers:
        if answer.exact:
            continue
        nearest = answer.targets.index(answer.nearest)
        right_tokens = task.columns[1].split(task.target_texts(answer.pair)[nearest])
        written = [token for token in answer.tokens if token != task.end_id]
        for i, j in align(answer.nearest[:-1], written):
            if i is None:
                counts[None, names[written[j]]] += 1
            elif j is None:
                counts[own_token(task, right_tokens[i]), None] += 1
            elif answer.nearest[i] != written[j]:
                counts[own_token(task, right_tokens[i]), names[written[j]]] += 1
    return counts


def align(right: list[int], written: list[int]) -> list[tuple[int | None, int | None]]:
    """The positions in both that belong together, so that the fewest edits are needed.

    None: the other one has no such token.
    """
    # rows[i][j]: the edits between the first i tokens of right and the first j of written.
    rows = [list(range(len(written) + 1))]
    for i, token in enumerate(right, start=1):
        row, above = [i], rows[-1]
        for j, other in enumerate(written, start=1):
            row.append(min(above[j - 1] + (token != other), above[j] + 1, row[-1] + 1))
        rows.append(row)
    # And back, from the last tokens to the first, along the cells that these minima came from.
    i, j, pairs = len(right), len(written), []
    while i or j:
        if i and j and rows[i][j] == rows[i - 1][j - 1] + (right[i - 1] != written[j - 1]):
            i, j = i - 1, j - 1
            pairs.append((i, j))
        elif i and rows[i][j] == rows[i - 1][j] + 1:
            i -= 1
            pairs.append((i, None))
        else:
            j -= 1
            pairs.append((None, j))
    return pairs[::-1]
