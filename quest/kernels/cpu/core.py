"""The compiled core in `csrc`: a plain C library, built where there was a C++ compiler when the package was installed.

`QUEST_ISA` (portable, avx2, avx512vnni or amx) chooses another instruction set than the best of the machine.
"""

import ctypes
import os
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch  # noqa: F401 - loads the OpenMP runtime whose threads compute here as well


@cache
def core() -> ctypes.CDLL:
    """The compiled core. Raises OSError saying why there is none, and RuntimeError for one of older source."""
    folder = Path(__file__).parent
    found = [file for suffix in EXTENSION_SUFFIXES if (file := folder / f"_core{suffix}").is_file()]
    if not found:
        raise OSError(f"{folder} holds no compiled core: `pip install -e .` builds it where there is a C++ compiler")
    library = ctypes.CDLL(str(found[0]))
    i64, f32, pointer, c_int = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p, ctypes.c_int
    signatures = {
        "quest_isa": (ctypes.c_char_p, []),
        "quest_use": (c_int, [ctypes.c_char_p]),
        "quest_use_openmp": (None, [pointer]),
        "quest_packed_bytes": (i64, [i64] * 5),
        "quest_pack": (None, [pointer] * 3 + [i64] * 5 + [pointer]),
        "quest_unpack": (None, [pointer] * 2),
        "quest_linear": (c_int, [pointer, i64, i64, pointer, pointer, f32, f32, f32, c_int, pointer, pointer, c_int]),
        "quest_conv2d": (
            c_int,
            [pointer] + [i64] * 6 + [pointer, pointer, f32, f32, f32] + [i64] * 6 + [pointer, pointer, i64, i64, c_int],
        ),
        "quest_attention": (c_int, [pointer] * 4 + [i64] * 5 + [pointer, f32, pointer, c_int]),
        "quest_group_norm": (
            None,
            [pointer] + [i64] * 6 + [f32] + [pointer] * 4 + [c_int, pointer, c_int],
        ),
        "quest_fake_quantize": (None, [pointer, i64, f32, f32, f32, pointer, c_int]),
        "quest_fake_quantize_backward": (
            ctypes.c_double,
            [pointer, pointer, i64, f32, f32, f32, pointer, c_int],
        ),
        "quest_attention_block": (c_int, [pointer] * 3 + [i64] * 3 + [pointer] * 2 + [c_int]),
        "quest_transformer_block": (c_int, [pointer] * 3 + [i64] * 3 + [pointer, c_int]),
        "quest_resnet_block": (c_int, [pointer] * 2 + [i64] * 3 + [pointer] * 3 + [c_int]),
        "quest_time": (None, [pointer]),
        "quest_layer_norm": (None, [pointer, i64, i64, f32, pointer, pointer, pointer, c_int]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name, None)
        if function is None:
            raise RuntimeError(f"{found[0]} is older than its source: `pip install -e .` builds it anew")
        function.restype, function.argtypes = result, arguments
    if os.name == "posix" and (parallel := getattr(ctypes.CDLL(None), "GOMP_parallel", None)):
        library.quest_use_openmp(ctypes.cast(parallel, pointer))
    if isa := os.environ.get("QUEST_ISA"):
        use(isa, library)
    return library


def use(isa: str, library: ctypes.CDLL | None = None) -> None:
    """Compute with this instruction set from now on. Raises OSError where the machine lacks it."""
    library = library or core()
    if library.quest_use(isa.encode()):
        raise OSError(f"instruction set {isa!r}: unknown, or not of this machine (best: {best(library)})")


def best(library: ctypes.CDLL | None = None) -> str:
    """The instruction set in use: "portable", "avx2", "avx512vnni" or "amx"."""
    return (library or core()).quest_isa().decode()


@cache
def available() -> bool:
    """Whether there is a compiled core here."""
    try:
        core()
    except OSError:
        return False
    return True
