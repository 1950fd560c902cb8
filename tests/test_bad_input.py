"""Bad input: exit code 2, reason and remedy on stderr, no traceback, no folder left behind."""

import os
import pwd
import re
from pathlib import Path

import pytest
import torch
from conftest import TINY

import evaluate as evaluate_script
import train as train_script
from transformer_scratch.checkpoint import load_checkpoint, save_checkpoint


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The folder of a finished run of two epochs, which no test changes."""
    run = tmp_path_factory.mktemp("finished") / "run"
    train_script.main([*TINY, "--wandb", "disabled", "--run-dir", str(run)])
    return run


@pytest.fixture
def refused(capsys):
    """Give flags that cannot work to train.py or evaluate.py; -> what it says on stderr."""

    def run(*flags: object, main=train_script.main) -> str:
        before = sorted(Path().rglob("*"))
        with pytest.raises(SystemExit) as end:
            main([str(flag) for flag in flags])
        captured = capsys.readouterr()
        assert end.value.code == 2
        assert captured.err.strip() and "Traceback" not in captured.err
        assert sorted(Path().rglob("*")) == before, "a refused run leaves nothing"
        return " ".join(captured.err.split())

    return run


# ------------------------------------------------------------------------------ values of train.py


# Flags that take a number from 1 on.
COUNTS = [
    "--accumulate",
    "--batch-size",
    "--devices",
    "--dim",
    "--ffn-dim",
    "--log-every",
    "--max-epochs",
    "--num-categories",
    "--num-datas",
    "--num-heads",
    "--num-layers",
    "--save-top-k",
    "--seq-len",
]


@pytest.mark.parametrize("value", ["0", "-3"])
@pytest.mark.parametrize("flag", COUNTS)
def test_sizes_start_at_one(refused, flag, value):
    assert f"{flag} {value} must be 1 or more" in refused(flag, value)


@pytest.mark.parametrize(
    "flag, value, rule",
    [
        ("--dropout", "1", "at least 0 and below 1"),
        ("--dropout", "-0.1", "at least 0 and below 1"),
        ("--dropout", "nan", "at least 0 and below 1"),
        ("--holdout", "1.0", "at least 0 and below 1"),
        ("--holdout", "-0.2", "at least 0 and below 1"),
        ("--holdout", "nan", "at least 0 and below 1"),
        ("--lr", "0", "above 0"),
        ("--lr", "-0.001", "above 0"),
        ("--lr", "nan", "above 0"),
        ("--lr", "inf", "above 0"),
        ("--clip-norm", "-1", "0 (off) or more"),
        ("--clip-norm", "nan", "0 (off) or more"),
        ("--weight-decay", "-0.1", "0 (off) or more"),
        ("--warmup-steps", "-1", "0 (off) or more"),
        ("--num-workers", "-1", "0 (off) or more"),
        ("--save-every", "-1", "0 (off) or more"),
        ("--seed", "-1", "from 0 to"),
        ("--seed", str(2**32), "from 0 to"),
    ],
)
def test_values_outside_their_range(refused, flag, value, rule):
    message = refused(flag, value)
    assert flag in message and rule in message


@pytest.mark.parametrize("digits", [11, 31, 401])
@pytest.mark.parametrize(
    "flag", [*COUNTS, "--num-workers", "--save-every", "--seed", "--warmup-steps"]
)
def test_numbers_too_large_to_compute_with(refused, flag, digits):
    message = refused(flag, "1" + "0" * (digits - 1))
    assert f"{flag} " in message and "must be" in message


@pytest.mark.parametrize("flag", ["--clip-norm", "--lr", "--weight-decay"])
def test_numbers_too_large_for_a_float(refused, flag):
    assert f"{flag} inf must be" in refused(flag, "1" + "0" * 400)


def test_numbers_beyond_all_use_that_work_are_not_refused():
    """Never save, never log, keep all: as one writes it down."""
    flags = "--save-every 1000000000 --log-every 1000000000 --save-top-k 1000000000 --max-epochs 1"
    train_script.main([*TINY, "--wandb", "disabled", *flags.split()])


def test_a_model_that_does_not_fit_into_memory_is_no_bad_input(capsys):
    with pytest.raises(SystemExit) as end:
        train_script.main([*TINY, "--wandb", "disabled", "--dim", "1000000"])
    text = capsys.readouterr().err
    assert end.value.code == 1 and "out of memory" in text and "Traceback" not in text


@pytest.mark.parametrize(
    "flags, reason, remedy",
    [
        ("--dim 30 --num-heads 4", "not divisible by --num-heads 4", "1, 2, 3, 5, 6, 10, 15, 30"),
        ("--seq-len 11", "too short for 10 digits", "--seq-len 12 or more"),
        ("--num-categories 30 --seq-len 16", "too short for 30 digits", "--seq-len 32 or more"),
        ("--holdout 0.001", "validation and test need one each", "--holdout 0.02 or more"),
        ("--holdout 0.95", "would lack", "or less, or 0 to share all pairs"),
        ("--num-categories 1", "validation and test need one each", "0 to share all pairs"),
        ("--num-categories 3", "would lack", "give 0"),
        ("--batch-size 256 --num-datas 100", "larger than --num-datas 100", "smaller --batch-size"),
    ],
)
def test_values_that_do_not_fit_together(refused, flags, reason, remedy):
    message = refused(*flags.split())
    assert reason in message and remedy in message


@pytest.mark.parametrize(
    "flags, reason",
    [
        ("--no-such-flag 1", "no-such-flag"),
        ("--max-epoch 1", "max-epoch"),
        ("--accelerator tpu", "invalid choice"),
        ("--amp fp8", "invalid choice"),
        ("--wandb maybe", "invalid choice"),
        ("--dim wide", "wide"),
        ("--lr fast", "fast"),
        ("--dim 32.5", "32.5"),
        ("--dim", "dim"),
        ("stray", "stray"),
    ],
)
def test_flags_that_do_not_exist_or_cannot_be_read(refused, flags, reason):
    assert reason in refused(*flags.split())


@pytest.mark.parametrize("accelerator", ["gpu", "mps"])
def test_an_accelerator_that_is_not_there(refused, accelerator, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    message = refused("--accelerator", accelerator)
    assert f"--accelerator {accelerator}" in message and "--accelerator cpu works" in message


def test_a_gpu_that_is_there_and_cannot_be_used(refused, monkeypatch):
    """Its driver is too old, say; so it is with one that another program has for itself."""

    def no_driver(*device: object) -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old\nand more lines")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", no_driver)
    message = refused("--wandb", "disabled")
    assert "driver on your system is too old; --accelerator cpu works everywhere" in message


# ----------------------------------------------------------------------------------- environment


@pytest.mark.parametrize("value", ["", "x", "0", "-1", "1.5", ",2", "1" + "0" * 30])
def test_a_number_of_threads_that_is_none(refused, finished, monkeypatch, value):
    """PyTorch passes over it, and the start would say that it counts."""
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert f"OMP_NUM_THREADS={value!r} must be" in refused(*TINY)
    assert "OMP_NUM_THREADS" in refused("--run", finished, main=evaluate_script.main)


@pytest.mark.parametrize("value", ["1", " 2 ", "4,2"])
def test_numbers_of_threads_that_count(monkeypatch, capsys, value):
    """PyTorch reads them as it starts. In a notebook it has started long before."""
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    train_script.main([*TINY, "--wandb", "disabled", "--max-epochs", "1"])
    number = value.split(",")[0].strip()
    reason = "OMP_NUM_THREADS" if number == "1" else f"not the {value} of OMP_NUM_THREADS"
    assert f"threads      1 ({reason})\n" in capsys.readouterr().out


def test_a_project_of_wandb_that_it_would_refuse(refused, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "team/project")
    assert "WANDB_PROJECT 'team/project' must be a name" in refused(*TINY)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "variable"),
    [
        ("train.py", "TQDM_MININTERVAL"),
        ("train.py", "TQDM_NCOLS"),
        ("train.py", "TORCH_LOGS"),
        ("train.py", "TORCH_DISTRIBUTED_DEBUG"),
        ("evaluate.py", "TQDM_POSITION"),
        ("evaluate.py", "PYTORCH_JIT"),
    ],
)
def test_variables_that_pytorch_cannot_read(script, name, variable):
    """It reads them as it is imported, tqdm's too."""
    process = script(name, **{variable: "x"})
    assert process.returncode == 2 and len(process.stderr.splitlines()) == 1, process.stderr
    assert process.stderr.startswith("error: ") and variable in process.stderr


