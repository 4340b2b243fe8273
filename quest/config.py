"""The experiment grid, read from YAML. Imports nothing heavy: the Snakefile uses it to list runs."""

import difflib
import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from quest.runtime.files import one_line
from quest.runtime.yaml_files import read_yaml

FULL_PRECISION = ("fp", "w32a32")
NAME = "[a-z0-9][a-z0-9-]*"  # of a row: a folder
SHARED = ("zoo", "models", "checkpoints", "references", "networks")  # in results/, beside the folders of configs
FILES = ("checkpoint", "tokenizer", "captions", "reference")  # keys of a model that name a file or folder
LARGEST = 2**31
MADE = "results/checkpoints/tiny-"  # begins the paths of checkpoints that a rule makes
SCHEMA = Path(__file__).parents[1] / "workflow" / "schemas" / "config.schema.yaml"


class ConfigError(ValueError):
    """One line that names the key at fault and what would be valid, whatever stands in the config."""

    def __init__(self, message: str):
        super().__init__(one_line(message))


@dataclass(frozen=True)
class Run:
    """One cell of the grid, e.g. Run("scenes-text", "quest", "w4a8").

    `method` is a name under the config's `methods`, or one with a quantization seed: "quest@1".
    """

    model: str
    method: str
    bits: str

    @property
    def path(self) -> str:
        return f"{self.model}/{self.method}/{self.bits}"


def parse_bits(bits: str) -> tuple[int, int]:
    """Return (weight bits, activation bits) of "w4a8", each 2 to 8; a32 is weights only, w32a32 full precision.

    Raises ValueError for anything else, capitals included, since bits are folder names.
    """
    match = re.fullmatch(r"w(\d+)a(\d+)", bits) if isinstance(bits, str) else None
    weight, activation = map(int, match.groups()) if match else (0, 0)
    plain = bits == f"w{weight}a{activation}"  # no leading zeros: w04a4 and w4a4 would be two folders of one thing
    if plain and (2 <= weight <= 8 and (2 <= activation <= 8 or activation == 32) or weight == activation == 32):
        return weight, activation
    hint = f", e.g. {bits.lower()!r}" if isinstance(bits, str) and bits != bits.lower() else ""
    raise ValueError(
        f"bits {bits!r}: write w<2 to 8>a<2 to 8> in small letters{hint} (a32 is weights only, w32a32 full precision)"
    )


def recipe_of(config: dict, method: str) -> tuple[str, dict]:
    """(name in baselines.METHODS, keyword arguments) of a name under `methods`, e.g. "quest", or "quest@1" for seed 1.

    A recipe may say under `method` which one it is a recipe of, so that one method can stand in several rows. The name
    of a row under `ablations` is known too: what it changes, over the recipe it is compared with, over that of the
    method it is `of`, or over nothing if it says its `method`.
    """
    name, _, seed = method.partition("@")
    rows = config.get("ablations", {}).get("rows", {})
    if name in config["methods"] or name not in rows:
        recipe = dict(config["methods"][name])
        registered = recipe.pop("method", name)
    else:
        recipe = dict(rows[name])
        base = {}
        registered, of = recipe.pop("method", None), recipe.pop("of", config["ablations"]["against"])
        if registered is None:
            registered, base = recipe_of(config, of)
        recipe = base | recipe
    return registered, recipe | ({"seed": int(seed)} if seed else {})


def start_of(config: dict, run: Run) -> Run | None:
    """The run whose checkpoint a run starts from, if its recipe names one: of its seed, at its bits or weight bits."""
    _, recipe = recipe_of(config, run.method)
    if "init" not in recipe:
        return None
    registered, _ = recipe_of(config, recipe["init"])
    _, at, seed = run.method.partition("@")
    weight, _ = parse_bits(run.bits)
    return Run(run.model, recipe["init"] + at + seed, f"w{weight}a32" if registered in weights_only() else run.bits)


