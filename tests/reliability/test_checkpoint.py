"""A checkpoint is whole, or it is never loaded: cut, changed, hostile, foreign, missing files."""

import functools
import os
import random
import shutil
import signal
from pathlib import Path

import pytest
import torch
from plants import signal_at_step
from trainings import NEW, RESUME, SMALL, Training, fingerprint

import evaluate
import train
from transformer_scratch import checkpoint
from transformer_scratch.checkpoint import (
    FORMAT,
    CheckpointError,
    checksum,
    link,
    load_checkpoint,
    load_resumable,
    save_checkpoint,
)
from transformer_scratch.config import Config, config_of_checkpoint
from transformer_scratch.errors import BadInput
from transformer_scratch.processes import ALONE
from transformer_scratch.run_folder import RunFolder

slow = pytest.mark.slow


@pytest.fixture(scope="module")
def stopped_run(tmp_path_factory):
    """A run stopped at step 9: last.pt is of this step, previous.pt of step 6."""
    folder = tmp_path_factory.mktemp("stopped")
    plant = functools.partial(signal_at_step, 9, signal.SIGTERM)
    training = Training([*SMALL, *NEW, "--save-every", "3"], plant, folder)
    training.start()
    assert training.wait()[0] == 143
    return folder / "run"


@pytest.fixture
def stopped(stopped_run):
    shutil.copytree(stopped_run, "run")
    return Path("run")


def cut(file: Path, part: float) -> None:
    os.truncate(file, int(file.stat().st_size * part))


def place_of_weights(file: Path, name: str) -> int:
    """-> the number of a bit in the middle of one of the model's tensors."""
    weights = load_checkpoint(file)["model"][name].numpy().tobytes()
    return 8 * (file.read_bytes().index(weights) + len(weights) // 2)


def flip(file: Path, bit: int) -> None:
    data = bytearray(file.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


def test_a_cut_file_is_reported_by_name(stopped):
    size = (stopped / "last.pt").stat().st_size
    for length in (size - 1, size * 99 // 100, size // 2, size // 10, 1000, 2, 1, 0):
        os.truncate(stopped / "last.pt", length)
        with pytest.raises(CheckpointError, match=r"run/last\.pt is damaged or not a checkpoint"):
            load_checkpoint(stopped / "last.pt")


def test_no_flipped_bit_is_ever_loaded_with_other_values(stopped):
    file, generator = stopped / "last.pt", random.Random(0)
    values = checksum(load_checkpoint(file))
    content = file.read_bytes()
    found, silent = 0, 0
    for _ in range(24):
        file.write_bytes(content)
        flip(file, generator.randrange(8 * len(content)))
        try:
            # The bit was in the padding between two tensors.
            assert checksum(load_checkpoint(file)) == values
        except CheckpointError:
            found += 1
        silent += not loads_without_complaint_as_before(file, values)
    assert found > 15
    assert silent > 8  # torch.load alone lets many of them through


def test_a_file_that_may_not_be_read_gives_way_to_no_other(stopped, monkeypatch):
    """It is whole: to go on from the one before would lose it."""

    def refuse(path: Path, **options: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(torch, "load", refuse)
    with pytest.raises(BadInput, match=r"run/last\.pt cannot be read: permission denied") as raised:
        load_resumable(stopped)
    assert not isinstance(raised.value, CheckpointError)


@pytest.mark.parametrize("main", [train.main, evaluate.main])
def test_the_weights_of_another_model_are_refused_by_name(main, stopped, capsys):
    content = load_checkpoint(stopped / "last.pt")
    for weights in (content["model"], content["averaged"]):
        weights["encoder_norm.weight"] = weights.pop("output.weight")
    save_checkpoint(stopped / "last.pt", content)
    flags = ["--resume", "run"] if main is train.main else ["--run", "run", "--checkpoint", "last"]
    with pytest.raises(SystemExit) as end:
        main(flags)
    said = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 2 and "run/last.pt was written by a program with another model" in said
    assert "output.weight" in said


def loads_without_complaint_as_before(file: Path, values: str) -> bool:
    try:
        content = torch.load(file, weights_only=True)
        content.pop("checksum")
        return checksum(content) == values
    except Exception:  # found by torch.load itself
        return True


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda file: flip(file, place_of_weights(file, "output.weight")), id="flip"),
        pytest.param(lambda file: cut(file, 0.5), id="cut", marks=slow),
        pytest.param(lambda file: file.unlink(), id="gone", marks=slow),
    ],
)
def test_a_damaged_last_gives_way_to_previous_with_a_warning(stopped, run, undisturbed, damage):
    damage(stopped / "last.pt")
    code, output = run(*RESUME)
    assert code == 0
    assert "warning: run/last.pt" in output
    assert "using previous.pt instead" in output
    assert fingerprint(stopped) == undisturbed(*SMALL)


@slow
def test_a_damaged_last_never_takes_the_place_of_a_good_previous(stopped, run, undisturbed):
    """Resumed from previous.pt and killed at once: there still is a good state."""
    cut(stopped / "last.pt", 0.5)
    code, _ = run(*RESUME, plant=functools.partial(signal_at_step, 1, signal.SIGKILL))
    assert code == -signal.SIGKILL
    load_checkpoint(stopped / "last.pt")
    load_checkpoint(stopped / "previous.pt")
    assert run(*RESUME)[0] == 0
    assert fingerprint(stopped) == undisturbed(*SMALL)


def test_where_no_file_is_good_all_are_named_and_nothing_is_trained(stopped, run):
    for name in ("last.pt", "previous.pt"):
        cut(stopped / name, 0.99)
    before = (stopped / "metrics.jsonl").read_bytes()
    code, output = run(*RESUME)
    assert code == 2
    assert "run/last.pt is damaged" in output
    assert "run/previous.pt is damaged" in output
    assert "Traceback" not in output
    assert (stopped / "metrics.jsonl").read_bytes() == before


class Hostile:
    def __reduce__(self) -> tuple:
        return os.system, ("touch was_here",)


@pytest.mark.parametrize(
    "wrapped", [Hostile(), {"format": FORMAT, "checksum": "", "model": Hostile()}]
)
def test_a_hostile_pickle_is_refused_without_running_it(stopped, wrapped):
    torch.save(wrapped, stopped / "last.pt")
    shutil.copy(stopped / "last.pt", stopped / "previous.pt")
    with pytest.raises(CheckpointError, match="is damaged or not a checkpoint"):
        load_resumable(stopped)
    assert not Path("was_here").exists()
    torch.load(stopped / "last.pt", weights_only=False)
    assert Path("was_here").exists()  # it is hostile indeed


@pytest.mark.parametrize("number", [FORMAT - 1, FORMAT + 1])
def test_another_format_says_which_version_it_needs(tmp_path, monkeypatch, number):
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "FORMAT", number)
        save_checkpoint(tmp_path / "last.pt", {"model": {}})
    message = f"has checkpoint format {number}, this version of the project reads format {FORMAT}"
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / "last.pt")


