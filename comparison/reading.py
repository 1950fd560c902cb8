"""How much of a program's code there is to read: the lines of the functions that run, and that only it needs.

python -m comparison.reading plain|lightning <json file> [training flags]
"""

import importlib
import json
import sys
import threading
from pathlib import Path
from types import CodeType

PROJECT = Path(__file__).resolve().parent.parent
LIGHTNING = ("pytorch_lightning", "lightning_fabric", "lightning_utilities", "torchmetrics")
APPARATUS = {
    "recorder.py",
    "reading.py",
    "measured.py",
    "compare.py",
    "parity.py",
}  # of this comparison


def is_counted(file: str) -> bool:
    """The project's files and Lightning's, not what both sides stand on: torch, W&B, the standard library."""
    path = Path(file)
    if path.is_relative_to(PROJECT) and "site-packages" not in path.parts:
        return path.name not in APPARATUS and "tests" not in path.parts
    return any(package in path.parts for package in LIGHTNING)


def functions_that_run(program: str, flags: list[str]) -> set[CodeType]:
    """Every function that is entered while the program's main runs."""
    seen: set[CodeType] = set()

    def on_event(frame, event: str, argument: object) -> None:
        if event == "call":
            seen.add(frame.f_code)

    main = importlib.import_module(program).main
    threading.setprofile(on_event)
    sys.setprofile(on_event)
    try:
        main(flags)
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return {code for code in seen if is_counted(code.co_filename)}


def code_lines(functions: set[CodeType]) -> list[tuple[str, int]]:
    """The lines with code in them, without comments, docstrings and blank ones."""
    lines = {
        (code.co_filename, line) for code in functions for _, _, line in code.co_lines() if line
    }
    return sorted(lines)


def count_lines(ours: list, theirs: list) -> dict[str, dict[str, int]]:
    """For each side what it does not share with the other: lines, functions' files."""
    ours, theirs = ({tuple(line) for line in lines} for lines in (ours, theirs))
    return {
        name: {"lines": len(own), "files": len({file for file, _ in own})}
        for name, own in (("plain", ours - theirs), ("lightning", theirs - ours))
    }


def main() -> None:
    which, file, *flags = sys.argv[1:]
    program = {"plain": "train", "lightning": "comparison.train_lightning"}[which]
    Path(file).write_text(json.dumps(code_lines(functions_that_run(program, flags))))


if __name__ == "__main__":
    main()
