"""Files of pairs: how their lines are read, and what is said of one that cannot be trained on."""

import hashlib
import random
import unicodedata
from pathlib import Path

import pytest

import train as train_script
from transformer_scratch.config import load_config
from transformer_scratch.errors import BadInput
from transformer_scratch.output import warned_of
from transformer_scratch.pair_file import Column, read_pairs, write_pairs

TINY = ["--dim=8", "--num-layers=1", "--max-epochs=1", "--wandb=disabled"]
LETTERS = "abcdefghijklmnopqrstuvwxyz"
GOOD = "".join(f"{letter}\ta{letter}\n" for letter in LETTERS)
AT_SPACES, INTO_CHARACTERS = Column(True), Column(False)


def write(content: str | bytes, name: str = "pairs.tsv") -> str:
    """Write a file into the current folder. -> its name."""
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return name


def lines_of(content: str | bytes) -> list[tuple[str, str]]:
    return read_pairs(write(content), "--pairs").lines


# ------------------------------------------------------------------------------------ what is read


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        pytest.param(b"\xef\xbb\xbfa\tb\nc\td\n", [("a", "b"), ("c", "d")], id="mark"),
        pytest.param("\ufeffa\tb\n\ufeffc\td\n", [("a", "b"), ("c", "d")], id="files joined"),
        pytest.param("a\tb\r\n\r\nc\td\r\n", [("a", "b"), ("c", "d")], id="Windows"),
        pytest.param("a\tb\nc\td", [("a", "b"), ("c", "d")], id="no last newline"),
        pytest.param("\n\na\tb\n  \n\u3000\n\nc\td\n\n", [("a", "b"), ("c", "d")], id="blank"),
        pytest.param("cafe\u0301\tn\u0303\n", [("caf\u00e9", "\u00f1")], id="decomposed"),
        pytest.param("\U0001f600\U0001f44d\U0001f3fd\t\u2764\ufe0f\n",
                     [("\U0001f600\U0001f44d\U0001f3fd", "\u2764\ufe0f")], id="emoji"),
        pytest.param("  a b \t c  d\n", [("a b", "c  d")], id="spaces around"),
        pytest.param("b\ta\nb\ta\na\tc\n", [("b", "a"), ("b", "a"), ("a", "c")], id="repeated"),
    ],
)  # fmt: skip
def test_the_lines_that_are_read(content, lines):
    assert lines_of(content) == lines


@pytest.mark.parametrize("separator", list("\u2028\u2029\x0b\x0c\x1c\x1d\x1e\x85"))
def test_only_a_newline_ends_a_line(separator):
    """str.splitlines() would end one at each of these."""
    assert len(f"a{separator}b".splitlines()) == 2, "or nothing is shown here"
    assert lines_of(f"a{separator}b\tc\nd\te{separator}f\n") == [
        (f"a{separator}b", "c"),
        ("d", f"e{separator}f"),
    ]


def test_a_line_of_a_megabyte():
    long = "x" * 2**20
    assert lines_of(f"{long} y\t{long}\na\tb\n") == [(f"{long} y", long), ("a", "b")]


def test_the_numbers_of_lines_count_blank_ones_and_the_checksum_is_that_of_the_bytes():
    content = b"\xef\xbb\xbf\r\na\tb\r\n\r\n\r\nc\td"
    file = read_pairs(write(content), "--pairs")
    assert file.numbers == [2, 5]
    assert file.sha256 == hashlib.sha256(content).hexdigest()


def test_what_is_written_is_read_again_as_it_was():
    """The lines that a run keeps, whatever stands in them."""
    draw = random.Random(0)
    alphabet = "ab \u0301\u00e9\ufeff\u2028\x0c\x85\u00a0\U0001f600\u212b"
    pieces = ["".join(draw.choices(alphabet, k=6)) for _ in range(4_000)]
    content = "".join(f"x{a}\tx{b}\n{a}x\t{b}x\n" for a, b in zip(*[iter(pieces)] * 2, strict=True))
    lines = lines_of(content)
    assert len(lines) == 4_000
    for first in range(0, len(lines), 40):  # each begins another file
        write_pairs(Path("copy.tsv"), lines[first : first + 40])
        assert read_pairs("copy.tsv", "--run").lines == lines[first : first + 40]


def test_every_field_is_composed():
    fields = [field for line in lines_of("e\ufeff\u0301\t\u212b\n") for field in line]
    assert fields == ["\u00e9", "\u00c5"]
    assert all(unicodedata.is_normalized("NFC", field) for field in fields)


# ----------------------------------------------------------------------------------------- columns


