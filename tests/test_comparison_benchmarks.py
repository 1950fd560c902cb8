"""The benchmarks that race against Lightning run and print their tables. Nothing here is timed."""

import itertools

import pytest

from benchmarks import overhead, programs, startup, throughput
from comparison import speed

pytestmark = pytest.mark.comparison


def test_overhead_prints_its_table(tmp_path, capsys):
    overhead.main(["--quick", "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    assert all(f"| {name} |" in printed for name in ("train.py, all of it", "Lightning, barebones", "the model alone"))
    assert (tmp_path / "overhead.json").exists() and (tmp_path / "overhead.png").exists()


def test_throughput_against_the_twin(tmp_path, capsys, monkeypatch):
    for others in ("waterfall", "against_torch"):
        monkeypatch.setattr(throughput, others, lambda *_: {"the article's way": lambda: None})
    monkeypatch.setattr(throughput, "rows_of", lambda timings, *_: [{"ways": ", ".join(timings)}])
    throughput.main(["--quick", "--lightning", "--output", str(tmp_path)])
    assert "| Lightning twin, train.py |" in capsys.readouterr().out


@pytest.mark.slow
def test_a_start_of_the_twin():
    stages = startup.start("lightning", ["--dim", "16", "--num-layers", "1", "--wandb", "disabled"])["stages"]
    assert {"import pytorch_lightning", "first step"} <= set(stages) and min(stages.values()) >= 0


@pytest.mark.parametrize("program", [programs.run_train, programs.run_lightning, programs.run_barebones_lightning])
def test_a_program_is_timed_for_as_many_updates_as_asked(program, monkeypatch):
    """By a clock that counts instead of running: every update makes one tick, and nothing else does."""
    monkeypatch.setattr(programs.time, "perf_counter", itertools.count().__next__)
    seconds = programs.update_seconds(program, ["--dim", "16", "--num-layers", "1", "--batch-size", "8"], updates=4)
    assert len(seconds) == 4


def test_the_speed_is_compared_within_each_round(monkeypatch):
    """A machine that becomes ten times slower in the middle of a round changes that round alone, not the result."""
    calls, turns = itertools.count(), []

    def measure(folder, side, flags):
        turns.append(side)
        slowness = 10 if next(calls) >= 5 else 1
        return {
            "step_ms": slowness * (2 if side == "plain" else 3),
            "around_us": slowness * (1 if side == "plain" else 5),
        }

    monkeypatch.setattr(speed, "measure", measure)
    found = speed.compare_speed([], rounds=5)
    assert found["step_ms"][2] == 1.5 and found["around_us"][2] == 5
    assert turns == ["plain", "unrecorded", "unrecorded", "plain"] * 2 + ["plain", "unrecorded"]
