"""The C functions of the compiled core as `../csrc/abi.h` declares them: what ctypes must know of them, and their hash.

The header is the only description. `setup.py` compiles its hash into the core, and `core` compares it when loading.
"""

import ctypes
import hashlib
import re
from pathlib import Path

HEADER = Path(__file__).parents[1] / "csrc" / "abi.h"
TYPES = {
    "void": None,
    "int": ctypes.c_int,
    "int64_t": ctypes.c_int64,
    "float": ctypes.c_float,
    "const char*": ctypes.c_char_p,
}


def declarations() -> str:
    """The header without comments and line breaks."""
    return " ".join(re.sub(r"//.*", "", HEADER.read_text(encoding="utf-8")).split())


def digest() -> str:
    """Changes with every declaration, and with nothing else."""
    return hashlib.sha256(declarations().encode()).hexdigest()[:16]


def functions() -> dict[str, tuple[type | None, list[type]]]:
    """Result and arguments of each function by its name."""
    found = re.findall(r"([\w: ]+?\*?) (quest_\w+)\(([^)]*)\);", declarations())
    return {
        name: (_type(result), [_type(a.rpartition(" ")[0]) for a in arguments.split(", ") if a])
        for result, name, arguments in found
    }


def structs() -> dict[str, type[ctypes.Structure]]:
    """Each struct by its name."""
    made: dict[str, type[ctypes.Structure]] = {}
    for name, body in re.findall(r"struct (\w+) \{([^}]*)\};", declarations()):
        fields = []
        for declared in body.split(";"):
            if match := re.fullmatch(r"(.+) (\w+)(?:\[(\d+)\])?", declared.strip()):
                kind, field, length = match.groups()
                kind = made.get(kind) or _type(kind)
                fields.append((field, kind * int(length) if length else kind))
        made[name] = type(name, (ctypes.Structure,), {"_fields_": fields})
    return made


def _type(declared: str) -> type | None:
    declared = declared.strip()
    return TYPES[declared] if declared in TYPES or not declared.endswith("*") else ctypes.c_void_p


if __name__ == "__main__":
    print(digest())
