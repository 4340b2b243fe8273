"""One argument parser for all scripts, with the arguments that several of them share."""

import argparse
import atexit
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path


@cache
def may_lose_reader() -> None:
    """Let this program end without a traceback when the reader of its output has gone, as `head` goes.

    Such an error comes from a `print`, or from the last flush after the program has ended.
    """

    def hook(kind, error, trace):
        if not (issubclass(kind, BrokenPipeError) and reader_is_gone("\n")):
            sys.__excepthook__(kind, error, trace)

    sys.excepthook = hook
    atexit.register(reader_is_gone)


def reader_is_gone(more: str = "") -> bool:
    """Write what waits for the standard output, and `more`; if its reader has gone, throw away that and what follows.

    Nothing need wait after an error, and writing nothing does not ask whether there is a reader. Without a standard
    output there is no reader either who could go. Of a full disk, Python itself tells at the end.
    """
    if sys.stdout is None:
        return False
    try:
        sys.stdout.write(more)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    except (OSError, ValueError):  # a full disk; a closed file
        pass
    return False


def whole(text: str) -> int:
    """Parse a whole number of at least 1. Raises ArgumentTypeError otherwise."""
    if not (text.isdecimal() and text.isascii() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


OUTPUT = ("-o", "--output", "--out")
SHARED = {  # name: flags, settings
    "model": (["model"], {"help": "a name in quest.diffusion.models.MODELS"}),
    "method": (["method"], {"help": "a name in baselines.METHODS"}),
    "bits": (["bits"], {"help": "weight and activation bits, e.g. w4a4"}),
    "metrics": (["metrics"], {"type": Path, "nargs": "+", "help": "metrics.json of cells"}),
    "calibration": (["--calibration"], {"type": Path, "required": True, "help": "full-precision trajectories"}),
    "evaluation": (["--evaluation"], {"type": Path, "required": True, "help": "held-out trajectories"}),
    "file": (OUTPUT, {"type": Path, "required": True, "help": "file to write"}),
    "folder": (OUTPUT, {"type": Path, "required": True, "help": "folder to write into"}),
    "threads": (["--threads"], {"type": whole, "default": 1, "help": "(default %(default)s)"}),
    "device": (["--device"], {"default": "cpu", "help": "(default %(default)s)"}),
}


def parser(description: str, *shared: str) -> argparse.ArgumentParser:
    """A parser with the arguments of SHARED that `shared` names; "file" and "folder" are both --output."""
    may_lose_reader()
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in shared:
        flags, settings = SHARED[name]
        result.add_argument(*flags, **settings)
    return result


@contextmanager
def imports() -> Iterator[None]:
    """Import large packages inside: without garbage collection, which takes a fifth of their time and finds nothing.

    What they made is never looked at again. In a process that has torch already, nothing changes: such a process has
    garbage of its own, which would be kept.
    """
    if "torch" in sys.modules:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
