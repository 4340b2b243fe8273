import copy
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from quest.config import (
    ConfigError,
    Run,
    ablation_runs,
    parse_bits,
    recipe_of,
    runs,
    seed_runs,
    start_of,
    starting_points,
    validate,
    weights_only,
)

CONFIGS = sorted(Path(__file__).parents[1].glob("workflow/config/*.yaml"))


@pytest.fixture
def default():
    return yaml.safe_load((CONFIGS[0].parent / "default.yaml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_shipped_configs_are_valid(file):
    validate(yaml.safe_load(file.read_text(encoding="utf-8")))


def test_default_grid(default):
    cells = runs(default)
    assert len(cells) == len(set(cells)) == 3 * (1 + 2 + 6) + 3
    assert Run("emoji-text", "quest-suite", "w4a4").path == "emoji-text/quest-suite/w4a4"
    assert [run.bits for run in cells if run.method == "fp"] == ["w32a32"] * 3


def test_a_cell_named_twice_runs_once(default):
    once = runs(default)
    default["grid"].append(copy.deepcopy(default["grid"][1]))
    assert runs(default) == once


@pytest.mark.parametrize(
    "bits, parsed", [("w4a8", (4, 8)), ("w8a8", (8, 8)), ("w2a3", (2, 3)), ("w4a32", (4, 32)), ("w32a32", (32, 32))]
)
def test_bits(bits, parsed):
    assert parse_bits(bits) == parsed


@pytest.mark.parametrize("bits", ["W4A4", "w4", "w4a16", "w1a4", "w04a4", "4/8", "", "w4a8 ", 48, None])
def test_bits_that_do_not_exist(bits):
    with pytest.raises(ValueError, match="w<2 to 8>a<2 to 8>"):
        parse_bits(bits)


def test_capital_bits_are_told_the_small_ones():
    with pytest.raises(ValueError, match="'W4A4'.*e.g. 'w4a4'"):
        parse_bits("W4A4")


# One value that is no better than its neighbour: of each, one wrong value is put at every place of its kind.
WRONG = {
    "integer": [120.0, True, "8", None, -1, 2**40, [8], float("nan")],
    "number": [True, "1.0", None, float("nan"), float("inf"), [1.0]],
    "boolean": [0, 1, "true", None],
    "string": [8, True, None, "", []],
    "array": [[], "quest-suite", {}, None, [8], [None]],
}


def places(value, path=()):
    """(path, value) of everything in a config."""
    yield path, value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def test_no_value_of_another_kind_is_taken_anywhere(default):
    default["models"]["emoji-text"] |= {"shards": 2, "trajectories": 8, "evaluation": 4, "keep_images": True}
    default["seeds"] = {"method": ["quest-suite"], "bits": ["w4a4"], "seed": [0, 1]}
    default["methods"]["quest-suite"] |= {
        "samples": 4, "lr_scale": 1e-4, "global_weight": 0.5, "log_scales": False, "keep": {"conv_in": [8, 32]},
    }  # fmt: skip
    default["ablations"]["rows"]["mine"] = {"tla_iterations": 3, "lr_weight": 1e-5, "qkv_as_one": True}
    validate(default)
    kinds = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array"}
    tried = 0
    for path, value in list(places(default)):
        for wrong in WRONG.get(kinds.get(type(value)), []):
            if path[-1] == "global_weight" and wrong == 120.0:
                continue  # a number, which the config gives as 0
            config = copy.deepcopy(default)
            _put(wrong, *path)(config)
            with pytest.raises(ConfigError) as caught:
                validate(config)
            assert "\n" not in str(caught.value) and str(path[0]) in str(caught.value), (path, wrong)
            tried += 1
    assert tried > 500


def _put(value, *path):
    def change(config):
        *parents, last = path
        for key in parents:
            config = config[key]
        config[last] = value

    return change


FAULTS = {
    "unknown key": (_put({}, "modles"), ["config", "'modles'", "did you mean 'models'", "grid"]),
    "missing key": (lambda config: config.pop("grid"), ["config", "'grid' is missing"]),
    "unknown model": (
        _put({"images": 9}, "models", "emoji-txt"),
        ["models.emoji-txt", "'emoji-text'", "photos-class"],
    ),
    "model not configured": (_put(["sd14"], "grid", 0, "model"), ["grid[0].model", "'sd14'", "photos-class"]),
    "unknown method": (
        _put({}, "methods", "rtn_mse"),
        ["methods", "'rtn_mse'", "did you mean 'rtn-mse'", "quest-suite"],
    ),
    "method not configured": (lambda config: config["methods"].pop("rtn-mse"), ["grid[1].method", "'rtn-mse'", "rtn"]),
    "typo in a recipe": (
        _put(1, "methods", "quest-suite", "inti"),
        ["methods.quest-suite", "'inti'", "did you mean 'init'"],
    ),
    "recipe left empty": (_put(None, "methods", "rtn"), ["methods.rtn", "write {}"]),
    "init of nothing": (
        _put("rtnn", "methods", "quest-suite", "init"),
        ["methods.quest-suite.init", "'rtnn'", "rtn-mse"],
    ),
    "init of itself": (
        _put("quest-suite", "methods", "quest-suite", "init"),
        ["methods.quest-suite.init", "'quest-suite'", "rtn-mse"],
    ),
    "init of full precision": (
        _put("fp", "methods", "quest-suite", "init"),
        ["methods.quest-suite.init", "'fp'", "rtn-mse"],
    ),
    "unknown bits": (_put(["w4a9"], "grid", 1, "bits"), ["grid[1].bits", "'w4a9'", "w<2 to 8>a<2 to 8>"]),
    "whole number as float": (_put(120.0, "models", "emoji-text", "images"), ["images: 120.0", "whole number"]),
    "kept bits as float": (_put({"conv_in": 8.0}, "methods", "rtn", "keep"), ["methods.rtn.keep.conv_in", "2 to 16"]),
    "not a number": (_put(float("nan"), "methods", "quest-suite", "lr_scale"), ["methods.quest-suite.lr_scale: nan"]),
    "seeds of another split": (_put(1_000_001, "models", "emoji-text", "images"), ["images", "maximum of 1000000"]),
    "one trajectory": (_put(1, "models", "emoji-text", "evaluation"), ["evaluation", "minimum of 2"]),
    "more images than captions that ship": (
        _put({"images": 2001}, "models", "emoji-text"),
        ["models.emoji-text.images", "2001 captions", "2000 at most"],
    ),
    "more images than captions": (
        _put({"images": 10_001, "captions": "c", "tokenizer": "t", "reference": "none"}, "models", "sd14"),
        ["models.sd14.images: 10001", "those of 10000 at most"],
    ),
    "no tokenizer": (
        _put({"images": 9, "captions": "c", "reference": "none"}, "models", "sd14"),
        ["models.sd14.tokenizer: missing", "CLIP tokenizer"],
    ),
    "a path that a model has no use for": (
        _put({"images": 9, "checkpoint": "a.ckpt", "captions": "c"}, "models", "tiny-bedrooms"),
        ["models.tiny-bedrooms.captions", "takes none"],
    ),
    "a path that reads as an option": (
        _put({"images": 9, "checkpoint": "-x.ckpt"}, "models", "tiny-bedrooms"),
        ["models.tiny-bedrooms.checkpoint", "hyphen"],
    ),
    "capital bits": (_put(["W4A4"], "grid", 1, "bits"), ["grid[1].bits", "'W4A4'", "'w4a4'"]),
    "bits no list": (_put("w4a4", "grid", 1, "bits"), ["grid[1].bits", "'w4a4'", "a list"]),
    "quantized full precision": (_put(["w8a8"], "grid", 0, "bits"), ["grid[0]", "fp at w8a8", "w32a32"]),
    "unquantized method": (_put(["w32a32"], "grid", 1, "bits"), ["grid[1]", "rtn-mse at w32a32"]),
    "images as text": (_put("1e3", "models", "emoji-text", "images"), ["models.emoji-text.images", "'1e3'", "text"]),
    "too few images": (_put(1, "models", "emoji-text", "images"), ["models.emoji-text.images", "minimum of 2"]),
    "empty shards": (_put(11, "models", "emoji-text", "shards"), ["models.emoji-text.shards", "11", "1 to 6"]),
    "name taken": (_put("zoo", "name"), ["name", "'zoo'", "another name"]),
    "name of what configs share": (_put("models", "name"), ["name", "'models'", "another name"]),
    "weights that ship": (
        _put("a.ckpt", "models", "photos-class", "checkpoint"),
        ["models.photos-class.checkpoint", "ships with its own"],
    ),
    "weights that do not": (_put({"images": 9}, "models", "imagenet"), ["models.imagenet.checkpoint", "cin256-v2"]),
    "no captions": (_put({"images": 9}, "models", "sd14"), ["models.sd14.captions", "one caption per line"]),
    "no real images": (
        _put({"images": 9, "checkpoint": "a.ckpt"}, "models", "imagenet"),
        ["models.imagenet.reference", "folder of real images"],
    ),
    "unknown change": (
        _put({"time_group": 1}, "ablations", "rows", "quest-groups-1"),
        ["ablations.rows.quest-groups-1", "'time_group'", "did you mean 'time_groups'"],
    ),
    "change of a wrong kind": (
        _put({"of": "q-diffusion", "samples": "1e3"}, "ablations", "rows", "q-diffusion-groups"),
        ["ablations.rows.q-diffusion-groups.samples", "'1e3'", "text"],
    ),
    "row of nothing": (
        _put({"of": "q-difusion"}, "ablations", "rows", "q-diffusion-groups"),
        ["ablations.rows.q-diffusion-groups.of", "'q-difusion'", "did you mean 'q-diffusion'"],
    ),
    "row of an unknown method": (
        _put({"method": "qalara"}, "ablations", "rows", "mine"),
        ["ablations.rows.mine.method", "'qalara'", "did you mean 'qalora'"],
    ),
    "row with two recipes": (
        _put({"method": "qalora", "of": "quest-suite"}, "ablations", "rows", "mine"),
        ["ablations.rows.mine", "'quest-suite'", "'qalora'", "one of the two"],
    ),
    "row named as a method": (
        _put({"time_groups": 1}, "ablations", "rows", "q-diffusion"),
        ["ablations.rows.q-diffusion", "name of its own"],
    ),
    "row named as another method": (
        _put({"time_groups": 1}, "ablations", "rows", "qalora"),
        ["ablations.rows.qalora", "name of its own"],
    ),
    "row no folder": (_put({}, "ablations", "rows", "Quest 1"), ["ablations.rows.Quest 1", "small letters"]),
    "row left empty": (_put(None, "ablations", "rows", "mine"), ["ablations.rows.mine", "write {}"]),
    "row of weights only": (
        _put({"method": "adaround"}, "ablations", "rows", "adaround-alone"),
        ["ablations.rows.adaround-alone", "weights only"],
    ),
    "row that starts from nothing": (
        _put({"init": "adarond"}, "ablations", "rows", "mine"),
        ["ablations.rows.mine.init", "'adarond'", "did you mean 'adaround'"],
    ),
    "rows against nothing": (_put("qest", "ablations", "against"), ["ablations.against", "'qest'", "quest-suite"]),
    "shared GPUs of no size": (
        _put({"memory": "lots", "parts": 8}, "share_gpu"),
        ["share_gpu.memory: 'lots' is no amount of memory", "20GB"],
    ),
    "shared GPUs without one": (_put({"memory": "80GB", "parts": 8}, "share_gpu"), ["share_gpu: ", "device: cuda"]),
    "rows of no model": (_put("photos", "ablations", "model"), ["ablations.model", "'photos'", "photos-class"]),
    "rows at no bits": (_put("w4a9", "ablations", "bits"), ["ablations.bits", "'w4a9'"]),
    "groups that do not divide the steps": (
        _put(7, "methods", "quest-suite", "time_groups"),
        ["methods.quest-suite.time_groups: 7 does not divide the 20 steps of", "valid: [1, 2, 4, 5, 10, 20]"],
    ),
    "groups of a row": (
        _put({"time_groups": 3}, "ablations", "rows", "mine"),
        ["ablations.rows.mine.time_groups: 3 does not divide the 20 steps"],
    ),
    "name of the scores of submissions": (_put("scored", "name"), ["name", "'scored'", "another name"]),
    "name no folder": (_put("My run", "name"), ["name", "'My run'", "small letters"]),
    "name too long": (_put("x" * 101, "name"), ["name", "at most 100 small letters"]),
    "row too long": (_put({}, "ablations", "rows", "x" * 101), ["ablations.rows.x", "at most 100 small letters"]),
}


def refused(config, change, words):
    """The error that refuses a changed config is one line, which holds these words."""
    change(config)
    with pytest.raises(ConfigError) as caught:
        validate(config)
    message = str(caught.value)
    assert "\n" not in message
    assert [word for word in words if word not in message] == []


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_one_line_that_names_the_key_and_what_is_valid(default, fault):
    refused(default, *FAULTS[fault])


def test_the_snakefile_imports_nothing_heavy():
    code = "import sys, quest.config, quest.diffusion.models; print(*sys.modules)"
    modules = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, encoding="utf-8"
    ).stdout.split()
    assert {"torch", "numpy", "pandas", "diffusers"} & set(modules) == set()


def test_starting_points_are_found_behind_each_other():
    config = {
        "methods": {"fp": {}, "adaround": {}, "q-diffusion": {"init": "adaround"}, "ptqd": {"init": "q-diffusion"}},
        "grid": [{"model": ["emoji-text"], "method": ["ptqd"], "bits": ["w4a8", "w4a4"]}],
    }
    found = [run.path for run in starting_points(config, runs(config))]
    assert found == [f"emoji-text/q-diffusion/{bits}" for bits in ("w4a8", "w4a4")] + ["emoji-text/adaround/w4a32"]


def test_methods_start_from_a_checkpoint_of_their_bits_or_of_their_weights_alone(default):
    default["methods"] |= {"adaround": {}, "q-diffusion": {"init": "adaround"}, "quest-suite": {"init": "q-diffusion"}}
    validate(default)
    found = {bits: start_of(default, Run("emoji-text", "q-diffusion", bits)) for bits in ("w4a8", "w4a4", "w8a8")}
    assert found == {
        "w4a8": Run("emoji-text", "adaround", "w4a32"),
        "w4a4": Run("emoji-text", "adaround", "w4a32"),
        "w8a8": Run("emoji-text", "adaround", "w8a32"),
    }
    assert start_of(default, Run("emoji-text", "quest-suite", "w4a4")) == Run("emoji-text", "q-diffusion", "w4a4")
    assert start_of(default, Run("emoji-text", "adaround", "w4a32")) is None


def test_only_methods_that_have_recipes_run_and_weights_only_ones_at_their_bits(default):
    default["methods"]["adaround"] = {}
    default["grid"].append({"model": ["emoji-text"], "method": ["adaround"], "bits": ["w4a32"]})
    validate(default)
    default["grid"][-1]["bits"] = ["w4a8"]
    with pytest.raises(ConfigError, match=r"grid\[5\]: adaround at w4a8; it quantizes weights only, e.g. at w4a32"):
        validate(default)


def test_all_methods_has_every_method(default):
    """But for those that only others start from, each has a cell."""
    from baselines import METHODS

    every = yaml.safe_load((CONFIGS[0].parent / "all-methods.yaml").read_text(encoding="utf-8"))
    assert set(every["methods"]) == set(METHODS)
    assert {run.method for run in runs(every)} == set(METHODS) - set(weights_only())


@pytest.mark.parametrize(
    "method", ["rtn", "rtn-mse", "q-diffusion", "ptq4dm", "ptqd", "tfmq-dm", "quest-suite", "quest-paper"]
)
def test_a_method_may_be_given_its_own_defaults(default, method):
    from baselines import METHODS

    parameters = inspect.signature(METHODS[method].quantize).parameters.values()
    told = {p.name: p.default for p in parameters if p.default not in (None, p.empty) and p.name != "ranges"}
    default["methods"][method] = told
    default.pop("ablations")  # has rows named as some of these methods
    validate(default)
    default["methods"][method] = told | {"samples": "1e3"}
    with pytest.raises(ConfigError, match=f"methods.{method}.samples: '1e3'.*text"):
        validate(default)


def test_a_method_stands_in_several_rows(default):
    default["methods"] |= {"q-diffusion": {"init": "weights"}, "weights": {"method": "adaround", "rows": 512}}
    default["methods"]["quest-one-group"] = {"method": "quest-suite", "time_groups": 1}
    validate(default)
    assert recipe_of(default, "quest-one-group") == ("quest-suite", {"time_groups": 1})
    assert recipe_of(default, "quest-suite@2") == ("quest-suite", default["methods"]["quest-suite"] | {"seed": 2})
    start = start_of(default, Run("emoji-text", "q-diffusion@2", "w4a4"))
    assert start == Run("emoji-text", "weights@2", "w4a32")


@pytest.mark.parametrize(
    "name, recipe, words",
    [
        ("mine", {"method": "qest"}, ["methods.mine.method", "'qest'", "quest-suite"]),
        ("mine", {"method": "quest-suite", "groups": 2}, ["methods.mine", "'groups'", "time_groups"]),
        ("mine", {"method": "quest-suite", "samples": "1e3"}, ["methods.mine.samples", "'1e3'"]),
        ("rtn", {"method": "quest-suite"}, ["methods.rtn", "name of its own"]),
        ("quest-suite@1", {"method": "quest-suite"}, ["methods.quest-suite@1", "name of its own"]),
    ],
)
def test_faults_in_a_row_of_its_own(default, name, recipe, words):
    default["methods"][name] = recipe
    with pytest.raises(ConfigError) as caught:
        validate(default)
    assert [word for word in words if word not in str(caught.value)] == []


def test_cells_of_several_seeds(default):
    default["seeds"] = {"method": ["rtn-mse", "quest-suite"], "bits": ["w4a4"], "seed": [0, 1]}
    validate(default)
    assert [run.path for run in seed_runs(default)][:4] == [
        f"emoji-uncond/{method}/w4a4" for method in ("rtn-mse", "rtn-mse@1", "quest-suite", "quest-suite@1")
    ]
    assert {run.model for run in seed_runs(default)} == set(default["models"])
    default["seeds"]["method"] = ["q-diff"]
    with pytest.raises(ConfigError, match="seeds.method: 'q-diff' is not under methods"):
        validate(default)


def test_rows_of_ablations(default):
    cells = ablation_runs(default)
    assert [cell.path for cell in cells[:3]] == [
        f"photos-class/{m}/w4a4" for m in ("quest-suite", "q-diffusion", "ptq4dm")
    ]
    assert {cell.method for cell in cells[3:]} == set(default["ablations"]["rows"])
    assert recipe_of(default, "quest-groups-1") == ("quest-suite", {"init": "adaround", "time_groups": 1})
    assert recipe_of(default, "q-diffusion-released") == (
        "q-diffusion",
        {"init": "adaround", "granularity": "released"},
    )
    assert recipe_of(default, "qalora") == ("qalora", {"init": "adaround"})
    start = Run("photos-class", "adaround-ndtc", "w4a32")
    assert start_of(default, Run("photos-class", "ptq4dm-groups", "w4a4")) == start
    # No weights are made that the grid does not make, but those of the rows on splitting.
    further = set(starting_points(default, cells)) - set(starting_points(default, runs(default)))
    assert {run.path for run in further} == {
        f"photos-class/adaround-{name}/w4a32" for name in ("unsplit", "split-conv1")
    }
    assert recipe_of(default, "q-diffusion-unsplit") == ("q-diffusion", {"init": "adaround-unsplit", "split": False})
    del default["ablations"]
    assert ablation_runs(default) == []
