"""Every command of every page, typed as it stands there, by a reader with one copy of the project.

What a page marks as bash runs to its end, and prints what the page shows as text. Any other command
gets Ctrl-C some seconds after it has begun to speak, unless it has ended by then.
"""

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import TextIO

import pytest
from conftest import PROJECT

LESSONS = sorted((PROJECT / "docs" / "lessons").glob("[1-9]-*.md"))
INDEX = PROJECT / "docs" / "lessons" / "README.md"
PAGES = [
    *LESSONS,
    PROJECT / "README.md",  # test_readme.py: the Japanese one has the same commands
    PROJECT / "comparison" / "README.md",
    PROJECT / "exercises" / "README.md",
    # Those of changing.md need the lines that it adds: test_changing.py types them.
    *sorted({*(PROJECT / "docs").glob("*.md")} - {PROJECT / "docs" / "changing.md"}),
]
PROGRAMS = "python|python3|make|torchrun|wandb|docker|pip|grep|diff|cp|source|git"
TYPED = re.compile(rf"(\w+=\S+ )*(\.venv/bin/)?({PROGRAMS}) ")  # with variables before it
# The words of a command, and why it is not typed here.
LEFT_OUT = {
    "docker": "needs Docker",
    "make docker-": "needs Docker",
    "cp .env.example": "is for Docker",
    "wandb": "needs an account, or a terminal of its own",
    "source": "the tests are in an environment already",
    "python3 -m venv": "the tests are in an environment already",
    ".venv/bin/python -m pip": "the tests are in an environment already",
    ".venv/bin/python -m pytest": "runs these tests",
    "make test": "runs these tests",
    "git": "the copy has no history",
    "torchrun --nnodes": "needs two machines: see tests/reliability/test_torchrun.py",
    "torchrun --max-restarts": "is a part of a command",
    "python3 train.py --accelerator gpu": "needs a GPU: tests/gpu",
    "python -m benchmarks.gpu": "needs a GPU: tests/gpu",
}
# Files that the reader of a page has brought.
LINES = "ab\tp q\ncd\tr s\nef\tp s\n" * 50
FILES = {
    "words.txt": "transformer\nattention\n",
    "jpn_train.tsv": LINES,
    "jpn_dev.tsv": LINES,
    "jpn_test.tsv": LINES,
}
TINY = "--dim 16 --num-layers 1 --batch-size 32 --num-datas 320 --max-epochs 3 --wandb disabled"
SECONDS_TO_SPEAK, SECONDS_THEN, SECONDS_TO_STOP, SECONDS_TO_THE_END = 60, 5, 180, 300
# Programs of others, which take Ctrl-C in their own way: they have their time.
OF_OTHERS = ("pip", "python -m pip", "python -m pytest")


def blocks(page: Path, language: str) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[tuple[str, bool]]:
    """What a page tells its reader to type, in order, and whether it is marked as bash."""
    found = []
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$|`([^`]+)`", text, re.MULTILINE | re.DOTALL):
        language, block, inline = match.groups()
        if language in ("text", "python", "diff"):
            continue
        lines = block.splitlines() if block else [" ".join(inline.split())]
        typed = [re.split(r"\s+#", line)[0].strip() for line in lines]
        found += [(line, language == "bash") for line in typed if TYPED.match(line)]
    return found


def test_commands_are_found_in_order():
    text = (
        "`grep -n x a.py` and `b.py`:\n```bash\npython b.py   # it runs\nls\n```\n"
        "```text\npython no\n```\n```\nmake c\n```\nthen `python\nd.py`, `A=1 .venv/bin/pip e`\n"
    )
    assert commands(text) == [
        ("grep -n x a.py", False), ("python b.py", True), ("make c", False), ("python d.py", False),
        ("A=1 .venv/bin/pip e", False),
    ]  # fmt: skip


def test_every_exception_is_needed():
    typed = {command for page in PAGES for command, _ in commands(page.read_text(encoding="utf-8"))}
    for words in LEFT_OUT:
        assert any(command.startswith(words) for command in typed), words


