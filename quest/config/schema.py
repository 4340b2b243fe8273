"""Configs against their schema: the first violation becomes one line that names the key and the valid values.

Validation is stricter than JSON schema: see `_strict`. Imports nothing heavy.
"""

import difflib
import functools
from collections.abc import Iterable
from pathlib import Path

from quest.config.old_names import with_current_names
from quest.config.rules import Rule, Valid
from quest.runtime.files import one_line
from quest.runtime.yaml_files import read_yaml

LARGEST = 2**31  # numbers in a config are smaller
SCHEMA = Path(__file__).parents[2] / "workflow" / "schemas" / "config.schema.yaml"


class ConfigError(ValueError):
    """An invalid config. The message is one line that names the key and the valid values."""

    def __init__(self, message: str):
        super().__init__(one_line(message))


def read(file: str | Path) -> dict:
    """Read a config file; old names of methods are replaced. Raises ConfigError where it is no YAML or has no keys."""
    try:
        content = read_yaml(file)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: no keys with values; needed: name, models, grid, methods")
    return renamed(content)


def renamed(config: dict) -> dict:
    """A config with the present names of methods. Raises ConfigError where a row stands under both of its names."""
    try:
        return with_current_names(config)
    except ValueError as error:
        raise ConfigError(str(error)) from None


@functools.cache
def _schema() -> dict:
    return read(SCHEMA)


def weights_only() -> list[str]:
    """Names of the methods that quantize weights only. Read from the schema, because baselines need torch."""
    return _schema()["$defs"]["weights-only"]["enum"]


@functools.cache
def method_rules() -> dict[str, tuple[dict, frozenset[str], list[Rule]]]:
    """For each method with rules: what their keywords are without a recipe, which of them its row fixes, the rules."""
    found = {}
    for block in _schema()["rules"]:
        rules = [
            Rule(*({n: Valid(**limits) for n, limits in rule[key].items()} for key in ("when", "valid")), rule["why"])
            for rule in block["rules"]
        ]
        for name, about in block["methods"].items():
            found[name] = (about["values"], frozenset(about["fixed"]), rules)
    return found


@functools.cache
def schema_validators():
    """(validator, names of all methods). validator() is for a whole config, validator(method) for a recipe."""
    schema = _schema()
    methods = schema["$defs"]["methods"]["properties"]
    kind = _strict()

    def validator(method: str | None = None):
        return kind(schema if method is None else methods[method] | {"$defs": schema["$defs"]})

    return validator, list(methods)


def _strict():
    """A stricter validator: 120.0 is not an integer, true is not 1, and numbers are finite and below LARGEST."""
    from jsonschema import Draft202012Validator, ValidationError, validators

    def integer(_checker, value):
        return type(value) is int and abs(value) < LARGEST

    def number(_checker, value):
        return type(value) in (int, float) and abs(value) < LARGEST  # neither infinite nor NaN

    def enum(_validator, allowed, value, _schema):
        if not any(type(value) is type(one) and value == one for one in allowed):
            yield ValidationError(f"{value!r} is not one of {', '.join(map(str, allowed))}")

    types = Draft202012Validator.TYPE_CHECKER.redefine_many({"integer": integer, "number": number})
    return validators.extend(Draft202012Validator, {"enum": enum}, type_checker=types)


def check_part(key: str, value, file: str | Path) -> None:
    """`check_against` for the value of one key of a config file. Imports no methods and needs no other key."""
    schema = _schema()
    check_against(_strict()(schema["properties"][key] | {"$defs": schema["$defs"]}), value, f"{file}: {key}")


def check_against(validator, config, where: str = "") -> None:
    """Raise ConfigError for the first violation of the schema. where: the prefix of its keys in the message."""
    error = min(validator.iter_errors(config), key=lambda e: list(map(str, e.absolute_path)), default=None)
    if error is None:
        return
    path = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in error.absolute_path)
    key = (where + path).removeprefix(".") or "config"
    if error.validator == "additionalProperties":
        allowed = error.schema.get("properties", {})
        unknown = next(name for name in error.instance if name not in allowed)
        one_of(unknown, allowed, f"{key}: unknown key {unknown!r}")
    if error.validator == "required":
        missing = next(name for name in error.validator_value if name not in error.instance)
        raise ConfigError(f"{key}: key {missing!r} is missing; needed: {', '.join(error.validator_value)}")
    if error.validator == "enum":
        one_of(error.instance, map(str, error.validator_value), f"{key}: {error.instance!r} is not valid")
    hints = [error.schema["description"]] if "description" in error.schema else []
    if error.validator == "type" and error.validator_value in ("number", "integer"):
        if isinstance(error.instance, str):
            hints.append("YAML reads 1e-4 as text, write 1.0e-4")
        else:
            kind = "whole number" if error.validator_value == "integer" else "number"
            hints.append(f"write a {kind} below {LARGEST}")
    if error.instance is None:
        hints.append("write {} for nothing")
    raise ConfigError("; ".join([f"{key}: {error.message}", *hints]))


def one_of(name, valid: Iterable[str], complaint: str) -> None:
    """Unless `name` is in `valid`, raise ConfigError with `complaint`, the nearest valid name and all valid names."""
    valid = list(valid)
    if name in valid:
        return
    near = difflib.get_close_matches(str(name), valid, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise ConfigError(f"{complaint}{hint}; valid: {', '.join(valid) or 'nothing'}")
