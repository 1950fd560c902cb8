"""The commands that a program tells its user to type next."""

import os
import shutil
import sys
from pathlib import Path
from shlex import quote


def shell_command(program: str) -> str:
    """How to call a program of this Python's environment: by name, or by path where need be."""
    path = os.path.join(os.path.dirname(sys.executable), program)
    in_environment = sys.prefix != sys.base_prefix
    if not in_environment or shutil.which(program) == path:  # none, or an activated one
        return program
    return quote(min(path, os.path.relpath(path), key=len))


def resume_command(run: Path, world_size: int) -> str:
    starter = shell_command("python")
    if world_size > 1:
        starter = f"{shell_command('torchrun')} --standalone --nproc-per-node {world_size}"
    return f"{starter} train.py --resume {quote(str(run))}"
