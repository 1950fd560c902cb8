"""docs/changing.md: each change is made as the page says, works, and stops the tests it names.

A part of the page is done from top to bottom, in a copy of the project: a diff is applied, a
command is run, and what the page shows under it must have come, with numbers as near as another
processor's rounding leaves them. `python -m pytest` takes minutes: here it runs the files that the
page names, and some others.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from conftest import PROJECT

PAGE = (PROJECT / "docs" / "changing.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(diff|bash|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FAILED = re.compile(r"^FAILED (\S+?::\S+) - (.+)$", re.MULTILINE)
NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e-?\d+)?")
WHOLE_SUITE = "python -m pytest\n"
# Quick ones, each about something else.
OTHERS = (
    "tests/test_attention.py",
    "tests/test_blocks.py",
    "tests/test_golden.py::test_the_losses_are_the_golden_ones",
    "tests/test_task.py",
)


def parts() -> dict[str, str]:
    """By heading, what is done in one copy of the project."""
    found = re.split(r"^###? (.+)\n", PAGE, flags=re.MULTILINE)
    return dict(zip(found[1::2], found[2::2], strict=True))


def parameters() -> list:
    """What compares needs Lightning."""
    return [
        pytest.param(
            text,
            id=heading,
            marks=[pytest.mark.comparison] if "comparison.compare" in text else [],
        )
        for heading, text in parts().items()
    ]


def run(command: list[str], folder: Path, **options: object) -> subprocess.CompletedProcess[str]:
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run(
        command,
        cwd=folder,
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, "PATH": programs},
        **options,
    )


def failures(folder: Path, named: set[str]) -> dict[str, str]:
    """Which of the named tests and of OTHERS fail. -> by name, the message."""
    report = folder / "report.xml"
    chosen = sorted({*OTHERS, *(name for name in named if not name.startswith(OTHERS))})
    command = ["python", "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={report}"]
    run([*command, *chosen], folder)
    return {
        f"{case.get('classname').replace('.', '/')}.py::{case.get('name')}": problem.get("message")
        for case in ElementTree.parse(report).iter("testcase")
        for problem in case
        if problem.tag in ("failure", "error")
    }


def alike(shown: str, printed: str) -> bool:
    """Whether two lines have the same words, and numbers within two percent."""
    words, numbers = words_and_numbers(shown)
    printed_words, printed_numbers = words_and_numbers(printed)
    return words == printed_words and numbers == pytest.approx(printed_numbers, rel=0.02)


def words_and_numbers(line: str) -> tuple[str, list[float]]:
    """The line with # for every number, and the numbers."""
    numbers = [float(number) for number in NUMBER.findall(line)]
    return NUMBER.sub("#", " ".join(line.split())), numbers


@pytest.mark.slow
@pytest.mark.parametrize("part", parameters())
def test_a_change_works_and_only_the_tests_that_the_page_names_speak(part, tmp_path):
    folder = tmp_path / "copy"
    not_ours = shutil.ignore_patterns(".*", "runs", "wandb", "build", "__pycache__")
    shutil.copytree(PROJECT, folder, ignore=not_ours)
    found: dict[str, str] | None = None
    printed: list[str] = []
    for language, content in BLOCK.findall(part):
        if language == "diff":
            applied = run(["git", "apply", "-"], folder, input=content)
            assert applied.returncode == 0, applied.stderr
        elif content == WHOLE_SUITE:
            found = failures(folder, {name for name, _ in FAILED.findall(part)})
        elif language == "bash":
            found, finished = None, run(["bash", "-c", content], folder)
            differs = "comparison.compare" in content and "weights equal = False" in finished.stdout
            assert finished.returncode == differs, finished.stderr
            printed = finished.stdout.splitlines()
        elif found is None:
            for shown in content.splitlines():
                assert any(alike(shown, line) for line in printed), shown
        else:
            expected = dict(FAILED.findall(content))
            assert found.keys() == expected.keys(), found
            for name, message in expected.items():
                assert message in " ".join(found[name].split())


def test_every_part_has_lines_and_a_command_and_says_which_tests_speak():
    assert [heading[:2] for heading in parts() if heading[0].isdecimal()] == [
        f"{number}." for number in range(1, 6)
    ]
    for heading, text in parts().items():
        blocks = BLOCK.findall(text)
        assert {language for language, _ in blocks} == {"diff", "bash", "text"}, heading
        assert ("bash", WHOLE_SUITE) in blocks, heading
