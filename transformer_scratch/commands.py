"""The commands that a program tells its user to type next, in the folder where it was started."""

import os
import shutil
import sys
from pathlib import Path
from shlex import quote

PROJECT = Path(__file__).resolve().parents[1]
# What `python -m` calls where a program is not installed beside this Python.
MODULES = {"torchrun": "torch.distributed.run", "wandb": "wandb"}


def shell_command(program: str) -> str:
    """How to call python, torchrun or wandb of this environment: by name, or by path."""
    path = sys.executable
    if program != "python":
        path = os.path.join(os.path.dirname(path), program)
    name = os.path.basename(path)
    if shutil.which(name) == path:
        return name
    if os.path.exists(path):
        shown = shorter(path)
        return quote(shown if os.sep in shown else os.path.join(os.curdir, shown))
    return f"{shell_command('python')} -m {MODULES[program]}"


def python_command(script: str, world_size: int = 1) -> str:
    """How to start a script of this project, wherever the user is. Arguments may follow."""
    starter = shell_command("python")
    if world_size > 1:
        starter = f"{shell_command('torchrun')} --standalone --nproc-per-node {world_size}"
    return f"{starter} {path_argument(shorter(PROJECT / script))}"


def resume_command(run: Path, world_size: int) -> str:
    return f"{python_command('train.py', world_size)} --resume {path_argument(run)}"


def path_argument(path: str | Path) -> str:
    """A path as it is typed behind a flag, also where it begins like a flag or a home folder."""
    path = str(path)
    return quote(os.path.join(os.curdir, path) if path.startswith(("-", "~")) else path)


def shorter(path: str | Path) -> str:
    """The path as it is, or relative to the current folder."""
    return min(str(path), os.path.relpath(path), key=len)
