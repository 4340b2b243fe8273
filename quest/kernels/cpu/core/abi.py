"""Makes ctypes signatures and structs from `../csrc/abi.h`, which declares the C functions of the compiled core.

The header is their only description. `setup.py` compiles its hash into the core, and `core` compares the hash when it
loads the core.
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
    """Return the header without comments and line breaks."""
    return " ".join(re.sub(r"//.*", "", HEADER.read_text(encoding="utf-8")).split())


def digest() -> str:
    """Return a hash that changes if a declaration changes, and only then."""
    return hashlib.sha256(declarations().encode()).hexdigest()[:16]


def functions() -> dict[str, tuple[type | None, list[type]]]:
    """Return the types of result and arguments of each function by its name."""
    found = re.findall(r"([\w: ]+?\*?) (quest_\w+)\(([^)]*)\);", declarations())
    return {
        name: (_type(result), [_type(a.rpartition(" ")[0]) for a in arguments.split(", ") if a])
        for result, name, arguments in found
    }


def structs() -> dict[str, type[ctypes.Structure]]:
    """Return each struct by its name."""
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
    """Return the ctypes type for a type in C; pointers but strings are addresses."""
    declared = declared.strip()
    return TYPES[declared] if declared in TYPES or not declared.endswith("*") else ctypes.c_void_p


if __name__ == "__main__":
    print(digest())
