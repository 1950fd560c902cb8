"""One HTML file with both programs side by side, each hidden step linked. It needs no network."""

import json
import math
import re
from pathlib import Path

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup, escape
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
            "lightning": with_code(hidden.lightning),
            "where": with_code(breakable("`{1}` in `{0}`".format(*hidden.where.split(":")))),
            "without": with_code(hidden.without),
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
        rows=[tuple(map(breakable, row)) for row in rows],
        colours=Markup(colours()),
    )
    file = folder / "page.html"
    file.write_text(html, encoding="utf-8")
    return file


def with_code(text: str) -> Markup:
    """What stands between backticks becomes <code>; all else is escaped, unless it is Markup."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def breakable(text: str) -> Markup:
    """Escaped, and with places where a narrow column may break it: after each _ and /."""
    return Markup(re.sub(r"([_/])", r"\1<wbr>", str(escape(text))))


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
        {"number": number, "html": with_code(Markup(line)), "tags": tags_of_line.get(number, [])}
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
    """The points of both loss curves and of their difference, in drawings 1000 wide and high."""
    # An update that one of them lacks, or whose loss is NaN, cannot be drawn.
    drawn = {
        step: (ours, theirs)
        for step, (ours, theirs) in enumerate(parity.losses)
        if math.isfinite(ours) and math.isfinite(theirs)
    }
    largest = max((max(pair) for pair in drawn.values()), default=1.0)
    differences = [ours - theirs for ours, theirs in drawn.values()]
    gap = max(map(abs, differences), default=0.0)
    # Differences that are all 0 have no scale. They are shown against the smallest one that two
    # losses as large as the largest can have in float32, with its 24 binary digits.
    scale = gap or 2.0 ** (math.frexp(largest)[1] - 24)

    def points(values: list[float]) -> str:
        distance = 1000 / max(1, len(parity.losses) - 1)
        places = zip(drawn, values, strict=True)
        return " ".join(f"{step * distance:.1f},{y:.1f}" for step, y in places)

    return {
        "updates": len(parity.losses),
        "not_drawn": len(parity.losses) - len(drawn),
        "largest": f"{largest:.2f}",
        "gap": gap,
        "scale": f"{scale:.2g}",
        "ours": points([1000 - 1000 * ours / largest for ours, _ in drawn.values()]),
        "theirs": points([1000 - 1000 * theirs / largest for _, theirs in drawn.values()]),
        "difference": points([500 - 500 * difference / scale for difference in differences]),
    }
