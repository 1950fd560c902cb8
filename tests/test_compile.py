"""--compile: the same training, and one line instead of a fault where there is no compiler."""

import shutil
from pathlib import Path

import pytest
import torch
from metrics import step_losses

from transformer_scratch.digits import Digits
from transformer_scratch.hardware import compile_model
from transformer_scratch.model import Transformer

FLAGS = ["--dim=16", "--num-layers=2", "--batch-size=16", "--num-datas=160", "--dropout=0.1"]


def is_compiled(module: torch.nn.Module) -> bool:
    return module._compiled_call_impl is not None


def test_without_a_compiler_the_model_runs_as_it_is_written(monkeypatch):
    def no_compiler(function):
        raise RuntimeError("no working compiler")

    model = Transformer(Digits().vocab_size, 16, 1, 2)
    monkeypatch.setattr(torch, "compile", no_compiler)
    reason = compile_model(model)
    assert reason.startswith("no: ") and "\n" not in reason
    assert not any(is_compiled(module) for module in model.modules())


def test_blocks_are_compiled_and_keep_their_names(monkeypatch):
    """So that checkpoints of a compiled run are those of any other."""
    model = Transformer(Digits().vocab_size, 16, 1, 2)
    names = list(model.state_dict())
    monkeypatch.setattr(torch, "compile", lambda function=None, **_: function)
    assert compile_model(model).startswith("yes")
    assert list(model.state_dict()) == names


@pytest.mark.slow
def test_no_compiler_on_the_path(script, tmp_path):
    environment = {
        "PATH": "/nonexistent",
        "CXX": "",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
    }
    done = script(
        "train.py", *FLAGS, "--max-epochs", "1", "--wandb", "disabled", "--compile", **environment
    )
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if "compile" in line]
    assert "no: no working compiler here" in line and "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_compiled_run_trains_alike_and_resumes_exactly(train, capsys):
    """Without a compiler this says nothing: then the runs are alike because none is compiled."""
    flags = [*FLAGS, "--accumulate", "2"]
    train(*flags, "--dropout", "0", "--max-epochs", "1", "--run-dir", "plain")
    train(*flags, "--dropout", "0", "--max-epochs", "1", "--run-dir", "compiled", "--compile")
    assert ("yes: torch.compile" in capsys.readouterr().out) == (shutil.which("g++") is not None)
    plain, compiled = Path("plain"), Path("compiled")
    assert step_losses(compiled) == pytest.approx(step_losses(plain), rel=1e-4)
    weights = [torch.load(run / "last.pt", weights_only=True)["model"] for run in (plain, compiled)]
    assert list(weights[0]) == list(weights[1])

    train(*flags, "--max-epochs", "2", "--run-dir", "whole", "--compile")
    train(*flags, "--max-epochs", "1", "--run-dir", "parts", "--compile")
    train("--resume", "parts", "--max-epochs", "2")
    assert step_losses(Path("parts")) == step_losses(Path("whole"))
    assert len(step_losses(Path("whole"))) == 2 * 5