def starting_points(config: dict, cells: list[Run]) -> list[Run]:
    """The runs whose checkpoints these start from, each once. One of them may start from another."""
    found, waiting = [], list(cells)
    for run in waiting:  # grows while it is read
        if (start := start_of(config, run)) and start not in found:
            found.append(start)
            waiting.append(start)
    return found


def runs(config: dict) -> list[Run]:
    """The cells of `config["grid"]`, in its order, each once."""
    cells = (Run(*cell) for block in config["grid"] for cell in product(block["model"], block["method"], block["bits"]))
    return list(dict.fromkeys(cells))


def seed_runs(config: dict) -> list[Run]:
    """The cells of `config["seeds"]` in the order model, bits, method, seed; seed 0 is the cell of the grid itself."""
    if "seeds" not in config:
        return []
    block = config["seeds"]
    cells = product(config["models"], block["bits"], block["method"], block["seed"])
    return [Run(model, f"{method}@{seed}" if seed else method, bits) for model, bits, method, seed in cells]


def ablation_runs(config: dict) -> list[Run]:
    """What `config["ablations"]` compares: the cell that rows are compared with, others they are of, and the rows."""
    if "ablations" not in config:
        return []
    block = config["ablations"]
    bases = [block["against"], *(changes["of"] for changes in block["rows"].values() if "of" in changes)]
    return [Run(block["model"], method, block["bits"]) for method in dict.fromkeys([*bases, *block["rows"]])]


def read(file: str | Path) -> dict:
    """The config in a file. Raises ConfigError where it is not YAML (see `read_yaml`), or holds no keys."""
    try:
        content = read_yaml(file)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: no keys with values; needed: name, models, grid, methods")
    return content


