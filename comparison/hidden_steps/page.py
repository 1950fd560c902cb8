"""One HTML file with both programs side by side, each hidden step linked. It needs no network."""

import json
from pathlib import Path

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

from comparison.hidden_steps.table import HIDDEN, PROJECT, line_of
from comparison.parity import Parity

TEMPLATE = Path(__file__).with_name("page.html.j2")


def write_page(folder: Path, parity: Parity, rows: list[tuple[str, str, str]]) -> Path:
    """Write folder/page.html. rows: the table of the comparison. -> the file."""
    ours = (PROJECT / "train.py").read_text(encoding="utf-8")
    theirs = (PROJECT / "comparison/train_lightning.py").read_text(encoding="utf-8")
    # What comes before is imports.
    ours_from = line_number(ours, "def token_loss")
    theirs_from = line_number(theirs, "class LitTransformer")
    steps = {
        hidden.tag: {
            "lightning": hidden.lightning.replace("`", ""),
            "where": " in ".join(reversed(hidden.where.split(":"))),
            "without": hidden.without.replace("`", ""),
        }
        for hidden in HIDDEN
    }
    environment = Environment(loader=FileSystemLoader(TEMPLATE.parent), autoescape=True)
    html = environment.get_template(TEMPLATE.name).render(
        verdict=parity.verdict(),
        steps=HIDDEN,
        steps_json=Markup(json.dumps(steps).replace("<", "\\u003c")),
        sides=[
            {
                "id": "ours",
                "name": "train.py",
                "note": "the whole loop",
                "lines": code_lines(ours, our_tags(ours), ours_from),
            },
            {
                "id": "theirs",
                "name": "train_lightning.py",
                "note": "the loop is inside trainer.fit",
                "lines": code_lines(theirs, twin_tags(theirs), theirs_from),
            },
        ],
        curves=curves(parity),
        rows=rows,
        colours=Markup(colours()),
    )
    file = folder / "page.html"
    file.write_text(html, encoding="utf-8")
    return file


def line_number(source: str, text: str) -> int:
    return source[: source.index(text)].count("\n") + 1


def our_tags(source: str) -> dict[int, list[str]]:
    return {line_of(source, hidden.tag): [hidden.tag] for hidden in HIDDEN}


def twin_tags(source: str) -> dict[int, list[str]]:
    """The steps that each line of the twin asks for. Raises ValueError where a step has no line."""
    tags: dict[int, list[str]] = {}
    for hidden in HIDDEN:
        lines = enumerate(source.splitlines(), start=1)
        found = [number for number, line in lines if hidden.twin in line]
        if not found:
            raise ValueError(f"train_lightning.py has no line with {hidden.twin!r}")
        for number in found:
            tags.setdefault(number, []).append(hidden.tag)
    return tags


def code_lines(text: str, tags_of_line: dict[int, list[str]], first: int) -> list[dict]:
    """Each line from the first on, highlighted, with the tags that light it up."""
    html = highlight(text, PythonLexer(stripnl=False), HtmlFormatter(nowrap=True)).splitlines()
    lines = [
        {"number": number, "html": Markup(line), "tags": tags_of_line.get(number, [])}
        for number, line in enumerate(html, start=1)
    ]
    return lines[first - 1 :]


def colours() -> str:
    """Of the code, in daylight and in the dark."""
    light, dark = (
        "\n".join(HtmlFormatter(style=style).get_token_style_defs("pre"))
        for style in ("default", "github-dark")
    )
    return f"{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}"


def curves(parity: Parity) -> dict:
    """The points of both loss curves and of their difference, in a drawing 1000 wide."""
    largest = max(max(pair) for pair in parity.losses)
    gap = parity.max_loss_difference or 1.0
    distance = 950 / max(1, len(parity.losses) - 1)

    def points(values: list[float]) -> str:
        return " ".join(f"{50 + i * distance:.1f},{y:.1f}" for i, y in enumerate(values))

    return {
        "largest": f"{largest:.2f}",
        "updates": len(parity.losses),
        "gap": parity.max_loss_difference,
        "ours": points([300 - 295 * ours / largest for ours, _ in parity.losses]),
        "theirs": points([300 - 295 * theirs / largest for _, theirs in parity.losses]),
        "difference": points([380 - 30 * (ours - theirs) / gap for ours, theirs in parity.losses]),
    }
