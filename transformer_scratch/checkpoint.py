"""Atomic, checksummed checkpoints: a file is whole, or it is not there.

A checkpoint is a dict of tensors and plain types: torch.load reads it with weights_only=True and
runs no code.
"""

import errno
import hashlib
import os
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from textwrap import shorten

import torch
from torch import Tensor

from transformer_scratch.errors import BadInput, TrainingFault
from transformer_scratch.output import warn_once

# What network file systems answer to a call that they do not have.
NOT_SUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)

FORMAT = 5  # 5: the fused optimizer in fp16 too, the GPU's name


class CheckpointError(BadInput):
    """The file is missing, damaged, not a checkpoint of this project, or of another format."""


def checksum(content: object) -> str:
    """SHA-256 over keys, types, shapes and values: torch.load alone accepts most flipped bits.

    All tensors must be on the CPU.
    """
    sha = hashlib.sha256()

    def add(value: object) -> None:
        if isinstance(value, Tensor):
            sha.update(f"{value.dtype} {tuple(value.shape)}".encode())
            sha.update(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
        elif isinstance(value, dict):
            sha.update(b"{")
            for key, item in value.items():
                add(key)
                add(item)
            sha.update(b"}")
        elif isinstance(value, list | tuple):
            sha.update(b"[")
            for item in value:
                add(item)
            sha.update(b"]")
        else:
            sha.update(f"{type(value).__name__} {value!r};".encode())

    add(content)
    return sha.hexdigest()


def on_cpu(content: object) -> object:
    """The content with all tensors copied to the CPU, so that it loads where there is no GPU."""
    if isinstance(content, Tensor):
        return content.detach().cpu()
    if isinstance(content, dict):
        return {key: on_cpu(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return type(content)(map(on_cpu, content))
    return content


def save_checkpoint(path: Path, content: dict, keep_old_as: Path | None = None) -> None:
    """Write under a temporary name, force to the disk, rename: there never is half a file.

    The file of that name from before becomes keep_old_as, once the new one is safe on the disk.
    Raises TrainingFault when the file cannot be written; what was there before stays.
    """
    content = on_cpu({"format": FORMAT, **content})
    content["checksum"] = checksum(content)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            force_to_disk(file.fileno())
        if keep_old_as and path.exists():
            link(path, keep_old_as)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # a full disk is a RuntimeError from torch.save
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise TrainingFault(
            f"{path} could not be written: {str(error).splitlines()[0]}. {what_to_do(path.parent)}"
        ) from error


def what_to_do(folder: Path) -> str:
    """What to do when a file could not be written there."""
    if not os.path.exists(folder):
        return "The folder is gone; where it has got another name, --resume it under that"
    free = f"{shutil.disk_usage(folder).free / 2**20:.1f} MiB are free on that disk"
    if not os.path.exists(folder / "last.pt"):
        return f"{free}. Make room and try again"
    return f"{free}. What was saved last is whole: make room and --resume"


def link(existing: Path, name: Path) -> None:
    """Give a file a second name, or a copy where the file system has no hard links."""
    temporary = name.with_name(f"{name.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(existing, temporary)
    except OSError:
        copy(existing, temporary)
    os.replace(temporary, name)
    sync_folder(name.parent)


def copy(existing: Path, name: Path) -> None:
    """A copy that is on the disk when this returns, or is not there."""
    try:
        shutil.copyfile(existing, name)
        with open(name, "rb") as file:
            force_to_disk(file.fileno())
    except OSError:
        name.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        force_to_disk(descriptor)
    finally:
        os.close(descriptor)


def force_to_disk(descriptor: int) -> None:
    """Return when a file or a folder is on the disk. A file system that cannot is warned of."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:
            raise
        warn_once(
            "fsync",
            f"this file system cannot force files to the disk ({error.strerror}); "
            "after a power cut the newest checkpoint may be missing",
        )


def load_checkpoint(path: Path) -> dict:
    """Read and check one file. Raises CheckpointError, naming it."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:  # nothing is wrong with the file: no other may take its place
        raise BadInput(f"{path} cannot be read: permission denied") from None
    except Exception as error:  # a flipped bit can raise almost anything in there
        raise CheckpointError(
            f"{path} is damaged or not a checkpoint ({type(error).__name__})"
        ) from error
    if not isinstance(content, dict) or "format" not in content:
        raise CheckpointError(f"{path} is not a checkpoint of this project")
    if content["format"] != FORMAT:
        raise CheckpointError(
            f"{path} has checkpoint format {content['format']}, this version of the project reads "
            f"format {FORMAT}: it needs the version that wrote it"
        )
    expected = content.pop("checksum", None)
    if checksum(content) != expected:
        raise CheckpointError(f"{path} is damaged: its content does not match its checksum")
    return content


def load_state(part: object, state: dict, path: Path) -> None:
    """Raises CheckpointError where the state is that of another model than the code now makes."""
    try:
        part.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(
            f"{path} was written by a program with another model: {shorten(str(error), 300)}"
        ) from None


def load_first_good(paths: list[Path]) -> tuple[dict, Path]:
    """The first file that is whole; those passed over are named on stderr.

    Raises CheckpointError when none is whole.
    """
    problems = []
    for path in paths:
        try:
            content = load_checkpoint(path)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        for problem in problems:
            print(f"warning: {problem}; using {path.name} instead", file=sys.stderr)
        return content, path
    raise CheckpointError("; ".join(problems) or "there is no checkpoint")


def load_resumable(folder: Path) -> dict:
    """The newest complete state of a run. Raises CheckpointError when there is none."""
    if folder.is_file():
        raise CheckpointError(f"--resume {folder} is a file; give the folder it lies in")
    if not folder.is_dir():
        raise CheckpointError(f"--resume {folder}: no such folder; give a run's, runs/<name>")
    if not (folder / "last.pt").exists() and not (folder / "previous.pt").exists():
        raise CheckpointError(
            f"--resume {folder}: there is no last.pt in it; give the folder of a run, runs/<name>"
        )
    content, path = load_first_good([folder / "last.pt", folder / "previous.pt"])
    if "optimizer" not in content:
        raise CheckpointError(f"{path} holds weights only; a run is resumed from a complete state")
    return {**content, "file": str(path)}
