"""Reads and checks a config and lists its runs. The Snakefile uses it, so it imports nothing heavy."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from quest.config.rules import check_together
from quest.config.schema import ConfigError, check_against, method_rules, one_of, read, schema_validators, weights_only
from quest.runtime import memory

FULL_PRECISION = ("fp", "w32a32")
NAME = "[a-z0-9][a-z0-9-]{0,99}"  # name of a row, which is also a folder
LAST_DRAW = 14  # of the calibration draws that `snakemake settle` may come to, those of PROTOCOL.md
# In results/, of all configs.
SHARED = ("zoo", "models", "checkpoints", "references", "networks", "settled", "kernels", "leaderboard", "scored")
FILES = ("checkpoint", "tokenizer", "captions", "reference")  # keys of a model that name a file or folder
MADE = "results/checkpoints/tiny-"  # start of the paths of checkpoints that a rule makes


@dataclass(frozen=True)
class Run:
    """One cell of the grid, e.g. Run("scenes-text", "quest-suite", "w4a8").

    `method` is a name under the config's `methods`, or one with a quantization seed: "quest-suite@1".
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


def parts_of(method: str) -> tuple[str, str, str]:
    """Row, calibration draw and quantization seed: "x@3" has draw and seed 3, "x@4.3" draw 4 and seed 3, "x" none."""
    row, _, numbers = method.partition("@")
    draw, _, seed = numbers.partition(".")
    return row, draw, seed or draw


def recipe_of(config: dict, method: str) -> tuple[str, dict]:
    """(name in baselines.METHODS, keyword arguments) of a row, e.g. "quest-suite", or "quest-suite@1" for seed 1.

    A recipe under `methods` may name its method under `method`, so that one method can have several rows. A row under
    `ablations` changes keywords of the recipe that it is compared with, or of the recipe that it names under `of`; if
    it has a `method`, it is that method's whole recipe.
    """
    name, _, seed = parts_of(method)
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
    """The run from whose checkpoint a run starts (`init`), or None: of equal draw and seed, and weight bits."""
    _, recipe = recipe_of(config, run.method)
    if "init" not in recipe:
        return None
    registered, _ = recipe_of(config, recipe["init"])
    _, at, numbers = run.method.partition("@")
    weight, _ = parse_bits(run.bits)
    return Run(run.model, recipe["init"] + at + numbers, f"w{weight}a32" if registered in weights_only() else run.bits)


def starting_points(config: dict, cells: list[Run]) -> list[Run]:
    """The runs from whose checkpoints `cells` start, directly or through other starting points, each once."""
    starts, waiting = [], list(cells)
    for run in waiting:  # grows while it is read
        if (start := start_of(config, run)) and start not in starts:
            starts.append(start)
            waiting.append(start)
    return starts


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
    """The cells of `config["ablations"]`: the one to compare with, those that rows name under `of`, and the rows."""
    if "ablations" not in config:
        return []
    block = config["ablations"]
    bases = [block["against"], *(changes["of"] for changes in block["rows"].values() if "of" in changes)]
    return [Run(block["model"], method, block["bits"]) for method in dict.fromkeys([*bases, *block["rows"]])]


