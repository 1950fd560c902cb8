"""Imports matplotlib whatever its user has set: a backend, a matplotlibrc, a home folder or none.

It reads all of that as it is imported, and some of it makes the import fail. So this module comes
before matplotlib, and before a library that imports it.
"""

import importlib
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress

VARIABLES = ("MPLBACKEND", "MATPLOTLIBRC", "MPLCONFIGDIR")


def import_matplotlib() -> None:
    """Afterwards the environment and, where it can be used, the backend are the user's again.

    Where matplotlib cannot be imported at all, the next import says why.
    """
    before = {name: os.environ.get(name) for name in VARIABLES}
    log = logging.getLogger("matplotlib")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns of settings that our pictures do not use
    os.environ.pop("MPLBACKEND", None)
    try:
        import_parts()
    except Exception:  # there is no home folder, or a matplotlibrc is not UTF-8
        for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
            del sys.modules[name]  # imported by half
        with suppress(Exception), in_empty_folder() as folder:
            os.environ.pop("MATPLOTLIBRC", None)
            os.environ["MPLCONFIGDIR"] = folder
            import_parts()
    finally:
        log.setLevel(level)
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
    if before["MPLBACKEND"]:  # as matplotlib would have done: a notebook shows its pictures with it
        with suppress(Exception):
            sys.modules["matplotlib"].rcParams["backend"] = before["MPLBACKEND"]


def import_parts() -> None:
    """Those that read the user's files."""
    importlib.import_module("matplotlib.figure")
    importlib.import_module("matplotlib.style")


@contextmanager
def in_empty_folder() -> Iterator[str]:
    """The current folder may hold a matplotlibrc, too."""
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield folder
        finally:
            os.chdir(before)


if "matplotlib" not in sys.modules:
    import_matplotlib()