# --------------------------------------------------------------------------------------- folders


def test_a_run_folder_that_cannot_be_written(refused):
    Path("file").touch()
    assert "run folder cannot be" in refused(*TINY, "--run-dir", "file/run")
    assert "give another --run-dir" in refused(*TINY, "--run-dir", "/proc/run")
    assert "--run-dir file is not an empty folder" in refused(*TINY, "--run-dir", "file")


def test_a_runs_folder_that_is_a_file(refused):
    Path("runs").touch()
    assert "run folder cannot be" in refused(*TINY)


def test_a_run_folder_that_holds_something_else(refused):
    Path("mine").mkdir()
    Path("mine/notes.txt").touch()
    assert "--run-dir mine is not an empty folder" in refused(*TINY, "--run-dir", "mine")


def test_a_run_folder_that_holds_a_run(refused, finished):
    files = {file: file.stat().st_mtime_ns for file in finished.iterdir()}
    message = refused(*TINY, "--run-dir", finished)
    assert f"--run-dir {finished}" in message and f"--resume {finished}" in message
    assert {file: file.stat().st_mtime_ns for file in finished.iterdir()} == files


@pytest.mark.parametrize("flag", ["--run-dir", "--resume"])
def test_a_folder_without_a_name(refused, finished, monkeypatch, flag):
    """As from a variable that is not set; the current folder would be taken."""
    assert f"{flag} is empty" in refused(*TINY, flag, "")
    monkeypatch.chdir(finished)
    assert f"{flag} is empty" in refused(flag, "")


