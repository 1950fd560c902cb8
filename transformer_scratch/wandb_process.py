"""The process in which W&B talks to its server: how to start it, and how not to wait for it."""

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import wandb

from transformer_scratch.run_folder import RunFolder


class Service:
    """W&B's process, unless another program has started it: that one is left alone.

    wandb itself ends it only when everything is uploaded, and has no public way to stop waiting.
    """

    def __init__(self, run: RunFolder):
        self.is_ours = "WANDB_SERVICE" not in os.environ
        self.hooks = sys.exit, sys.excepthook  # which wandb replaces
        self.process: subprocess.Popen | None = None
        self.files: str | None = None  # the folder of an online run's files
        # W&B keeps copies of artifacts: in the run's folder, rather than in the user's home.
        # An absolute path, as its process may have been started in another folder.
        self.variables = {"WANDB_DATA_DIR", "WANDB_CACHE_DIR"} - os.environ.keys()
        for variable in self.variables:
            os.environ[variable] = str(run.path.absolute() / "wandb")

    def start(self) -> None:
        connection = wandb.setup().ensure_service()
        self.process = connection._proc._process if self.is_ours else None

    def end(self, exit_code: int) -> bool:
        """Finish the run, and wait for the uploads. -> whether everything has arrived."""
        wandb.finish(exit_code)
        if self.is_ours:
            wandb.teardown(exit_code)
        if self.files and self.was_refused():
            return False
        if self.files:
            for file in Path(self.files).glob("*.wandb"):
                synced(file).touch()
        return True

    def was_refused(self) -> bool:
        """Whether the server has refused something for good: only W&B's log says so."""
        log = Path(self.files, "logs", "debug-internal.log").read_text(encoding="utf-8")
        return '"api: HTTP error"' in log

    def kill(self) -> None:
        """End it at once; what was given to it lies on the disk."""
        if self.process:
            self.process.kill()
            self.process.wait()
            with suppress(Exception):  # it is gone, as wandb will complain
                wandb.teardown()

    def give_back(self) -> None:
        """Undo what wandb and start() have changed in this process."""
        if self.is_ours:
            sys.exit, sys.excepthook = self.hooks
            os.environ.pop("WANDB_SERVICE", None)
        for variable in self.variables:
            os.environ.pop(variable, None)


def synced(file: Path) -> Path:
    """The empty file by which W&B knows what it need not upload again."""
    return file.with_name(f"{file.name}.synced")
