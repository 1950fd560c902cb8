"""The benchmarks that race against Lightning run and print their tables. Nothing here is timed."""

import itertools

import pytest
import torch
from torch.optim.optimizer import _global_optimizer_post_hooks

from benchmarks import overhead, programs, startup, throughput
from comparison import measured

pytestmark = pytest.mark.comparison


def test_overhead_prints_its_table(tmp_path, capsys):
    overhead.main(["--quick", "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    assert all(f"| {name} |" in printed for name in overhead.PROGRAMS)
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
    costs = {programs.run_train: 2.0, programs.run_lightning: 3.0, programs.run_barebones_lightning: 2.5}

    def update_seconds(program, flags, updates, wandb_mode):
        turns.append(program)
        return [costs[program] * (10 if next(calls) >= 10 else 1)] * updates

    monkeypatch.setitem(overhead.ROUNDS, "paper", 5)
    monkeypatch.setattr(overhead, "update_seconds", update_seconds)
    monkeypatch.setattr(overhead, "around_the_model", lambda *_: 1.0)
    steps, _ = overhead.measure("paper", quick=False, threads=1)
    ours, twins = steps["train.py"], steps["Lightning, the twin"]
    assert overhead.ratio(twins, ours).median == 1.5 != twins.median / ours.median
    rounds = [turns[i : i + 3] for i in range(0, len(turns), 3)]
    assert all(a == b[::-1] for a, b in itertools.pairwise(rounds)), "A B C, then C B A"


def test_the_stopwatch_leaves_everything_as_it_was():
    timed = [*measured.SHARED, (torch.Tensor, "backward"), (torch.optim.AdamW, "step")]
    before, hooks = [getattr(owner, name) for owner, name in timed], len(_global_optimizer_post_hooks)
    with measured.Stopwatch().running():
        assert all(getattr(owner, name) is not b for (owner, name), b in zip(timed, before, strict=True))
    assert [getattr(owner, name) for owner, name in timed] == before
    assert len(_global_optimizer_post_hooks) == hooks


def test_an_optimizer_that_grows_slower_is_not_taken_for_the_loop(monkeypatch):
    """Once an AdamW has been made in a process, PyTorch calls the hooks of a step before its time is up."""
    clock = itertools.count()
    monkeypatch.setattr(measured.time, "perf_counter", lambda: float(next(clock)))
    parameter = torch.nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.AdamW([parameter])
    watch = measured.Stopwatch()

    def take_longer_each_time(*_: object) -> None:
        for _ in range(100 * len(watch.readings)):
            next(clock)

    optimizer.register_step_pre_hook(take_longer_each_time)
    with watch.running():
        for _ in range(20):
            parameter.grad = torch.ones(())
            optimizer.step()
    assert 0 < watch.results(log_every=1)["around_us"] / 1e6 < 10
