"""Old names of methods go on working in configs, in `quest.quantize` and in `workflow.scripts.quantize`."""

import functools
import sys

RENAMED = {"quest": "quest-suite"}  # old name -> present one
PARTS = ("methods", "grid", "seeds", "ablations", "settle")  # of a config, in which methods are named
LISTED = ("methods", "rows")  # mappings whose keys are methods or rows
NAMING = ("method", "init", "of", "against", "families")  # keys whose values are


def current(name):
    """The present name of a method; anything else comes back as it is. One line on stderr says that a name is old."""
    if not isinstance(name, str) or name not in RENAMED:
        return name
    _notice(name)
    return RENAMED[name]


def with_current_names(config: dict) -> dict:
    """A config in which every old name of a method is replaced: as a row, in the grid, under `init` and elsewhere.

    Nothing else is checked. Raises ValueError where a mapping has a row under both names.
    """
    return config | {part: _replaced(config[part], part) for part in PARTS if part in config}


def _replaced(value, key):
    if isinstance(value, list):
        return [_replaced(one, key) for one in value]
    if not isinstance(value, dict):
        return current(value) if key in NAMING else value
    if key in LISTED and (twice := [old for old, new in RENAMED.items() if {old, new} <= value.keys()]):
        raise ValueError(
            f"{key}.{twice[0]}: the old name of {RENAMED[twice[0]]}, which stands beside it; leave one out"
        )
    inside = key if key in NAMING else None  # of families, whose pairs stand under names of their own
    return {current(name) if key in LISTED else name: _replaced(one, inside or name) for name, one in value.items()}


@functools.cache  # once in a process
def _notice(old: str) -> None:
    print(f"{old}: the method is called {RENAMED[old]} now; write the new name", file=sys.stderr)