def validate(config: dict) -> None:
    """Raise ConfigError for the first key in `config` that could not run."""
    from quest.diffusion.declared import of_config
    from quest.diffusion.models import MODELS, find

    _check_schema(config)
    if config["name"] in SHARED:
        raise ConfigError(f"name: {config['name']!r} is a folder that configs share; give the config another name")
    for name in [name for name, settings in config["models"].items() if "pipeline" not in settings and not find(name)]:
        one_of(name, MODELS, f"models.{name}: unknown model")
    try:
        models = of_config(config)
        if "memory" in config:
            memory.parse(config["memory"])
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from None
    if "share_gpu" in config:
        try:
            memory.parse(config["share_gpu"]["memory"])
        except ValueError as error:
            raise ConfigError(f"share_gpu.{error}") from None
        if config.get("device") != "cuda":
            raise ConfigError("share_gpu: jobs of this config run on the CPU; leave it out, or set device: cuda")
    for name, model in models.items():
        settings = config["models"][name]
        _check_sources(model, settings)
        _check_captions(model, settings, config)
        batches = -(-settings["images"] // model.batch_size)
        if settings.get("first", 0) % model.batch_size:
            raise ConfigError(
                f"models.{name}.first: {settings['first']}; valid: a multiple of the batch, {model.batch_size} images"
            )
        if settings.get("shards", 1) > batches:
            raise ConfigError(
                f"models.{name}.shards: {settings['shards']} shards of {settings['images']} images in batches of "
                f"{model.batch_size} leave some empty; valid: 1 to {batches}"
            )
    blocks = {f"grid[{i}]": block for i, block in enumerate(config["grid"])}
    if "seeds" in config:
        blocks["seeds"] = {"model": list(config["models"])} | config["seeds"]
    if "settle" in config:
        from quest.config.settled import families

        for name, family in families(config).items():
            rows = [row for pair in family["pairs"] for row in pair if row != FULL_PRECISION[0]]
            key = f"settle.families.{name}"
            blocks[key] = {"model": list(config["models"]), "method": rows, "bits": family["bits"]}
            _check_pairs(key, family["pairs"])
        if "lottery" in config["settle"]:
            blocks["settle.lottery"] = {"bits": config["settle"]["bits"]} | config["settle"]["lottery"]
    if "questions" in config:
        question = config["questions"]
        blocks["questions"] = {"model": [question["model"]], "method": ["quest-suite"], "bits": [question["bits"]]}
    for key, block in blocks.items():
        _check_cells(key, block, config)
    for method in config["methods"]:
        chain = [method]
        while (start := config["methods"][chain[-1]].get("init")) is not None:
            valid = [name for name in config["methods"] if name not in (*chain, FULL_PRECISION[0])]
            one_of(start, valid, f"methods.{chain[-1]}.init: {start!r} is no starting point")
            chain.append(start)
    if "ablations" in config:
        _check_ablations(config)
    for name in [*config["methods"], *config.get("ablations", {}).get("rows", {})]:
        _check_rules(config, name)
    cells = [cell for block in blocks.values() for cell in product(block["model"], block["method"], block["bits"])]
    for run in [*(Run(*cell) for cell in cells), *ablation_runs(config)]:
        _check_run(config, run, models[run.model])
    if "search" in config:
        from quest.config import searched

        _check_cells("search", {"model": [], "method": [], "bits": [config["search"]["bits"]]}, config)
        searched.check(config)
        for changed, run in searched.variants(config):
            _check_run(changed, run, models[run.model])


def _check_run(config: dict, run: Run, model) -> None:
    """Raise ConfigError where the recipe of a run does not suit its model or its bits."""
    steps, groups = model.steps, recipe_of(config, run.method)[1].get("time_groups")
    # Quadratic timesteps coincide at the end, so there are fewer than steps; the scheduler knows how many.
    if groups and steps % groups and model.sampler != "ddim-quadratic":
        valid = [number for number in range(1, steps + 1) if steps % number == 0]
        raise ConfigError(
            f"{_key(config, run.method)}.time_groups: {groups} does not divide the {steps} steps of {run.model}; "
            f"valid: {valid}"
        )
    _check_rules(config, run.method, model, run.bits)


def _check_rules(config: dict, method: str, model=None, bits: str | None = None) -> None:
    """Raise ConfigError for keywords of a row that do not go together, on one model at its bits where these are set."""
    registered, recipe = recipe_of(config, method)
    if registered not in method_rules():
        return
    defaults, fixed, rules = method_rules()[registered]
    values = dict(defaults)
    if model is not None:
        w, a = parse_bits(bits)
        values |= model.settings(defaults.keys() - fixed, a) | {"w": w, "a": a}
    try:
        check_together(rules, values | recipe, recipe)
    except ValueError as error:
        raise ConfigError(f"{_key(config, method)}{': ' if str(error).startswith('bits ') else '.'}{error}") from None


def _key(config: dict, method: str) -> str:
    """Where the recipe of a row stands."""
    name, *_ = parts_of(method)
    return f"{'methods' if name in config['methods'] else 'ablations.rows'}.{name}"


def _check_pairs(key: str, pairs: list) -> None:
    """Raise ConfigError for a pair of one row, or with full precision first."""
    for place, (row, versus) in enumerate(pairs):
        if row == versus or row == FULL_PRECISION[0]:
            raise ConfigError(f"{key}[{place}]: {row} against {versus}; valid: a row, and another row or fp")


def _check_cells(key: str, block: dict, config: dict) -> None:
    """Raise ConfigError unless the models, methods and bits of a block exist and fit each other."""
    for model in block["model"]:
        one_of(model, config["models"], f"{key}.model: {model!r} is not under models")
    for method in block["method"]:
        one_of(method, config["methods"], f"{key}.method: {method!r} is not under methods")
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
    """Raise ConfigError unless every row of `ablations` is a valid recipe under a new name."""
    block, methods = config["ablations"], config["methods"]
    valid = [name for name in methods if name != FULL_PRECISION[0]]
    one_of(block["against"], valid, f"ablations.against: {block['against']!r} is not under methods")
    cell = {key: [block[key]] for key in ("model", "bits")}
    _check_cells("ablations", cell | {"method": [block["against"]]}, config)
    validator, known = schema_validators()
    for name, changes in block["rows"].items():
        key = f"ablations.rows.{name}"
        if not re.fullmatch(NAME, str(name)):
            raise ConfigError(f"{key}: the name of a row is at most 100 small letters, digits and hyphens")
        if name in methods or name in known and changes.get("method") != name:
            raise ConfigError(f"{key}: this is the name of a method; give the row a name of its own")
        if {"of", "method"} <= changes.keys():
            raise ConfigError(f"{key}: of {changes['of']!r} and method {changes['method']!r}; give one of the two")
        if "of" in changes:
            one_of(changes["of"], valid, f"{key}.of: {changes['of']!r} is not under methods")
        if "method" in changes:
            one_of(changes["method"], known, f"{key}.method: unknown method {changes['method']!r}")
        registered, recipe = recipe_of(config, name)
        check_against(validator(registered), recipe, key)
        if "init" in recipe:
            one_of(recipe["init"], valid, f"{key}.init: {recipe['init']!r} is no starting point")
        # Check that its method can have these bits.
        _check_cells(key, cell | {"method": [name]}, config | {"methods": methods | {name: {"method": registered}}})


def _check_sources(model, settings: dict) -> None:
    """Raise ConfigError unless a model's settings name the files that do not ship with it, and no others."""
    origin = model.origin
    needs: dict[str, str] = {}  # key -> what its path leads to
    if "pipeline" in settings:
        needs |= {
            key: "a folder of real images, or an npz of them" for key in ("reference", "resize") if key in settings
        }
    elif origin is not None:
        needs["checkpoint"] = origin.what
        if origin.captions:
            needs["captions"] = "a text file, one caption per line, or COCO's annotations"
        if origin.compvis and model.conditioning == "text":
            needs["tokenizer"] = "the folder of the CLIP tokenizer"
        if model.extractor != "scenes":
            needs["reference"] = needs["resize"] = "a folder of real images, or an npz of them"
    # A folder in diffusers layout has its tokenizer inside.
    layout = Path(settings.get("checkpoint", "fetched.ckpt")).suffix not in (".ckpt", ".safetensors")
    optional = {"checkpoint": bool(origin and origin.url), "tokenizer": layout, "resize": True}
    for key, what in needs.items():
        if key not in settings and not optional.get(key):
            raise ConfigError(f"models.{model.name}.{key}: missing; name the path of {what}")
    for key in FILES + ("resize",):
        if key in settings and key not in needs:
            why = "ships with its own" if origin is None else "takes none"
            raise ConfigError(f"models.{model.name}.{key}: this model {why}; leave it out")


def missing_files(config: dict, model: str, keys: Iterable[str]) -> list[str]:
    """One line for each path in the settings of a model that does not exist and that no rule makes."""
    paths = {key: config["models"][model].get(key) for key in keys}
    return [
        f"models.{model}.{key}: no {path}; name a file or folder that is there"
        for key, path in paths.items()
        if path and not (path.startswith(MADE) or (key, path) == ("reference", "none") or Path(path).exists())
    ]


def _check_captions(model, settings: dict, config: dict) -> None:
    """Raise ConfigError where a model needs more captions than its file may have lines for."""
    if model.caption_lines is None:
        return
    # The draw of every seed starts with a whole batch, and its last batch is filled up.
    drawn = [*config.get("seeds", {}).get("seed", []), *config.get("search", {}).get("seeds", [])]
    lottery = config.get("settle", {}).get("lottery", {"model": []})
    drawn += lottery["draw"] if model.name in lottery["model"] else []
    drawn += [LAST_DRAW] if "settle" in config else []
    draws = 1 + max(drawn, default=0)
    batches = -(-settings.get("trajectories", model.trajectories) // model.batch_size)
    counts = {
        "images": ("evaluation", settings.get("first", 0) + settings["images"]),
        "evaluation": ("evaluation", settings.get("evaluation", 16)),
        "trajectories": ("calibration", draws * batches * model.batch_size),
    }
    for key, (split, count) in counts.items():
        first, end = model.caption_lines[split]
        most = end - first
        if count > most:
            raise ConfigError(
                f"models.{model.name}.{key}: {count} captions are needed (whole batches of every seed); for {split} "
                f"there are those of {most} at most"
            )


def check_names(files: Iterable[Path]) -> None:
    """Raise ConfigError where two configs have the same name, hence the same folder of results, or cannot be read."""
    seen: dict[str, Path] = {}
    for file in sorted({Path(file).resolve() for file in files}):
        name = str(read(file).get("name"))
        if name in seen:
            raise ConfigError(f"name: {name!r} stands in both {seen[name]} and {file}; give one of them another name")
        seen[name] = file


def _check_schema(config: dict) -> None:
    """Check a config against the schema, and each recipe that names its `method` against the schema of that method."""
    validator, known = schema_validators()
    methods = config.get("methods") if isinstance(config, dict) else None
    with_method = {}
    if isinstance(methods, dict):
        with_method = {n: r for n, r in methods.items() if isinstance(r, dict) and "method" in r}
        config = config | {"methods": {n: r for n, r in methods.items() if n not in with_method}}
    check_against(validator(), config)
    for name, recipe in with_method.items():
        if not re.fullmatch(NAME, str(name)) or name in known:
            raise ConfigError(
                f"methods.{name}: a row needs a name of its own: at most 100 small letters, digits and hyphens"
            )
        one_of(recipe["method"], known, f"methods.{name}.method: unknown method {recipe['method']!r}")
        keywords = {k: v for k, v in recipe.items() if k != "method"}
        check_against(validator(recipe["method"]), keywords, f"methods.{name}")