# ---------------------------------------------------------------------------- ~ is the home folder


@pytest.fixture
def home(monkeypatch) -> Path:
    """A home folder that is not the current one."""
    folder = Path("home").absolute()
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    return folder


def test_a_new_run_a_resumed_and_an_evaluated_one_in_the_home_folder(home, capsys):
    """Of `--run-dir=~/run` a shell leaves the ~ as it is."""
    train_script.main([*TINY, "--wandb", "disabled", "--run-dir=~/my/run"])
    assert (home / "my/run/last.pt").exists() and list(Path().iterdir()) == [Path("home")]
    assert load_checkpoint(home / "my/run/last.pt")["config"]["run_dir"] == str(home / "my/run")
    flags = ["--max-epochs", "3", "--wandb", "disabled"]
    train_script.main(["--resume=~/my/run", "--run-dir=~/my/run", *flags])
    assert load_checkpoint(home / "my/run/last.pt")["epoch"] == 3
    evaluate_script.main(["--run=~/my/run", "--no-pictures"])
    assert f"{home}/my/run/evaluation.json" in capsys.readouterr().out


def test_another_users_home_folder(refused):
    user = pwd.getpwuid(os.getuid())
    message = refused("--resume", f"~{user.pw_name}/no/such/run")
    assert f"--resume {user.pw_dir}/no/such/run: no such folder" in message


@pytest.mark.parametrize("flag", ["--run-dir", "--resume"])
def test_a_home_folder_that_does_not_exist(refused, flag):
    message = refused(*TINY, f"{flag}=~nobody-of-that-name/run")
    assert f"{flag} ~nobody-of-that-name/run: there is no such home folder" in message


def test_a_folder_whose_name_begins_so(finished):
    train_script.main([*TINY, "--wandb", "disabled", "--max-epochs", "1", "--run-dir", "./~"])
    assert Path("~/last.pt").exists()


def test_a_run_that_was_named_so_before(home, finished):
    """When the ~ was still taken for a name, its own settings say ~/run."""
    content = load_checkpoint(finished / "last.pt")
    content["config"]["run_dir"] = "~/run"
    Path("~/run").mkdir(parents=True)
    save_checkpoint(Path("~/run/last.pt"), content)
    train_script.main(["--resume", "./~/run", "--max-epochs", "3"])
    assert load_checkpoint(Path("~/run/last.pt"))["epoch"] == 3


