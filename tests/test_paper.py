"""docs/paper.md: what it quotes stands in the code, and its numbers are the program's."""

import dataclasses
import inspect
import re
import shlex

import pytest
import torch
import tyro
from conftest import PROJECT

import evaluate
from transformer_scratch.config import Config, load_config
from transformer_scratch.model import Transformer
from transformer_scratch.optimizer import lr_factor

PAGE = PROJECT / "docs" / "paper.md"
TEXT = PAGE.read_text(encoding="utf-8")
QUOTATION = re.compile(r"^\[[^]\n]+\]\(([^)\n]+)\):\n```python\n(.*?)^```$", re.M | re.S)
BASE_MODEL = ["--dim", "512", "--num-heads", "8"]


def lines_not_found(text: str) -> list[str]:
    """Quoted lines that their file no longer has, or has in another order.

    A quotation is a link to the file, a colon, and a block of Python; every line of it is a whole
    line of the file, its indentation aside.
    """
    missing = []
    for file, block in QUOTATION.findall(text):
        code = (PAGE.parent / file).read_text(encoding="utf-8").splitlines()
        rest = iter([line.strip() for line in code])
        missing += [f"{file}: {line}" for line in block.splitlines() if line not in rest]
    return missing


@pytest.fixture
def parameters(monkeypatch):
    """Count the parameters of the model that these flags describe."""
    # Not drawn, the weights take neither time nor memory. On the meta device they would not,
    # either, but its first use imports PyTorch's compiler, which takes seconds.
    for name in ("normal_", "uniform_", "kaiming_uniform_"):
        monkeypatch.setattr(torch.nn.init, name, lambda weight, *_, **__: weight)

    def count(arguments: list[str]) -> int:
        config, task, *_ = load_config(arguments)
        model = Transformer.from_config(config, task)
        return sum(weight.numel() for weight in model.parameters())

    return count


def rows() -> dict[str, tuple[str, str]]:
    """The table of numbers. -> by flag, the paper's value and the default here."""
    found = re.findall(r"^\| .+ \| (.+) \| (.+) \| `(.+)` \|$", TEXT, re.MULTILINE)
    return {flag: (paper, ours) for paper, ours, flag in found if flag.count("--") == 1}


def value_of(flag: str, config: Config, arguments: evaluate.Arguments) -> str:
    program, name = flag.split("--")
    value = getattr(arguments if program else config, name.replace("-", "_"))
    return value if isinstance(value, str) else f"{value:,g}"


def test_every_quoted_line_stands_in_its_file():
    assert len(QUOTATION.findall(TEXT)) == TEXT.count("```python") > 20
    assert lines_not_found(TEXT) == [], (
        "docs/paper.md quotes these lines as what the paper says; they are no longer in the code"
    )


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("betas=(0.9, 0.98)", "betas=(0.9, 0.999)"),
        ("return update / warmup", "return update"),  # the beginning of a line is no line
        ("self.query = nn.Linear", "self.value = nn.Linear"),  # it stands elsewhere
    ],
)
def test_a_wrong_line_is_found(right, wrong):
    assert TEXT.count(right) == 1
    assert len(lines_not_found(TEXT.replace(right, wrong))) >= 1


def test_links_lead_to_files():
    links = [link for link in re.findall(r"\]\((.+?)\)", TEXT) if not link.startswith("http")]
    assert links
    assert [link for link in links if not (PAGE.parent / link).is_file()] == []


def test_the_defaults_are_the_programs():
    config, *_ = load_config([])
    stated = {flag: ours for flag, (_, ours) in rows().items()}
    assert len(stated) == 15
    assert stated == {flag: value_of(flag, config, evaluate.Arguments()) for flag in stated}


def test_the_commands_give_the_papers_numbers():
    train, asked = re.search(r"^```\n(.*?)^```$", TEXT, re.M | re.S)[1].splitlines()
    config, *_ = load_config(shlex.split(train)[2:])
    arguments = tyro.cli(evaluate.Arguments, args=shlex.split(asked)[2:])
    for flag, (paper, _) in rows().items():
        if not paper.startswith(("about", "the last")):  # what no flag gives
            expected = "0" if paper == "not mentioned" else paper
            assert value_of(flag, config, arguments) == expected, flag


def test_the_numbers_that_follow_from_the_defaults():
    config, task, *_ = load_config([])
    updates = config.max_epochs * task.num_samples // config.batch_size
    assert f"| 64 | {config.dim // config.num_heads} | |" in TEXT
    assert f"| 100,000 | {updates} | ({config.max_epochs} epochs) |" in TEXT
    assert f"| about 37,000 | {task.vocab_size} | |" in TEXT
    assert f"| input + 50 | {task.max_target_len} | (`--seq-len` less one) |" in TEXT
    assert f"moving average over about 1 / (1 − decay) = {1 / (1 - config.average):.0f}" in TEXT
    train = task.datasets()[0]
    source, target = (
        config.batch_size * lengths.double().mean().item()
        for lengths in (train.source_lengths, train.target_lengths)
    )
    stated = f"{source:.0f} source tokens and about {round(target, -1):.0f} target tokens"
    assert stated in " ".join(TEXT.split()), f"docs/paper.md has other numbers than {stated}"


def test_parameters(parameters):
    stated = [
        f"| parameters | 65 million | {parameters([]):,} | |",
        f"`--dim 512 --num-heads 8` has {(base := parameters(BASE_MODEL)):,} parameters",
    ]
    assert [line for line in stated if line not in TEXT] == [], "docs/paper.md has other numbers"
    more_tokens = 37_000 - load_config(BASE_MODEL)[1].vocab_size
    assert f"{base + more_tokens * 512:,}" in TEXT


def test_learning_rates():
    assert f"{(512 * 4_000) ** -0.5:.3g}" == rows()["--lr"][0]
    assert f"{load_config([])[0].lr:g} at width 32" in TEXT
    assert f"{load_config(BASE_MODEL)[0].lr:.3g} at 512" in TEXT
    for step in (1, 100, 4_000, 5_000, 100_000):  # equation (3)
        by_paper = 512**-0.5 * min(step**-0.5, step * 4_000**-1.5)
        ours = (512 * 4_000) ** -0.5 * lr_factor(step - 1, 4_000, "inverse-sqrt")
        assert ours == pytest.approx(by_paper)


def test_the_epsilon_is_pytorchs():
    # The page quotes the arguments that AdamW gets: no epsilon is among them.
    epsilon = inspect.signature(torch.optim.AdamW).parameters["eps"].default
    assert f"PyTorch's {epsilon:g}" in TEXT


def test_flags_exist():
    known = {
        field.name.replace("_", "-")
        for settings in (Config, evaluate.Arguments)
        for field in dataclasses.fields(settings)
    }
    named = {flag.removeprefix("no-") for flag in re.findall(r"--([a-z][a-z-]*)", TEXT)}
    assert named and named <= known
