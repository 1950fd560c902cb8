"""The commands in both READMEs work, their examples are right, and what they point to exists."""

import re
import runpy
import shlex
import subprocess
import sys

import pytest
import tyro
from conftest import PROJECT

import evaluate
from transformer_scratch.config import Config, check, parse
from transformer_scratch.digits import Digits
from transformer_scratch.processes import ALONE

READMES = ["README.md", "README.ja.md"]
PROGRAMS = {"python", "python3", "make", "torchrun", "docker", "cp", "wandb", "pytest", "pip"}
PROJECT_MODULES = ("benchmarks", "comparison", "docs", "examples", "exercises", "tests")


def read(name: str) -> str:
    return (PROJECT / name).read_text(encoding="utf-8")


def commands(text: str) -> list[str]:
    """All that is to be typed: lines of code blocks, and code in the text, of a program."""
    found = []
    for block in re.findall(r"^```\w*\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL):
        found += block.splitlines()
        text = text.replace(block, "")
    found += re.findall(r"`([^`\n]+)`", text)
    typed = [line.split(" #")[0].strip() for line in found]
    return sorted({line for line in typed if " " in line and program_of(line) in PROGRAMS})


def program_of(command: str) -> str:
    return command.split()[0].removeprefix(".venv/bin/")


COMMANDS = commands(read("README.md"))


def test_commands_are_found():
    text = (
        "Type `make x` or:\n```\npython a.py  # it runs\nls\n```\nand `b.py`, `.venv/bin/pip c`.\n"
    )
    assert commands(text) == [".venv/bin/pip c", "make x", "python a.py"]


def test_both_readmes_have_the_same_commands():
    assert commands(read("README.md")) == commands(read("README.ja.md"))


def test_the_first_block_trains_and_tests():
    first = re.search(r"^```\w*\n(.*?)^```$", read("README.md"), re.MULTILINE | re.DOTALL)[1]
    assert {"make train", "make test"} <= set(commands(f"```\n{first}```\n"))


@pytest.fixture
def help_of(monkeypatch, capsys):
    def read_help(module: str) -> str:
        monkeypatch.setattr(sys, "argv", [module, "--help"])
        with pytest.raises(SystemExit) as end:
            runpy.run_module(module, run_name="__main__")
        assert end.value.code == 0
        return capsys.readouterr().out

    return read_help


@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_can_be_typed(command, help_of):
    program, words = program_of(command), shlex.split(command)[1:]
    if program == "make":
        targets = [word for word in words if "=" not in word]
        made = subprocess.run(
            ["make", "-n", *targets], cwd=PROJECT, capture_output=True, encoding="utf-8"
        )
        assert made.returncode == 0, made.stderr
    elif "train.py" in words:
        flags = words[words.index("train.py") + 1 :]
        if not {"--help", "--resume"} & set(flags):
            check(parse(flags, Config()), ALONE, flags)
    elif "evaluate.py" in words:
        tyro.cli(evaluate.Arguments, args=words[words.index("evaluate.py") + 1 :])
    elif words[0].endswith(".py") or program == "cp":
        assert (PROJECT / words[0]).exists()
    elif words[0] == "-m" and words[1].startswith(PROJECT_MODULES):
        for flag in [word for word in words[2:] if word.startswith("--")]:
            assert flag in help_of(words[1]), f"{words[1]} has no {flag}"
    elif "-r" in words:
        assert (PROJECT / words[words.index("-r") + 1]).exists()
    else:
        called = " ".join([program, *words[:2]])
        known = "(python3? -m (venv|pip|pytest)|wandb (login|sync|leet)|docker (run|build)|pytest)"
        assert re.match(known, called), f"this test does not know how to check {command!r}"


def test_percentages_stand_in_the_results_page():
    measured = read("docs/results.md").replace(" %", "%")
    for name in READMES:
        for percent in re.findall(r"\d+(?:\.\d+)? ?%", read(name)):
            assert percent.replace(" ", "") in measured, f"{name}: {percent}"


@pytest.mark.parametrize("name", READMES)
def test_examples_are_right(name):
    examples = re.findall(r"`(\d+) (\d+) -> ([\d ]+)`", read(name))
    assert examples
    for first, last, answer in examples:
        right = " ".join(map(str, Digits().answer((int(first), int(last)))))
        assert answer.strip() == right, f"{name} says {first} {last} -> {answer}: not the task's"


@pytest.mark.parametrize("name", READMES)
def test_files_that_are_named_exist(name):
    ours = [file for file in PROJECT.rglob("*.py") if not file.is_relative_to(sys.prefix)]
    names = {file.name for file in ours}
    assert set(re.findall(r"\b\w+\.py\b", read(name))) <= names


PAGES = [*PROJECT.glob("*.md"), *PROJECT.glob("docs/**/*.md"), *PROJECT.glob("comparison/*.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(PROJECT)))
def test_pages_are_complete(page):
    """Links and pictures exist; no line is a word in capitals, which keeps the place of a text."""
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("http") or (page.parent / target).exists(), target
    assert not re.findall(r"^[A-Z]{4,}$", text, re.MULTILINE)