# --------------------------------------------------------- checkpoints that are not there or ours


@pytest.fixture
def strangers() -> list[Path]:
    """Folders that are not runs: missing, empty, and with foreign files under our names."""
    strange = [Path(name) for name in ("missing", "empty", "nothing", "text", "theirs", "list")]
    for folder in strange[1:]:
        folder.mkdir()
    contents = {"nothing": b"", "text": b"no checkpoint at all"}
    for folder, content in contents.items():
        (Path(folder) / "last.pt").write_bytes(content)
        (Path(folder) / "best.pt").write_bytes(content)
    for folder, content in {"theirs": torch.nn.Linear(1, 1).state_dict(), "list": [1, 2]}.items():
        torch.save(content, Path(folder) / "last.pt")
        torch.save(content, Path(folder) / "best.pt")
    return strange


def test_resume_from_what_is_no_run(refused, strangers):
    for folder in strangers:
        message = refused("--resume", folder)
        assert str(folder) in message
    assert "no such folder" in refused("--resume", "missing")
    assert "there is no last.pt in it" in refused("--resume", "empty")
    assert "is a file; give the folder it lies in" in refused("--resume", "text/last.pt")
    assert "cannot be read: File name too long" in refused("--resume", "long" * 100)


def test_resume_from_weights_alone(refused):
    Path("weights").mkdir()
    save_checkpoint(Path("weights/last.pt"), {"model": {}, "config": {}, "epoch": 0, "step": 0})
    assert "weights only" in refused("--resume", "weights")


def test_evaluate_what_is_no_run(refused, strangers):
    for folder in strangers:
        for checkpoint in ("best", "last"):
            flags = ["--run", folder, "--checkpoint", checkpoint]
            assert str(folder) in refused(*flags, main=evaluate_script.main)
    files = [f"{folder}/best.pt" for folder in ("text", "nothing", "theirs", "list")]
    for file in ["missing.pt", "empty", *files]:
        assert file in refused("--checkpoint", file, main=evaluate_script.main)


def test_evaluate_without_any_run(refused):
    assert re.search(r"python \S*train.py", refused(main=evaluate_script.main))


@pytest.mark.parametrize(
    "pair, reason",
    [
        ("8", "--pair takes two digits"),
        ("8 10", "0 to 9"),
        ("-1 4", "0 to 9"),
        ("a b", "pair"),
        ("1 2 3", "--pair takes two digits"),
        ("1.5 2", "1.5"),
    ],
)
def test_pairs_that_are_not_pairs(refused, finished, pair, reason):
    flags = ["--run", finished, "--pair", *pair.split()]
    assert reason in refused(*flags, main=evaluate_script.main)


@pytest.mark.parametrize(
    "flags", ["--dim 32", "--lr 0.5", "--seed 1", "--holdout 0", "--batch-size 8", "--amp bf16"]
)
def test_a_resumed_run_keeps_its_settings(refused, finished, flags):
    message = refused("--resume", finished, *flags.split())
    assert all(word in message for word in flags.split() if word.startswith("--"))
    assert "cannot change" in message and "--max-epochs" in message


def test_a_run_of_a_gpu_is_resumed_only_where_there_is_one(refused, finished):
    content = load_checkpoint(finished / "last.pt")
    content["config"]["accelerator"] = "gpu"
    Path("run").mkdir()
    save_checkpoint(Path("run/last.pt"), content)
    message = refused("--resume", "run", "--max-epochs", 3)
    assert "run was trained so" in message and "--accelerator gpu" in message


def test_fewer_epochs_than_done(refused, finished):
    message = refused("--resume", finished, "--max-epochs", 1)
    assert "--max-epochs 1, but the run has done 2" in message


# ---------------------------------------------------------------- through the real command line


def test_the_scripts_exit_with_2(script):
    process = script("evaluate.py", "--run", "missing")
    assert process.returncode == 2 and process.stdout == ""
    assert (
        process.stderr.startswith("error: --run missing") and len(process.stderr.splitlines()) == 1
    )
    assert not list(Path().iterdir())
