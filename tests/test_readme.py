"""What the two READMEs tell to type works, and both tell the same; their numbers are those of the program."""

import functools
import re
import shlex
import subprocess
import sys

import pytest
import tyro
from conftest import PROJECT

import evaluate
from transformer_scratch.config import Config, load_config
from transformer_scratch.data import Task, split_pairs

ENGLISH, JAPANESE = ((PROJECT / name).read_text() for name in ("README.md", "README.ja.md"))
PROGRAMS = {"python", "python3", "make", "torchrun", "docker", "cp", "wandb", "pytest", "pip"}


def commands(text: str) -> list[str]:
    """All that is to be typed: the lines of code blocks and the code in the text that start with a program's name."""
    found = []
    for block in re.findall(r"^```\w*\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL):
        found += block.splitlines()
        text = text.replace(block, "")
    found += re.findall(r"`([^`\n]+)`", text)
    typed = [line.split(" #")[0].strip() for line in found]
    return sorted({line for line in typed if " " in line and line.split(" ")[0].removeprefix(".venv/bin/") in PROGRAMS})


def test_both_readmes_have_the_same_commands():
    assert commands(ENGLISH) == commands(JAPANESE)
    assert len(commands(ENGLISH)) >= 10


def test_results_stand_in_the_results_page():
    for text in (ENGLISH, JAPANESE):
        assert not re.search(r"\b(UN)?TRAINED|\bUNSEEN", text), "a number is missing"
        measured = (PROJECT / "docs" / "results.md").read_text().replace(" %", "%")
        for percent in re.findall(r"\d+(?:\.\d+)? ?%", text):
            assert percent.replace(" ", "") in measured, f"docs/results.md does not have {percent}"


@functools.cache
def help_of(module: str) -> str:
    shown = subprocess.run([sys.executable, "-m", module, "--help"], cwd=PROJECT, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    return shown.stdout


def flags_of(words: list[str]) -> list[str]:
    """The flags behind the script's name, with a placeholder for a run's name made a plain word."""
    start = next(index for index, word in enumerate(words) if word.endswith(".py") or word == "-m")
    return words[start + (2 if words[start] == "-m" else 1) :]


@pytest.mark.parametrize("command", commands(ENGLISH))
def test_the_command_can_be_typed(command):
    words = shlex.split(command)
    if words[0] == "make":
        for target in [word for word in words[1:] if "=" not in word]:
            made = subprocess.run(["make", "-n", target], cwd=PROJECT, capture_output=True, text=True)
            assert made.returncode == 0, made.stderr
    elif "train.py" in words:
        if not {"--help", "--resume"} & set(words):
            load_config(flags_of(words))
    elif "evaluate.py" in words:
        tyro.cli(evaluate.Arguments, args=flags_of(words))
    elif "-m" in words and words[words.index("-m") + 1].split(".")[0] in ("benchmarks", "comparison", "docs"):
        module = words[words.index("-m") + 1]
        for flag in [word for word in flags_of(words) if word.startswith("--")]:
            assert flag in help_of(module), f"{module} has no {flag}"
    elif words[0] == "cp":
        assert (PROJECT / words[1]).exists()
    else:
        known = ("wandb login", "wandb sync", "wandb leet", "docker run", ".venv/bin/pip install -r requirements.txt")
        known += ("python -m venv", "python3 -m venv", "python -m pytest", "torchrun")
        assert command.startswith(known), f"nobody checks {command!r}"


PAGES = [*PROJECT.glob("*.md"), *PROJECT.glob("docs/**/*.md"), *PROJECT.glob("comparison/*.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(PROJECT)))
def test_pages_are_complete(page):
    """Links and pictures exist; no word in capitals alone on a line, which keeps the place of figures to come."""
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("http") or (page.parent / target).exists(), target
    assert not re.findall(r"^[A-Z]{4,}$", text, re.MULTILINE)


@pytest.mark.parametrize("text", [ENGLISH, JAPANESE], ids=["english", "japanese"])
def test_the_numbers_of_the_task(text):
    task = Task()
    splits = split_pairs(task, Config().holdout, Config().seed)
    assert (len(task.all_pairs()), len(splits.train), len(splits.val + splits.test)) == (100, 80, 20)
    for number in ("100", "80", "20"):
        assert re.search(rf"\b{number}\b", re.sub(r"[^\x00-\x7f]", " ", text)), number
    for question, answer in (("8 4", "8 7 6 5 4"), ("3 6", "3 4 5 6")):
        assert f"`{question} -> {answer}`" in text
        assert task.answer(tuple(map(int, question.split()))) == [int(digit) for digit in answer.split()]


def test_the_readme_fits_one_page():
    assert len(ENGLISH.splitlines()) <= 100 and max(map(len, ENGLISH.splitlines())) <= 160
