"""Loads the compiled core in `csrc`, a C library that the installation builds if there is a C++ compiler.

The environment variable `QUEST_ISA` (one of ISAS) chooses another instruction set than the best one of the machine.
"""

import ctypes
import hashlib
import os
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch  # loads the OpenMP runtime, whose threads the core uses too

from quest.kernels.cpu.core import abi

ISAS = ("portable", "neon", "avx2", "avxvnni", "avx512vnni", "amx")  # instruction sets, from the slowest to the fastest
# Results of functions other than 0 (`Status` in csrc/driver.h), and the errors that they stand for.
INVALID = 3
ERRORS = {1: ValueError, 2: ValueError, INVALID: ValueError, 4: MemoryError, 5: RuntimeError}


@cache
def core() -> ctypes.CDLL:
    """Return the compiled core.

    Raises OSError, which says why, if there is none, RuntimeError if it was built from older source, and ValueError if
    QUEST_ISA is not an instruction set of this machine.
    """
    folder = Path(__file__).parents[1]
    found = [file for suffix in EXTENSION_SUFFIXES if (file := folder / f"_core{suffix}").is_file()]
    if not found:
        raise OSError(f"{folder} holds no compiled core: `pip install -e .` builds it where there is a C++ compiler")
    library = ctypes.CDLL(str(found[0]))
    functions = abi.functions()
    for name, (result, arguments) in functions.items():
        if function := getattr(library, name, None):
            function.restype, function.argtypes = result, arguments
    if not hasattr(library, "quest_abi") or library.quest_abi().decode() != abi.digest():
        raise RuntimeError(f"{found[0]} is older than its source: `pip install -e .` builds it anew")
    if parallel := getattr(ctypes.CDLL(None), "GOMP_parallel", None):
        library.quest_use_openmp(ctypes.cast(parallel, ctypes.c_void_p))
    if isa := os.environ.get("QUEST_ISA"):
        try:
            use(isa, library)
        except ValueError as error:
            raise ValueError(f"QUEST_ISA: {error}") from None
    return library


def use(isa: str, library: ctypes.CDLL | None = None) -> None:
    """Compute with this instruction set from now on. Raises ValueError if this machine does not have it."""
    library = library or core()
    if isa not in ISAS:
        raise ValueError(f"{isa!r} is no instruction set; valid here: {', '.join(instruction_sets(library))}")
    if library.quest_use(isa.encode()):
        raise ValueError(f"this machine lacks {isa}; valid here: {', '.join(instruction_sets(library))}")


def instruction_sets(library: ctypes.CDLL | None = None) -> list[str]:
    """Return the instruction sets in ISAS that this machine has."""
    return (library or core()).quest_isas().decode().split(",")


def best() -> str:
    """Return the instruction set in use: the best one of this machine, unless another one was chosen."""
    return core().quest_isa().decode()


@cache
def _sha256(file: str) -> str:
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


def identity() -> dict:
    """Return what decides the last bits of results in this process: {sha256, abi, isa, torch}.

    sha256, abi and isa (instruction set) are those of the core; None if there is none. torch is the instruction set of
    torch. With other instruction sets, sums of floats have other bits.
    """
    torchs = torch.backends.cpu.get_cpu_capability()
    if not available():
        return {"sha256": None, "abi": None, "isa": None, "torch": torchs}
    return {"sha256": _sha256(core()._name), "abi": abi.digest(), "isa": best(), "torch": torchs}


def check(status: int, name: str, **inputs: torch.Tensor | None) -> None:
    """Raise the error for the `status` that a function of the core returned; do nothing for 0.

    name: what the function computed. inputs: its tensors by name, whose shapes the message states.
    """
    if not status:
        return
    shapes = ", ".join(f"{i} {list(t.shape)}" for i, t in inputs.items() if t is not None) if status == INVALID else ""
    raise ERRORS[status](f"{name}: {core().quest_message().decode()}" + (f" ({shapes})" if shapes else ""))


@cache
def available() -> bool:
    """Return whether there is a compiled core."""
    try:
        core()
    except OSError:
        return False
    return True
