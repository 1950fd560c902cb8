"""evaluate.py --list tells runs apart that differ in what their names do not say."""

import json
import re
import shutil
from pathlib import Path

import pytest

import evaluate


@pytest.fixture
def listed(capsys):
    """-> the lines of evaluate.py --list, split where the columns are."""

    def run() -> list[list[str]]:
        capsys.readouterr()
        evaluate.main(["--list"])
        return [re.split(r"  +", line) for line in capsys.readouterr().out.splitlines()]

    return run


def write_run(name: str, metrics: list[dict], **settings: object) -> Path:
    folder = Path("runs") / name
    folder.mkdir(parents=True)
    defaults = {"dim": 32, "num_heads": 1, "num_layers": 6, "seed": 42, "max_epochs": 4}
    text = json.dumps({**defaults, **settings})
    (folder / "config.json").write_text(text, encoding="utf-8")
    rows = "".join(json.dumps(row) + "\n" for row in metrics)
    (folder / "metrics.jsonl").write_text(rows, encoding="utf-8")
    return folder


def test_a_run_has_its_seed_size_epochs_result_and_date(train, tiny, listed):
    folder = train(*tiny, "--seed", "7")
    header, run = listed()
    assert header == ["run", "seed", "size", "epochs", "exact match", "saved"]
    assert run[:4] == [str(folder), "7", "dim 16, 1 head, 1+1 layers", "2 of 2"]
    assert re.fullmatch(r"test \d+\.\d%", run[4]) and re.fullmatch(r"\d{4}-\d\d-\d\d .+", run[5])


def test_stopped_and_damaged_runs_have_their_line(listed):
    write_run("a", [{"val/exact_match": 0.25}], num_heads=8, dim=512)
    write_run("b", [])
    (write_run("c", []) / "config.json").write_text("{", encoding="utf-8")
    rows = {row[0]: row[1:] for row in listed()[1:]}
    assert rows["runs/a"] == [
        "42",
        "dim 512, 8 heads, 6+6 layers",
        "1 of 4",
        "validation 25.0%",
        "never",
    ]
    assert rows["runs/b"][2:] == ["0 of 4", "none yet", "never"]
    assert rows["runs/c"][1] == "unreadable (JSONDecodeError)"


@pytest.mark.parametrize("value", [None, "x", [], 10**400, "[" * 100_000])
def test_a_run_that_cannot_be_read_hides_no_other(value, listed):
    write_run("a", [{"test/exact_match": 0.5}])
    folder = write_run("b", [{"test/exact_match": value}])
    if isinstance(value, str) and len(value) > 1:
        (folder / "config.json").write_text(value, encoding="utf-8")
    rows = {row[0]: row[1:] for row in listed()[1:]}
    assert rows["runs/a"][3] == "test 50.0%" and "unreadable" in rows["runs/b"][1]


def test_without_a_run_it_says_so(listed, capsys):
    with pytest.raises(SystemExit) as end:
        listed()
    assert end.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_the_one_saved_last_is_the_last_line(train, tiny, listed):
    first = train(*tiny)
    second = train(*tiny, "--seed", "1")
    assert [row[0] for row in listed()[1:]] == [str(first), str(second)]
    shutil.copytree(first, "runs/copied-later")
    assert listed()[-1][0] == str(second)
