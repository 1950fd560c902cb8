"""A run on a file of pairs is resumed with the same file alone, and ends as if never stopped."""

import functools
import itertools
import shutil
import signal
from pathlib import Path

import pytest
import torch
from plants import in_float64, late_after_meeting, signal_at_step
from trainings import NEW, RESUME, fingerprint

import train as train_script
from transformer_scratch.checkpoint import load_checkpoint
from transformer_scratch.run_folder import read_metrics

# Two epochs, each of five updates, the last one smaller.
SMALL = ["--dim=8", "--num-layers=1", "--batch-size=8", "--max-epochs=2", "--wandb=disabled"]
slow = pytest.mark.slow


def write(name: str, count: int, first: int = 0) -> str:
    """Write so many pairs, a few of them with two right answers. -> the absolute path."""
    lines = [f"{number:03b}\t{number:o}" for number in range(first, first + count)]
    lines[-1] = f"{first:03b}\t{first:b}"
    Path(name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(Path(name).absolute())


def three_files() -> list[str]:
    """-> the flags. The lines of the split files are in another order than the seed's."""
    return [
        f"--pairs={write('train.tsv', 37)}",
        f"--val-pairs={write('val.tsv', 12, 30)}",
        f"--test-pairs={write('test.tsv', 12, 40)}",
    ]


def terminated_at(step: int):
    return functools.partial(signal_at_step, step, signal.SIGTERM)


def train(*flags: str) -> None:
    """In this process, which is quicker."""
    train_script.main([*SMALL, *flags])


def resume(*flags: str) -> None:
    train_script.main(["--wandb=disabled", *RESUME, *flags])


@pytest.fixture
def refused(capsys):
    """Resume where that cannot work. -> the one line that is said; the run stays as it was."""

    def run(*flags: str) -> str:
        before = {file: file.read_bytes() for file in Path("run").rglob("*") if file.is_file()}
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            resume("--max-epochs", "3", *flags)
        error = capsys.readouterr().err
        assert end.value.code == 2 and error.count("\n") == 1, error
        after = {file: file.read_bytes() for file in Path("run").rglob("*") if file.is_file()}
        assert after == before
        return error

    return run


# ------------------------------------------------------------------------------------ bit for bit


def test_a_file_is_resumed_within_an_epoch_bit_for_bit(monkeypatch):
    """The third update hears a signal; so do the tests below, in processes that get one."""
    flags = ["--pairs", write("pairs.tsv", 42), "--average", "0.9"]
    train(*flags, "--run-dir", "whole")
    heard = itertools.chain([0, 0, signal.SIGTERM], itertools.repeat(0))
    monkeypatch.setattr(train_script.Signals, "exchange", lambda self: next(heard))
    with pytest.raises(SystemExit) as end:
        train(*flags, *NEW)
    assert end.value.code == 143
    last = load_checkpoint(Path("run/last.pt"))
    assert (last["epoch"], last["step"]) == (0, 3)
    assert any(not last["averaged"][name].equal(last["model"][name]) for name in last["model"])
    resume()
    assert fingerprint(Path("run")) == fingerprint(Path("whole"))


@slow
@pytest.mark.parametrize(
    ("flags", "step"),
    [
        pytest.param("--average=0.9", 4, id="before the small batch"),
        pytest.param("--average=0.9", 5, id="after the small batch"),
        pytest.param("--average=0.9 --accumulate=3", 3, id="accumulation"),
        pytest.param("--average=0 --holdout=0 --num-workers=2", 4, id="shared lines"),
        pytest.param(
            "--label-smoothing=0.1 --schedule=inverse-sqrt --warmup-steps=4",
            7,
            id="smoothing and schedule",
        ),
    ],
)
def test_a_stop_within_an_epoch_of_a_file_leaves_no_trace(run, undisturbed, flags, step):
    flags = [*SMALL, "--pairs", write("pairs.tsv", 42), *flags.split()]
    assert run(*flags, *NEW, plant=terminated_at(step))[0] == 143
    last = load_checkpoint(Path("run/last.pt"))
    assert last["step"] == step and (last["averaged"] is None) == ("--average=0" in flags)
    assert run(*RESUME)[0] == 0
    assert fingerprint(Path("run")) == undisturbed(*flags)


@slow
def test_a_stop_within_an_epoch_with_all_three_files(run, undisturbed):
    """The run has copies of two of them, and asks their lines in the same order."""
    flags = [*SMALL, *three_files()]
    expected = undisturbed(*flags)
    assert run(*flags, *NEW, plant=terminated_at(3))[0] == 143
    for name in ("val.tsv", "test.tsv"):
        Path(name).unlink()
    assert run(*RESUME)[0] == 0
    assert fingerprint(Path("run")) == expected


def test_a_longer_run_without_its_validation_and_test_files():
    flags = three_files()
    train(*flags, "--run-dir", "whole")
    train(*flags, *NEW, "--max-epochs", "1")
    for name in ("val.tsv", "test.tsv"):
        Path(name).unlink()
    kept = {file: file.read_bytes() for file in Path("run/pairs").iterdir()}
    resume("--max-epochs", "2")
    assert fingerprint(Path("run")) == fingerprint(Path("whole"))
    assert {file: file.read_bytes() for file in Path("run/pairs").iterdir()} == kept


# ----------------------------------------------------------------------------- where the file is


def test_a_file_that_has_moved_is_found_with_pairs(refused):
    train("--pairs", write("pairs.tsv", 42), "--run-dir", "whole")
    train("--pairs", "pairs.tsv", *NEW, "--max-epochs", "1")
    Path("elsewhere").mkdir()
    Path("pairs.tsv").rename("elsewhere/other.tsv")
    error = refused()
    assert f"--pairs {Path.cwd()}/pairs.tsv cannot be read: No such file" in error
    resume("--pairs", "elsewhere/other.tsv", "--max-epochs", "2")
    assert fingerprint(Path("run")) == fingerprint(Path("whole"))
    config = load_checkpoint(Path("run/last.pt"))["config"]
    assert config["pairs"] == f"{Path.cwd()}/elsewhere/other.tsv"


def test_a_run_is_resumed_from_another_folder(monkeypatch):
    """Its file was given by a relative path."""
    write("pairs.tsv", 42)
    train("--pairs", "pairs.tsv", *NEW, "--max-epochs", "1")
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    train_script.main(["--resume", "../run", "--max-epochs", "2", "--wandb=disabled"])
    assert load_checkpoint(Path("../run/last.pt"))["epoch"] == 2


CHANGES = {
    "a target": lambda text: text.replace("101\t5\n", "101\t4\n"),
    "a line less": lambda text: text.replace("101\t5\n", ""),
    "a blank line": lambda text: f"{text}\n",  # only the bytes differ
    "a mark": lambda text: f"\ufeff{text}",
}


@pytest.mark.parametrize("three", [False, True], ids=["one file", "three files"])
def test_a_file_with_another_content_is_refused(refused, three):
    flags = three_files() if three else ["--pairs", write("train.tsv", 42)]
    train(*flags, *NEW, "--max-epochs", "1")
    file = Path("train.tsv")
    text = file.read_text(encoding="utf-8")
    for change in CHANGES.values():
        assert change(text) != text
        file.write_text(change(text), encoding="utf-8")
        error = refused()
        assert f"{Path.cwd()}/train.tsv is another file (its SHA-256 differs)" in error
        assert "say with --pairs where the file is that this run was trained on" in error
    Path("original.tsv").write_text(text, encoding="utf-8")
    resume("--max-epochs", "2", "--pairs", "original.tsv")
    assert load_checkpoint(Path("run/last.pt"))["epoch"] == 2


@pytest.mark.parametrize("name", ["val.tsv", "test.tsv"])
def test_changed_copies_of_the_two_other_files_are_refused(refused, name):
    train(*three_files(), *NEW, "--max-epochs", "1")
    copy = Path("run/pairs") / name
    lines = copy.read_text(encoding="utf-8")
    copy.write_text(lines + lines.splitlines()[0] + "0\n", encoding="utf-8")
    assert "the lines in the run's pairs/ are not those" in refused()
    copy.unlink()
    assert f"run/pairs/{name} cannot be read: No such file" in refused()


def test_the_files_of_a_resumed_run_cannot_change(refused):
    train(*three_files(), *NEW, "--max-epochs", "1")
    shutil.copy("val.tsv", "other.tsv")
    assert "--val-pairs (it was" in refused("--val-pairs", "other.tsv")
    assert "--holdout (it was None, now 0.1)" in refused("--holdout", "0.1")
    resume("--max-epochs", "2", "--val-pairs", "val.tsv", "--test-pairs", "./test.tsv")
    assert load_checkpoint(Path("run/last.pt"))["epoch"] == 2


def test_a_run_of_digits_is_not_resumed_with_a_file(refused):
    train("--num-datas", "64", *NEW, "--max-epochs", "1")
    assert "--pairs" in refused("--pairs", write("pairs.tsv", 42))


# --------------------------------------------------------------------------------- two processes


def losses(folder: str) -> list[float]:
    return [row["train/loss_step"] for row in read_metrics(Path(folder)) if "lr" in row]


def split_files(trained_lines: int) -> list[str]:
    """A single line each to validate and to test on: the second process has none of them."""
    for name in ("val.tsv", "test.tsv"):
        Path(name).write_text("101\t7\n", encoding="utf-8")
    pairs = write("train.tsv", trained_lines)
    return ["--pairs", pairs, "--val-pairs", "val.tsv", "--test-pairs", "test.tsv"]


@slow
@pytest.mark.parametrize("accumulate", ["1", "2"])
def test_two_processes_share_a_last_batch_of_a_line_each(run, run_two, accumulate):
    """18 lines: two global batches of 8, and one of 2. Both train as one process does."""
    flags = [*SMALL, *split_files(18), "--dropout=0", "--accumulate", accumulate]
    assert run(*flags, "--run-dir", "one", plant=in_float64)[0] == 0
    two = [*flags, "--batch-size=4", "--run-dir", "two"]
    codes, outputs = run_two(*two, plants=(in_float64, in_float64))
    assert codes == [0, 0], outputs
    assert len(losses("two")) == (6 if accumulate == "1" else 4)
    assert losses("two") == pytest.approx(losses("one"), rel=1e-10)
    one, two = (load_checkpoint(Path(name) / "last.pt")["model"] for name in ("one", "two"))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-10, atol=1e-10)
    rows = [read_metrics(Path(name)) for name in ("one", "two")]
    for name in ("val/loss_epoch", "test/loss_epoch"):
        first, second = ([row[name] for row in part if name in row] for part in rows)
        assert second == pytest.approx(first, rel=1e-10)