def validate(config: dict) -> None:
    """Raise ConfigError for the first thing in `config` that could not run."""
    from quest.diffusion.models import MODELS

    _check_schema(config)
    if config["name"] in SHARED:
        raise ConfigError(f"name: {config['name']!r} is a folder that configs share; give the config another name")
    for name, settings in config["models"].items():
        _one_of(name, MODELS, f"models.{name}: unknown model")
        _check_sources(MODELS[name], settings)
        _check_captions(MODELS[name], settings, config)
        batches = -(-settings["images"] // MODELS[name].batch_size)
        if settings.get("shards", 1) > batches:
            raise ConfigError(
                f"models.{name}.shards: {settings['shards']} shards of {settings['images']} images in batches of "
                f"{MODELS[name].batch_size} leave some empty; valid: 1 to {batches}"
            )
    blocks = {f"grid[{i}]": block for i, block in enumerate(config["grid"])}
    if "seeds" in config:
        blocks["seeds"] = {"model": list(config["models"])} | config["seeds"]
    if "questions" in config:
        asked = config["questions"]
        blocks["questions"] = {"model": [asked["model"]], "method": ["quest"], "bits": [asked["bits"]]}
    for key, block in blocks.items():
        _check_cells(key, block, config)
    for method in config["methods"]:
        chain = [method]
        while (start := config["methods"][chain[-1]].get("init")) is not None:
            valid = [name for name in config["methods"] if name not in (*chain, FULL_PRECISION[0])]
            _one_of(start, valid, f"methods.{chain[-1]}.init: {start!r} is no starting point")
            chain.append(start)
    if "ablations" in config:
        _check_ablations(config)


def _check_cells(key: str, block: dict, config: dict) -> None:
    """Raise ConfigError unless every model, method and bits of a block of cells exists and goes with the others."""
    for model in block["model"]:
        _one_of(model, config["models"], f"{key}.model: {model!r} is not under models")
    for method in block["method"]:
        _one_of(method, config["methods"], f"{key}.method: {method!r} is not under methods")
    for bits in block["bits"]:
        try:
            parse_bits(bits)
        except ValueError as error:
            raise ConfigError(f"{key}.bits: {error}") from None
    for method, bits in product(block["method"], block["bits"]):
        if (method == FULL_PRECISION[0]) != (bits == FULL_PRECISION[1]):
            raise ConfigError(f"{key}: {method} at {bits}; w32a32 goes with fp and with nothing else")
        if recipe_of(config, method)[0] in weights_only() and parse_bits(bits)[1] != 32:
            raise ConfigError(f"{key}: {method} at {bits}; it quantizes weights only, e.g. at w4a32")


def _check_ablations(config: dict) -> None:
    """Raise ConfigError unless every row of `ablations` is a recipe of a method, under a name of its own."""
    block, methods = config["ablations"], config["methods"]
    valid = [name for name in methods if name != FULL_PRECISION[0]]
    _one_of(block["against"], valid, f"ablations.against: {block['against']!r} is not under methods")
    cell = {key: [block[key]] for key in ("model", "bits")}
    _check_cells("ablations", cell | {"method": [block["against"]]}, config)
    validator, known = _recipes()
    for name, changes in block["rows"].items():
        key = f"ablations.rows.{name}"
        if not re.fullmatch(NAME, str(name)):
            raise ConfigError(f"{key}: the name of a row has small letters, digits and hyphens")
        if name in methods or name in known and changes.get("method") != name:
            raise ConfigError(f"{key}: this is the name of a method; give the row a name of its own")
        if {"of", "method"} <= changes.keys():
            raise ConfigError(f"{key}: of {changes['of']!r} and method {changes['method']!r}; give one of the two")
        if "of" in changes:
            _one_of(changes["of"], valid, f"{key}.of: {changes['of']!r} is not under methods")
        if "method" in changes:
            _one_of(changes["method"], known, f"{key}.method: unknown method {changes['method']!r}")
        registered, recipe = recipe_of(config, name)
        _check_against(validator(registered), recipe, key)
        if "init" in recipe:
            _one_of(recipe["init"], valid, f"{key}.init: {recipe['init']!r} is no starting point")
        # As a cell: bits that its method cannot have.
        _check_cells(key, cell | {"method": [name]}, config | {"methods": methods | {name: {"method": registered}}})


def _check_sources(model, settings: dict) -> None:
    """Raise ConfigError unless the config names what a model does not ship with, and nothing that it does."""
    origin = model.origin
    of: dict[str, str] = {}  # key: what a path is needed of
    if origin is not None:
        of["checkpoint"] = origin.what
        if origin.captions:
            of["captions"] = "a text file, one caption per line, or COCO's annotations"
        if origin.compvis and model.conditioning == "text":
            of["tokenizer"] = "the folder of the CLIP tokenizer"
        if model.extractor != "scenes":
            of["reference"] = of["resize"] = "a folder of real images, or an npz of them"
    # A folder in diffusers layout has its tokenizer inside.
    layout = Path(settings.get("checkpoint", "fetched.ckpt")).suffix not in (".ckpt", ".safetensors")
    optional = {"checkpoint": bool(origin and origin.url), "tokenizer": layout, "resize": True}
    for key, what in of.items():
        if key not in settings and not optional.get(key):
            raise ConfigError(f"models.{model.name}.{key}: missing; name the path of {what}")
    for key in FILES + ("resize",):
        if key in settings and key not in of:
            why = "ships with its own" if origin is None else "takes none"
            raise ConfigError(f"models.{model.name}.{key}: this model {why}; leave it out")


def missing_files(config: dict, model: str, keys: Iterable[str]) -> list[str]:
    """A line for each path that the settings of a model name and that neither is there nor is made by a rule."""
    named = {key: config["models"][model].get(key) for key in keys}
    return [
        f"models.{model}.{key}: no {path}; name a file or folder that is there"
        for key, path in named.items()
        if path and not (path.startswith(MADE) or (key, path) == ("reference", "none") or Path(path).exists())
    ]


def _check_captions(model, settings: dict, config: dict) -> None:
    """Raise ConfigError where a model is asked for more images than its file of captions may have lines for."""
    from quest.diffusion.models import CAPTION_LINES

    if model.origin is None or not model.origin.captions:
        return
    # Every draw of a seed begins at a whole batch, and the last batch is filled up.
    draws = 1 + max(config.get("seeds", {}).get("seed", [0]))
    batches = -(-settings.get("trajectories", model.trajectories) // model.batch_size)
    counts = {
        "images": ("evaluation", settings["images"]),
        "evaluation": ("evaluation", settings.get("evaluation", 16)),
        "trajectories": ("calibration", draws * batches * model.batch_size),
    }
    for key, (split, count) in counts.items():
        most = CAPTION_LINES[split][1] - CAPTION_LINES[split][0]
        if count > most:
            raise ConfigError(
                f"models.{model.name}.{key}: {count} captions are needed (whole batches of every seed); for {split} "
                f"there are those of {most} at most"
            )


def check_names(files: Iterable[Path]) -> None:
    """Raise ConfigError where two config files have one name, hence one folder of results, or `read` refuses one."""
    seen: dict[str, Path] = {}
    for file in sorted({Path(file).resolve() for file in files}):
        name = str(read(file).get("name"))
        if name in seen:
            raise ConfigError(f"name: {name!r} stands in both {seen[name]} and {file}; give one of them another name")
        seen[name] = file


def _check_schema(config: dict) -> None:
    """Check a config as it stands, then each recipe that names its method as one of that method."""
    validator, known = _recipes()
    methods = config.get("methods") if isinstance(config, dict) else None
    named = {}
    if isinstance(methods, dict):
        named = {n: r for n, r in methods.items() if isinstance(r, dict) and "method" in r}
        config = config | {"methods": {n: r for n, r in methods.items() if n not in named}}
    _check_against(validator(), config)
    for name, recipe in named.items():
        if not re.fullmatch(NAME, str(name)) or name in known:
            raise ConfigError(
                f"methods.{name}: a row of its own needs a name of its own: small letters, digits, hyphens"
            )
        _one_of(recipe["method"], known, f"methods.{name}.method: unknown method {recipe['method']!r}")
        own = {k: v for k, v in recipe.items() if k != "method"}
        _check_against(validator(recipe["method"]), own, f"methods.{name}")


@functools.cache
def _schema() -> dict:
    return read(SCHEMA)


def weights_only() -> list[str]:
    """The methods whose bits are w4a32, which others start from. From the schema, since methods need torch."""
    return _schema()["$defs"]["weights-only"]["enum"]


@functools.cache
def _recipes():
    """(validator of a whole config, or with the name of a method of its recipe; names of all methods)."""
    schema = _schema()
    methods = schema["$defs"]["methods"]["properties"]
    kind = _strict()

    def validator(method: str | None = None):
        return kind(schema if method is None else methods[method] | {"$defs": schema["$defs"]})

    return validator, list(methods)


def _strict():
    """JSON Schema as people read it: 120.0 is no integer, true is not 1, and a number is finite and of usual size."""
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


def _check_against(validator, config, where: str = "") -> None:
    """Raise ConfigError for the first fault by the schema; `where` is what stands in front of its keys."""
    error = min(validator.iter_errors(config), key=lambda e: list(map(str, e.absolute_path)), default=None)
    if error is None:
        return
    path = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in error.absolute_path)
    key = (where + path).removeprefix(".") or "config"
    if error.validator == "additionalProperties":
        allowed = error.schema.get("properties", {})
        unknown = next(name for name in error.instance if name not in allowed)
        _one_of(unknown, allowed, f"{key}: unknown key {unknown!r}")
    if error.validator == "required":
        missing = next(name for name in error.validator_value if name not in error.instance)
        raise ConfigError(f"{key}: key {missing!r} is missing; needed: {', '.join(error.validator_value)}")
    if error.validator == "enum":
        _one_of(error.instance, map(str, error.validator_value), f"{key}: {error.instance!r} is not valid")
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


def _one_of(name, valid: Iterable[str], complaint: str) -> None:
    """Raise ConfigError with `complaint`, the valid names and the nearest of them unless `name` is among `valid`."""
    valid = list(valid)
    if name in valid:
        return
    near = difflib.get_close_matches(str(name), valid, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise ConfigError(f"{complaint}{hint}; valid: {', '.join(valid) or 'nothing'}")
