"""One HTML file with both programs side by side, what Lightning hides linked to our lines. It needs no network."""

import json
from pathlib import Path

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

from comparison.hidden import HIDDEN, PROJECT, line_of
from comparison.parity import Parity

TEMPLATE = Path(__file__).with_name("page.html.j2")


def code_lines(text: str, tags_of_line: dict[int, list[str]], first: int = 1) -> list[dict]:
    """Each line from the first on, highlighted, with the tags that light it up."""
    html = highlight(text, PythonLexer(stripnl=False), HtmlFormatter(nowrap=True)).splitlines()
    return [
        {"number": number, "html": Markup(line), "tags": tags_of_line.get(number, [])}
        for number, line in enumerate(html, start=1)
        if number >= first
    ]


def our_tags(source: str) -> dict[int, list[str]]:
    return {line_of(source, hidden.tag)[0]: [hidden.tag] for hidden in HIDDEN}


def twin_tags(source: str) -> dict[int, list[str]]:
    """Which steps each line of the twin stands for. Raises ValueError where the twin lacks what hidden.py names."""
    tags: dict[int, list[str]] = {}
    lines = source.splitlines()
    for hidden in HIDDEN:
        found = [number for number, line in enumerate(lines, start=1) if hidden.twin in line]
        if not found:
            raise ValueError(f"train_lightning.py has no line with {hidden.twin!r}")
        for number in found:
            tags.setdefault(number, []).append(hidden.tag)
    return tags


def curves(parity: Parity) -> Markup:
    """The two loss curves and their difference as a drawing."""
    width, height, below, left = 1000, 300, 60, 50
    largest = max(max(pair) for pair in parity.losses)
    step = (width - left) / max(1, len(parity.losses) - 1)

    def path(values: list[float], top: float, size: float, scale: float) -> str:
        points = (f"{left + index * step:.1f},{top + size - value / scale * size:.1f}"
                  for index, value in enumerate(values))  # fmt: skip
        return " ".join(points)

    ours, theirs = (list(values) for values in zip(*parity.losses, strict=True))
    gaps = [a - b for a, b in parity.losses]
    gap_scale = max(map(abs, gaps)) or 1.0
    middle = height + 50 + below / 2
    return Markup(
        f'<svg viewBox="0 0 {width} {height + below + 75}" role="img" '
        f'aria-label="training loss of both programs, largest difference {parity.max_loss_difference}">'
        f'<line x1="{left}" y1="{height}" x2="{width}" y2="{height}"/>'
        f'<line x1="{left}" y1="{middle}" x2="{width}" y2="{middle}"/>'
        f'<text x="0" y="14">{largest:.2f}</text><text x="0" y="{height}">0</text>'
        f'<text x="{left}" y="{height + 18}">update 1 to {len(ours)}; wide: Lightning, thin: train.py</text>'
        f'<text x="{left}" y="{height + 45}">difference, at most {parity.max_loss_difference}</text>'
        f'<polyline class="theirs" fill="none" stroke-width="7" opacity=".45" '
        f'points="{path(theirs, 5, height - 5, largest)}"/>'
        f'<polyline class="ours" fill="none" stroke-width="1.6" points="{path(ours, 5, height - 5, largest)}"/>'
        f'<polyline class="ours" fill="none" stroke-width="1.6" '
        f'points="{path(gaps, middle - below / 2, below / 2, gap_scale)}"/></svg>'
    )


def write_page(folder: Path, parity: Parity, rows: list[tuple[str, str, str]]) -> Path:
    """Write folder/page.html. rows: the table of the comparison. -> the file."""
    ours = (PROJECT / "train.py").read_text()
    theirs = (PROJECT / "comparison/train_lightning.py").read_text()
    start_ours = ours[: ours.index("def main(")].count("\n") + 1
    start_theirs = theirs[: theirs.index("class LitTransformer")].count("\n") + 1
    steps = {
        hidden.tag: {
            "lightning": hidden.lightning,
            "where": " in ".join(reversed(hidden.where.split(":"))),
            "without": hidden.without.replace("`", ""),
        }
        for hidden in HIDDEN
    }
    light, dark = HtmlFormatter(style="default"), HtmlFormatter(style="github-dark")
    colours = "\n".join(light.get_token_style_defs("pre"))
    colours += (
        "\n@media (prefers-color-scheme: dark) {\n"
        + "\n".join(dark.get_token_style_defs("pre"))
        + "\n}"
    )
    environment = Environment(loader=FileSystemLoader(TEMPLATE.parent), autoescape=True)
    html = environment.get_template(TEMPLATE.name).render(
        verdict=parity.last_line(),
        steps=HIDDEN,
        steps_json=Markup(json.dumps(steps).replace("<", "\\u003c")),
        sides=[
            {"id": "ours", "name": "train.py", "note": "the whole loop",
             "lines": code_lines(ours, our_tags(ours), start_ours)},
            {"id": "theirs", "name": "train_lightning.py", "note": "the loop is inside trainer.fit",
             "lines": code_lines(theirs, twin_tags(theirs), start_theirs)},
        ],
        curves=curves(parity),
        rows=rows,
        colours=Markup(colours),
    )  # fmt: skip
    file = folder / "page.html"
    file.write_text(html)
    return file