@pytest.mark.parametrize(
    ("content", "columns"),
    [
        ("ab\tcd\nef\tgh\n", (INTO_CHARACTERS, INTO_CHARACTERS)),
        ("ab\tcd\nef\tg h\n", (INTO_CHARACTERS, AT_SPACES)),
        ("a b\tcd\nef\tgh\n", (AT_SPACES, INTO_CHARACTERS)),
        (" ab\tcd \nef \t gh\n", (INTO_CHARACTERS, INTO_CHARACTERS)),
        ("a\u00a0b\tc\u3000d\n", (INTO_CHARACTERS, INTO_CHARACTERS)),
    ],
)
def test_a_column_is_cut_at_spaces_where_a_field_of_it_holds_one(content, columns):
    file = read_pairs(write(content), "--pairs")
    assert (file.column(0), file.column(1)) == columns


@pytest.mark.parametrize("stray", [0, 1, 40])
def test_where_hardly_any_field_has_a_space_there_is_a_warning(stray, capsys):
    warned_of.clear()
    lines = [f"{'a b' if number < stray else 'ab'}\tc\n" for number in range(100)]
    columns = [read_pairs(write("".join(lines)), "--pairs").column(side) for side in (0, 1)]
    assert columns == [Column(stray > 0), INTO_CHARACTERS]
    warning = "1 of 100 sources have spaces (line 1 first), so all are cut at spaces"
    assert (warning in capsys.readouterr().err) == (stray == 1)


def test_how_a_field_is_cut_and_put_together():
    assert AT_SPACES.split("new  york   x") == ["new", "york", "x"]
    assert AT_SPACES.join(["new", "york"]) == "new york"
    assert INTO_CHARACTERS.split("ne\u00e9") == ["n", "e", "\u00e9"]
    assert INTO_CHARACTERS.join(["n", "e"]) == "ne"
    assert [str(AT_SPACES), str(INTO_CHARACTERS)] == ["at spaces", "into characters"]


def test_the_longest_line_and_its_number():
    file = read_pairs(write("\nab\tc d e\n\nabcde\tc\nab\tc d e f\n"), "--pairs")
    assert file.longest((INTO_CHARACTERS, AT_SPACES)) == (5, 4)
    assert file.longest((AT_SPACES, AT_SPACES)) == (4, 5)


# -------------------------------------------------------------------------------------- bad files


@pytest.fixture
def refused(capsys):
    """Give train.py flags that cannot work. -> the one line that it says on stderr."""

    def run(*flags: object) -> str:
        before = sorted(Path().rglob("*"))
        with pytest.raises(SystemExit) as end:
            train_script.main([*TINY, *map(str, flags)])
        captured = capsys.readouterr()
        assert end.value.code == 2
        assert captured.err.startswith("error: ") and captured.err.count("\n") == 1, captured.err
        assert sorted(Path().rglob("*")) == before, "a refused run leaves nothing"
        return captured.err

    return run


@pytest.mark.parametrize(
    ("content", "found"),
    [
        pytest.param("", "is empty", id="nothing"),
        pytest.param(b"\xef\xbb\xbf", "is empty", id="only the mark"),
        pytest.param("\n \r\n\n", "is empty", id="only blank lines"),
        pytest.param("a\tb\nc\rd\te\n", "line 2 has a carriage return inside", id="an old Mac's"),
        pytest.param(b"\na\tb\nc\t\xe9\n", "line 3 is not UTF-8", id="Latin 1"),
        pytest.param("a\tb\n".encode("utf-16"), "line 1 is not UTF-8", id="UTF-16"),
        pytest.param("a\tb\n\nc d\n", "line 3 has no tab", id="no tab"),
        pytest.param("a\tb\nc\t\n", "line 2 has an empty field", id="no target"),
        pytest.param("a\tb\n \tc\n", "line 2 has an empty field", id="no source"),
        pytest.param("a\tb\n\t\n", "line 2 has an empty field", id="a tab alone"),
        pytest.param("a\tb\tc\n", "line 1 has 3 fields", id="two tabs"),
    ],
)
def test_a_file_that_is_none_of_pairs(refused, content, found):
    """Each of the three is read in the same way, and named by its flag."""
    good, bad = write(GOOD, "good.tsv"), write(content, "bad.tsv")
    path = Path("bad.tsv").absolute()
    assert f"--pairs {path}" in (message := refused("--pairs", bad)) and found in message
    for flag, files in (("--val-pairs", (bad, good)), ("--test-pairs", (good, bad))):
        message = refused("--pairs", good, "--val-pairs", files[0], "--test-pairs", files[1])
        assert f"{flag} {path}" in message and found in message


def test_a_file_that_is_not_there_and_a_folder(refused):
    Path("folder").mkdir()
    here = Path.cwd()
    assert f"--pairs {here}/missing.tsv cannot be read: No such file" in refused(
        "--pairs", "missing.tsv"
    )
    assert f"--pairs {here}/folder cannot be read: Is a directory" in refused("--pairs", "folder")
    assert "--pairs is empty" in refused("--pairs", "")
    good = write(GOOD)
    message = refused("--pairs", good, "--val-pairs", good, "--test-pairs", "missing.tsv")
    assert f"--test-pairs {here}/missing.tsv cannot be read" in message


