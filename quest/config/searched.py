"""The part `search` of a config: which recipes are tried of each row. Imports nothing heavy."""

import math
import random
from collections.abc import Iterator

from quest.config import FULL_PRECISION, ConfigError, Run, parse_bits, recipe_of, start_of
from quest.config.schema import check_against, one_of, schema_validators, weights_only


def trials(config: dict, row: str) -> list[dict]:
    """The keywords that each trial of a row changes in its recipe: {} first, then combinations drawn at random.

    Every keyword goes through its values in random order, all of them before any again (a Latin hypercube). The draws
    depend on the name of the row only, so every model has the same, and more trials go on with them.
    """
    block = config["search"]
    space = block["methods"][row]
    wanted = min(block["trials"], math.prod(len(values) for values in space.values()))
    draws, orders = random.Random(row), {name: [] for name in space}
    found: list[dict] = [{}]
    while len(found) < wanted:
        chosen = {}
        for name, values in space.items():
            orders[name] = orders[name] or draws.sample(range(len(values)), len(values))
            if place := orders[name].pop():
                chosen[name] = values[place]
        found += [chosen] if chosen not in found else []
    return found


def with_changes(config: dict, row: str, changes: dict) -> dict:
    """The config with another recipe of a row; null leaves a keyword out."""
    recipe = {name: v for name, v in (config["methods"][row] | changes).items() if v is not None}
    return config | {"methods": config["methods"] | {row: recipe}}


def settings(config: dict, model: str, row: str) -> dict:
    """What the config says of a model, of a row and of those that it starts from. Other settings, other trials."""
    found, name = {}, row
    while name:
        found[name] = config["methods"][name]
        name = found[name].get("init")
    return {"models": {model: config["models"][model]}, "methods": found}


def cell(config: dict, model: str, row: str, seed: int) -> Run:
    """The run that a trial stands for, which has the calibration set and the starting point of its seed."""
    bits = config["search"]["bits"]
    if recipe_of(config, row)[0] in weights_only():
        bits = f"w{parse_bits(bits)[0]}a32"
    return Run(model, f"{row}@{seed}" if seed else row, bits)


def variants(config: dict) -> Iterator[tuple[dict, Run]]:
    """For each value that is tried, and each trial, on each model: the config with it, and the run."""
    for row, space in config["search"]["methods"].items():
        for changes in [*({name: v} for name, values in space.items() for v in values), *trials(config, row)]:
            changed = with_changes(config, row, changes)
            yield from ((changed, cell(config, model, row, 0)) for model in config["models"])


def starts(config: dict) -> list[Run]:
    """The checkpoints from which trials start, of seed 0 and of the seeds that confirm."""
    found = []
    for changed, run in variants(config):
        for seed in (0, *config["search"]["seeds"]):
            start = start_of(changed, cell(config, run.model, run.method, seed))
            found += [start] if start else []
    return list(dict.fromkeys(found))


def check(config: dict) -> None:
    """Raise ConfigError for the first row that is unknown, or value that its keyword cannot have."""
    validator, _ = schema_validators()
    rows = [name for name in config["methods"] if name != FULL_PRECISION[0]]
    for row, space in config["search"]["methods"].items():
        key = f"search.methods.{row}"
        one_of(row, rows, f"{key}: {row!r} is not under methods")
        registered, shipped = recipe_of(config, row)
        for name, values in space.items():
            if values[0] != shipped.get(name):
                raise ConfigError(f"{key}.{name}: begins with {values[0]!r}; valid: {shipped.get(name)!r}, as the row")
            if len(values) != len({repr(value) for value in values}):
                raise ConfigError(f"{key}.{name}: {values} names a value twice")
            for value in [value for value in values if value is not None]:
                if name == "init":
                    one_of(value, rows, f"{key}.init: {value!r} is no starting point")
                else:
                    check_against(validator(registered), {name: value}, key)
