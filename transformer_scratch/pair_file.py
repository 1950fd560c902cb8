"""Reads a file of pairs: UTF-8, one pair a line, `source<TAB>target`.

A byte-order mark and Windows line ends are dropped, blank lines are skipped, and characters are
composed (Unicode NFC), so that an accent is the same token however it was typed.
"""

import hashlib
import os
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from transformer_scratch.checkpoint import force_to_disk
from transformer_scratch.errors import BadInput
from transformer_scratch.output import warn_once

Line = tuple[str, str]
A_LINE = "a line is: source, one tab, target"


class Column(NamedTuple):
    """How the fields of a column are cut into tokens: at spaces, or into characters."""

    at_spaces: bool

    def split(self, field: str) -> list[str]:
        return [token for token in field.split(" ") if token] if self.at_spaces else list(field)

    def join(self, tokens: Iterable[str]) -> str:
        return (" " if self.at_spaces else "").join(tokens)

    def __str__(self) -> str:
        return "at spaces" if self.at_spaces else "into characters"


class PairFile(NamedTuple):
    """The pairs of a file as they stand in it, and the number of each one's line."""

    path: str
    lines: list[Line]
    numbers: list[int]
    sha256: str

    def column(self, side: int) -> Column:
        """0: the sources, 1: the targets. Cut at spaces if any field holds one.

        Where hardly any does, it may be a mistake: then with a warning.
        """
        spaced = [
            number
            for line, number in zip(self.lines, self.numbers, strict=True)
            if " " in line[side]
        ]
        if 0 < len(spaced) < len(self.lines) / 20:
            what = ("source", "target")[side]
            warn_once(
                f"spaces in {what}s",
                f"{self.path}: {len(spaced):,} of {len(self.lines):,} {what}s have spaces (line "
                f"{spaced[0]} first), so all are cut at spaces, and the others are single tokens",
            )
        return Column(bool(spaced))

    def longest(self, columns: tuple[Column, Column]) -> tuple[int, int]:
        """-> the most tokens that a field has, and the number of its line."""
        lengths = (
            max(len(column.split(field)) for column, field in zip(columns, line, strict=True))
            for line in self.lines
        )
        return max(zip(lengths, self.numbers, strict=True), key=lambda found: found[0])


def read_pairs(path: str, flag: str, sha256: str | None = None) -> PairFile:
    """Read a file of pairs. Raises BadInput, naming the line where there is one.

    sha256: of the file that a resumed run was trained on: no other will do.
    """
    remedy = "; say with --pairs where the file is that this run was trained on" if sha256 else ""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise BadInput(f"{flag} {path} cannot be read: {error.strerror}{remedy}") from None
    found_sha256 = hashlib.sha256(content).hexdigest()
    if sha256 not in (None, found_sha256):
        raise BadInput(f"{flag} {path} is another file (its SHA-256 differs){remedy}")
    try:
        text = normalised(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise BadInput(
            f"{flag} {path}, line {number} is not UTF-8; write the file anew in that encoding"
        ) from None
    lines, numbers = [], []
    for number, line in enumerate(text.split("\n"), start=1):
        if "\t" not in line and not line.strip():
            continue
        fields = tuple(field.strip() for field in line.split("\t"))
        if len(fields) != 2 or not all(fields):
            found = {1: "no tab", 2: "an empty field"}.get(len(fields), f"{len(fields)} fields")
            raise BadInput(f"{flag} {path}, line {number} has {found}; {A_LINE}")
        if any("\r" in field for field in fields):
            raise BadInput(f"{flag} {path}, line {number} has a carriage return inside; {A_LINE}")
        lines.append(fields)
        numbers.append(number)
    if not lines:
        raise BadInput(f"{flag} {path} is empty; {A_LINE}")
    return PairFile(path, lines, numbers, found_sha256)


def normalised(text: str) -> str:
    """Unicode NFC, without the byte-order marks that are left where files were joined."""
    return unicodedata.normalize("NFC", text.replace("\ufeff", ""))


def write_pairs(path: Path, lines: list[Line]) -> None:
    """Write them as a whole: there never is half a file."""
    temporary = path.with_name(f"{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(f"{source}\t{target}\n" for source, target in lines)
        file.flush()
        force_to_disk(file.fileno())
    os.replace(temporary, path)