@pytest.mark.parametrize("content", ["\na\tb\n", "a\tb\na\tb\n"])
def test_a_single_pair(refused, content):
    name = write(content)
    assert f"--pairs {Path(name).absolute()} holds a single pair" in refused("--pairs", name)


@pytest.mark.parametrize(
    "line", ["a" * 20 + "\tb", "a\t" + "b" * 20], ids=["its source", "its target"]
)
def test_a_line_longer_than_seq_len(refused, line):
    """Start and end are counted; it is named in whichever file it stands."""
    good, bad = write(GOOD, "good.tsv"), write(f"{GOOD}\n{line}\n", "bad.tsv")
    named = f"{Path(bad).absolute()}, line 28 takes 22 tokens with start and end"
    message = refused("--pairs", bad, "--seq-len", 21)
    assert named in message and "--seq-len 21" in message and "give --seq-len 22" in message
    message = refused("--pairs", good, "--val-pairs", good, "--test-pairs", bad, "--seq-len", 21)
    assert named in message
    load_config([*TINY, "--pairs", bad, "--seq-len", "22"])


def test_a_line_longer_than_512_tokens_needs_seq_len(refused):
    write(f"{GOOD}{'a' * 510}\tb\n", "fits.tsv")
    write(f"{GOOD}{'a' * 511}\tb\n", "bad.tsv")
    message = refused("--pairs", "bad.tsv")
    assert "bad.tsv, line 27 takes 513 tokens" in message and "give --seq-len 513" in message
    load_config([*TINY, "--pairs", "fits.tsv"])
    load_config([*TINY, "--pairs", "bad.tsv", "--seq-len", "513"])


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_split_of_which_no_target_token_is_known(refused, split):
    good, strange = write(GOOD), write("a\t123\nb\t45\n", "strange.tsv")
    partly = write("a\t123\nb\t4b\n", "partly.tsv")
    files = [strange, partly] if split == "val" else [partly, strange]
    message = refused("--pairs", good, "--val-pairs", files[0], "--test-pairs", files[1])
    assert f"no target token of --{split}-pairs is in any line of --pairs" in message
    load_config([*TINY, "--pairs", good, "--val-pairs", partly, "--test-pairs", partly])


def test_held_out_lines_of_which_no_target_token_is_known(refused):
    pairs = write("".join(f"{letter}\t{letter}\n" for letter in LETTERS))
    assert "no target token of the lines held out for val" in refused("--pairs", pairs)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--pairs good.tsv --val-pairs good.tsv", "--val-pairs and --test-pairs belong together"),
        ("--pairs good.tsv --test-pairs good.tsv", "--val-pairs and --test-pairs belong together"),
        ("--val-pairs good.tsv --test-pairs good.tsv", "need --pairs"),
        (
            "--pairs good.tsv --val-pairs good.tsv --test-pairs good.tsv --holdout 0.1",
            "--holdout: with --val-pairs all of --pairs is trained on",
        ),
        (
            "--pairs good.tsv --val-pairs good.tsv --test-pairs good.tsv --holdout 0",
            "--holdout: with --val-pairs all of --pairs is trained on",
        ),
        ("--pairs good.tsv --num-datas 100", "--num-datas is for digits"),
        ("--pairs good.tsv --num-categories 10", "--num-categories is for digits"),
        ("--pairs good.tsv --batch-size 24", "--batch-size 24 is larger than the 23 training"),
        ("--pairs good.tsv --holdout 0 --batch-size 27", "--batch-size 27 is larger than the 26"),
        ("--pairs good.tsv --holdout 0.05", "--holdout 0.05 of 26 sources is 1"),
        ("--pairs good.tsv --holdout 0.99", "--holdout 0.99 of 26 sources is 26"),
        ("--pairs good.tsv --seq-len 3", "good.tsv, line 1 takes 4 tokens"),
    ],
)
def test_flags_that_do_not_go_with_a_file(refused, flags, named):
    write(GOOD, "good.tsv")
    assert named in refused(*flags.split())


def test_an_error_of_reading_is_bad_input():
    with pytest.raises(BadInput, match=r"^--run missing\.tsv cannot be read: No such file"):
        read_pairs("missing.tsv", "--run")


@pytest.mark.slow
def test_a_bad_file_through_the_real_script(script):
    write("a\tb\nc\n")
    process = script("train.py", "--pairs", "pairs.tsv")
    assert process.returncode == 2 and process.stdout == ""
    assert process.stderr.count("\n") == 1 and "pairs.tsv, line 2 has no tab" in process.stderr
    assert list(Path().iterdir()) == [Path("pairs.tsv")]