def test_a_file_of_another_program_is_refused(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "lightning.ckpt")
    with pytest.raises(CheckpointError, match="is not a checkpoint of this project"):
        load_checkpoint(tmp_path / "lightning.ckpt")


def test_a_run_is_not_resumed_from_weights_alone(stopped):
    (stopped / "previous.pt").unlink()
    shutil.copy(stopped / "best.pt", stopped / "last.pt")
    with pytest.raises(CheckpointError, match="holds weights only"):
        load_resumable(stopped)


def test_settings_of_another_version_are_named(stopped):
    content = load_checkpoint(stopped / "last.pt")
    content["config"]["number_of_wings"] = 2
    with pytest.raises(BadInput, match="number_of_wings"):
        config_of_checkpoint(content, stopped)


@slow
def test_what_a_killed_process_left_half_written_is_cleared_away(stopped, run):
    leftover = stopped / "last.pt.4711.tmp"
    leftover.write_bytes(b"half")
    assert run(*RESUME)[0] == 0
    assert not leftover.exists()


@slow
def test_missing_lines_of_metrics_are_reported_and_the_run_continues(stopped, run, undisturbed):
    cut(stopped / "metrics.jsonl", 0)
    code, output = run(*RESUME)
    assert code == 0
    assert "metrics.jsonl lacks" in output
    got, wanted = fingerprint(stopped), undisturbed(*SMALL)
    lines, wanted_lines = got.pop("metrics"), wanted["metrics"]
    assert lines == wanted_lines[-len(lines) :]
    assert got == {key: value for key, value in wanted.items() if key != "metrics"}


def test_a_damaged_best_gives_way_to_the_next_best(tmp_path, capsys):
    run = RunFolder(Config(run_dir=str(tmp_path)), ALONE, None)
    for epoch in range(3):
        content = {"model": {"weight": torch.full((1000,), epoch)}}
        save_checkpoint(tmp_path / f"epoch={epoch}.pt", content)
    link(tmp_path / "epoch=1.pt", tmp_path / "best.pt")
    ranking = [[0.1, 1], [0.2, 2], [0.3, 0]]
    assert run.load_best(ranking)["model"]["weight"][0] == 1
    flip(tmp_path / "best.pt", place_of_weights(tmp_path / "best.pt", "weight"))
    assert run.load_best(ranking)["model"]["weight"][0] == 2
    assert "best.pt is damaged" in capsys.readouterr().err


def test_the_best_epoch_and_best_are_one_file(stopped_run):
    assert (stopped_run / "best.pt").samefile(stopped_run / "epoch=0.pt")


def test_where_there_are_no_hard_links_a_copy_is_made(tmp_path, monkeypatch):
    def no_links(*arguments: object) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    (tmp_path / "a.pt").write_bytes(b"content")
    link(tmp_path / "a.pt", tmp_path / "b.pt")
    assert (tmp_path / "b.pt").read_bytes() == b"content"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.pt", "b.pt"]


def test_the_file_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    """The order that survives a power cut: content, then name, then folder."""
    done = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)

        def recorded(*arguments: object, name: str = name, original=original) -> None:
            done.append(name)
            original(*arguments)

        monkeypatch.setattr(os, name, recorded)
    save_checkpoint(tmp_path / "last.pt", {"model": {"weight": torch.zeros(3)}})
    assert done == ["fsync", "replace", "fsync"]
