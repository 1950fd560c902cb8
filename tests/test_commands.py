"""The commands that the programs print work where they are printed."""

import os
import shlex
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from conftest import PROJECT, TINY

import evaluate as evaluate_script
import train as train_script
from transformer_scratch import commands
from transformer_scratch.config import Config, parse

# --------------------------------------------------------------------- python, torchrun and wandb


def make_program(path: str) -> str:
    file = Path(path).absolute()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch(0o755)
    return str(file)


@pytest.fixture
def python_at(monkeypatch):
    """Pretend that python is this file, and that PATH is this folder. -> the file."""

    def pretend(path: str, search: str) -> str:
        file = make_program(path)
        monkeypatch.setattr(sys, "executable", file)
        monkeypatch.setenv("PATH", str(Path(search).absolute()))
        return file

    return pretend


def started_by(command: str) -> str:
    """The program that a shell starts."""
    return os.path.abspath(shutil.which(shlex.split(command)[0]))


@pytest.mark.parametrize("name", ["python", "python3"])
def test_python_is_called_by_name_where_the_shell_finds_it(python_at, name):
    python_at(f"env/bin/{name}", "env/bin")
    assert commands.shell_command("python") == name


@pytest.mark.parametrize("path", ["env/bin/python", "my env/bin/python", "it's/$HOME", "python3"])
def test_otherwise_by_its_path(python_at, path):
    make_program("other/python")
    python = python_at(path, "other")
    assert started_by(commands.shell_command("python")) == python


@pytest.mark.parametrize("name", ["torchrun", "wandb"])
def test_a_program_that_is_not_beside_python_is_called_through_it(python_at, name):
    make_program(f"other/{name}")  # of another Python
    python = python_at("my env/python", "other")
    command = commands.shell_command(name)
    assert started_by(command) == python and shlex.split(command)[1] == "-m"
    beside = make_program(f"my env/{name}")
    assert started_by(commands.shell_command(name)) == beside


# ------------------------------------------------------------------------ scripts and run folders


@pytest.mark.parametrize("folder", [".", "my project", "-project", "~", "it's"])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_script_is_named_by_a_path_that_leads_to_it(monkeypatch, folder, processes):
    monkeypatch.setattr(commands, "PROJECT", Path(folder).absolute())
    script = Path(folder, "train.py").absolute()
    Path("else/where").mkdir(parents=True)
    for current in (Path(), Path(folder), Path("else/where")):
        current.mkdir(exist_ok=True)
        with monkeypatch.context() as here:
            here.chdir(current)
            words = shlex.split(commands.python_command("train.py", processes))
            assert os.path.abspath(words[-1]) == str(script)
            assert words[-1][0] not in "-~" and len(words[-1]) <= len(str(script))
            assert ("--nproc-per-node" in words) == (processes == 2)


@pytest.mark.parametrize("folder", ["runs/a", "my run", "-run", "--help", "~", "~root", "it's"])
def test_a_run_folder_is_read_as_it_was_meant(folder):
    command = commands.resume_command(Path(folder), 1)
    flags = shlex.split(command.split("train.py")[1])
    assert os.path.abspath(parse(flags, Config()).resume) == os.path.abspath(folder)


# --------------------------------------------------------------------- what the programs print


def flags_of(text: str, script: str) -> list[str]:
    """What stands behind our script in a printed command; the script is found from here."""
    words = shlex.split(next(line for line in text.splitlines() if script in line))
    (index,) = [index for index, word in enumerate(words) if word.endswith(script)]
    assert Path(words[index]).resolve() == PROJECT / script
    assert shutil.which(words[index - 1]), "python"
    return words[index + 1 :]


def test_the_commands_of_a_finished_run(capsys):
    flags = [*TINY, "--wandb", "disabled", "--max-epochs", "1"]
    train_script.main([*flags, "--run-dir", "./-my run"])
    evaluate_script.main([*flags_of(capsys.readouterr().out, "evaluate.py"), "--no-pictures"])
    assert Path("-my run/evaluation.json").exists()
    train_script.main(["--resume", "./-my run"])
    text = capsys.readouterr().out
    assert flags_of(text, "train.py") == ["--resume", "./-my run", "--max-epochs", "2"]


def test_several_devices_without_torchrun_print_the_command_to_type(monkeypatch, capsys):
    """Also to a notebook, which has other words on its command line."""
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    flags = ["--devices", "2", "--wandb-project", "my project"]
    with pytest.raises(SystemExit) as end:
        train_script.main(flags)
    text = capsys.readouterr().err
    assert end.value.code == 2 and "torchrun --standalone --nproc-per-node 2 " in text
    words = shlex.split(text.split("here: ")[1])
    assert Path(words[-5]).resolve() == PROJECT / "train.py" and words[-4:] == flags
    assert shutil.which(words[0]) and not Path("runs").exists()


def test_where_there_is_no_run_the_command_that_trains_one(capsys):
    with pytest.raises(SystemExit):
        evaluate_script.main([])
    assert flags_of(capsys.readouterr().err, "train.py") == []


@pytest.mark.slow
def test_typed_into_a_shell_in_another_folder_by_a_python_in_a_path_with_a_space():
    project, python = Path("my project"), Path("my env/bin/python")
    for name in ("train.py", "evaluate.py", "transformer_scratch"):
        copy = shutil.copytree if (PROJECT / name).is_dir() else shutil.copy2
        project.mkdir(exist_ok=True)
        copy(PROJECT / name, project / name)
    venv.create("my env", symlinks=True, with_pip=False)
    (packages,) = Path("my env").glob("lib/python*/site-packages")
    installed = [entry for entry in sys.path if entry.endswith("site-packages")]
    (packages / "installed.pth").write_text("\n".join(installed), encoding="utf-8")
    Path("link.py").symlink_to(project / "train.py")
    Path("here").mkdir()

    def shell(command: str) -> str:
        done = subprocess.run(
            command, shell=True, cwd="here", capture_output=True, encoding="utf-8"
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    whole = str(project.absolute() / "train.py")
    for number, script in enumerate(("../my project/train.py", "../link.py", whole)):
        flags = [*TINY, "--wandb", "disabled", "--run-dir", f"run {number}"]
        output = shell(shlex.join([str(python.absolute()), str(script), *flags]))
        (line,) = [line for line in output.splitlines() if line.startswith("next ")]
        shell(line.removeprefix("next ") + " --no-pictures")
        assert Path(f"here/run {number}/evaluation.json").exists()