def test_the_index_of_the_lessons_has_their_commands():
    typed = {
        command for page in LESSONS for command, _ in commands(page.read_text(encoding="utf-8"))
    }
    assert {command for command, _ in commands(INDEX.read_text(encoding="utf-8"))} <= typed


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A copy as its reader has it, with one finished run."""
    left_behind = (".git", ".venv", "runs", "build", "data", "wandb", "__pycache__", ".*_cache")
    copy = tmp_path_factory.mktemp("reader") / "project"
    shutil.copytree(PROJECT, copy, ignore=shutil.ignore_patterns(*left_behind))
    os.symlink(sys.prefix, copy / ".venv")
    command = [sys.executable, "train.py", *TINY.split()]
    subprocess.run(command, cwd=copy, check=True, capture_output=True)
    for name, text in FILES.items():
        (copy / name).write_text(text, encoding="utf-8")
    return copy


@pytest.fixture(scope="module")
def typed() -> set[str]:
    """What the reader has typed so far: programs that leave nothing behind need no second time."""
    return set()


def with_run(command: str, project: Path) -> str:
    """The command with the newest run that has the file it asks for in place of runs/<name>."""
    asked = re.search(r"runs/<name>(/\S+)?", command)
    if asked is None:
        return command
    file = (asked[1] or "/last.pt").lstrip("/")
    runs = sorted(
        project.glob(f"runs/*/{file}"), key=lambda path: (path.parent / "last.pt").stat().st_mtime
    )
    assert runs, f"{command}: no run has {file}"
    return command.replace("<name>", str(runs[-1].relative_to(project / "runs").parts[0]))


def type_in(command: str, project: Path, to_the_end: bool) -> str:
    """Run the command in a shell, and press Ctrl-C when its time is over. -> what it printed."""
    # A student's shell: the threads of other tests are held to one, and make hands on its own ARGS.
    ours = {"OMP_NUM_THREADS", "ARGS", "MAKEFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "MFLAGS"}
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    environment["PATH"] = os.path.dirname(sys.executable) + os.pathsep + environment["PATH"]
    environment |= {"PYTHON": sys.executable, "MAKEFLAGS": "--silent"}
    question = subprocess.PIPE if "--source -" in command else subprocess.DEVNULL
    with tempfile.TemporaryFile("w+", encoding="utf-8") as printed:
        process = subprocess.Popen(
            ["bash", "-c", with_run(command, project)],
            cwd=project,
            env=environment,
            stdin=question,
            stdout=printed,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        if process.stdin:
            process.stdin.write(b"transformer\n")
            process.stdin.close()
        try:
            to_the_end = to_the_end or command.startswith(OF_OTHERS)
            interrupted = not ends_in_time(process, printed, to_the_end)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        printed.seek(0)
        output = printed.read()
    if not interrupted:
        # Exercises have gaps as they are handed out.
        expected = 1 if "pytest exercises/" in command else 0
        assert process.returncode == expected, f"{command}\n{output[-3000:]}"
        assert "Traceback" not in output, f"{command}\n{output[-3000:]}"
    elif command.startswith("make"):  # it ends by the signal itself
        assert process.returncode in (2, -signal.SIGINT), f"{command}\n{output[-3000:]}"
    elif not command.startswith("torchrun"):  # it has a code of its own
        # The latter where the signal came as Python was ending by itself.
        assert process.returncode in (130, -signal.SIGINT), f"{command}\n{output[-3000:]}"
    return output


def ends_in_time(process: subprocess.Popen, printed: TextIO, to_the_end: bool) -> bool:
    """Wait for the process, or interrupt it. -> whether it has ended by itself."""
    if not to_the_end:
        give_up = time.monotonic() + SECONDS_TO_SPEAK
        while time.monotonic() < give_up and process.poll() is None:
            if os.fstat(printed.fileno()).st_size:
                break
            time.sleep(0.1)
    try:
        process.wait(timeout=SECONDS_TO_THE_END if to_the_end else SECONDS_THEN)
        return True
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)
        process.wait(timeout=SECONDS_TO_STOP)
        return False


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(PROJECT)))
def test_the_commands_of_the_page_work(page, project, typed):
    output = ""
    for command, to_the_end in commands(page.read_text(encoding="utf-8")):
        known = command in typed and command.startswith("python -m")
        if known or command.startswith(tuple(LEFT_OUT)):
            continue
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        output += type_in(command, project, to_the_end)
        if page in LESSONS and to_the_end:
            # A minute or two on two idle cores; busy ones take longer for the same work.
            assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 240, command
        typed.add(command)

    lines = iter(without_numbers(output))
    for line in without_numbers("".join(blocks(page, "text"))):
        assert line == "..." or line in lines, (
            f"{line!r} is not in the output, or not in this order"
        )


def without_numbers(text: str) -> list[str]:
    """The lines, with # for every number: another processor rounds differently."""
    number = re.compile(r"[-+]?\d[\d.,]*(e[-+]?\d+)?%?")
    return [" ".join(number.sub("#", line).split()) for line in text.splitlines()]