@slow
def test_two_processes_leave_out_a_last_batch_of_a_single_line(run_two, undisturbed):
    """17 lines. Stopped in the middle of an epoch, they go on as if nothing had happened."""
    flags = [*SMALL, *split_files(17), "--batch-size=4"]
    flags = [str(Path(flag).absolute()) if flag.endswith(".tsv") else flag for flag in flags]
    codes, outputs = run_two(*flags, *NEW, plants=(terminated_at(1), None))
    assert codes == [143, 143], outputs
    codes, outputs = run_two(*RESUME)
    assert codes == [0, 0], outputs
    assert len(losses("run")) == 4
    assert fingerprint(Path("run")) == undisturbed(*flags, processes=2)


@slow
@pytest.mark.parametrize("slow_one", [0, 1])
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--pairs pairs.tsv --run-dir run", "pairs.tsv, line 2 has no tab"),
        ("--num-datas 8 --batch-size 8 --run-dir run", "a batch of 16 is larger than"),
        ("--average 1 --run-dir run", "--average 1.0 must be at least 0 and below 1"),
        ("--resume nowhere", "nowhere: no such folder"),
    ],
)
def test_a_refusal_by_two_processes_is_one_line_though_one_comes_late(
    run_two, flags, message, slow_one
):
    """Process 0 keeps the store of both, so it must not be gone while the other still asks it."""
    Path("pairs.tsv").write_text("a\tb\nc\n", encoding="utf-8")
    plants = [None, None]
    plants[slow_one] = functools.partial(late_after_meeting, 1.0)
    codes, outputs = run_two(*SMALL, *flags.split(), plants=plants)
    assert codes == [2, 2], outputs
    assert message in outputs[0] and outputs[0].count("\n") == 1
    assert outputs[1] == "" and not Path("run").exists()
