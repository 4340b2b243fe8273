"""A checkpoint whose hashes are right and whose content is not: refused by file and field in one line."""

import copy
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import quest
from quest.quantization import header as headers
from quest.runtime.hashing import tensor_hash


@pytest.fixture(scope="module")
def saved(uncond_pipe, uncond_calibration, tmp_path_factory):
    """(header, tensors) of a checkpoint with time groups and codes of 4 bits and of 5."""
    keep = {"conv_in": 5, "conv_out": 8}
    recipe = dict(tla_iterations=1, cma_iterations=1, time_groups=3, samples=2, keep=keep)
    pipe = quest.quantize(uncond_pipe, "quest-suite", "w4a4", calibration=uncond_calibration, **recipe)
    path = tmp_path_factory.mktemp("header") / "m.safetensors"
    quest.save(pipe, path)
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["quest"]), {name: file.get_tensor(name) for name in file.keys()}


def forged(saved, folder, change):
    """The file that somebody would write who knows the format: `change(header, tensors)`, then every hash anew."""
    header, tensors = copy.deepcopy(saved[0]), {name: value.clone() for name, value in saved[1].items()}
    change(header, tensors)
    if header.get("hashes") == saved[0]["hashes"]:
        header["hashes"] = {name: tensor_hash(value) for name, value in tensors.items()}
    header["hash"] = headers.header_hash(header)
    path = folder / "forged.safetensors"
    save_file(tensors, path, {"quest": json.dumps(header)})
    return path


def test_what_is_forged_without_a_change_is_read(uncond_pipe, saved, tmp_path):
    quest.load(uncond_pipe, forged(saved, tmp_path, lambda header, tensors: None))


def test_a_checkpoint_of_an_old_name_is_read(uncond_pipe, saved, tmp_path):
    path = forged(saved, tmp_path, lambda header, tensors: header.update(method="quest"))
    assert headers.read(path)["method"] == "quest"
    quest.load(uncond_pipe, path)


def put(*path):
    *parents, last = path

    def change(header, value):
        for key in parents:
            header = header[key]
        header[last] = value

    return change


ANYTHING = [None, True, 4.0, -1, "4", [], {}, [None], {"x": None}, 2**40]
# Path in the header: the values of ANYTHING that are valid there.
PLACES = {
    ("weights",): [],
    ("format",): [],
    ("denoiser",): [],
    ("splits",): [{}],
    ("layers",): [],
    ("layers", "conv_in"): [],
    ("layers", "conv_in", 0): [],
    ("layers", "conv_in", 0, "bits"): [],
    ("layers", "conv_in", 0, "symmetric"): [True],
    ("layers", "conv_in", 0, "wide"): [],
    ("layers", "conv_in", 1, "axis"): [None, -1],
    ("shapes",): [],
    ("shapes", "conv_in"): [],
    ("shapes", "conv_in", 0): [],
    ("attentions",): [],
    ("time_groups",): [],
    ("time_groups", 0): [],
    ("timesteps",): [],
    ("timesteps", 0): [],
    ("granularity",): [],
    ("hashes",): [],
    ("hashes", "conv_in.bias"): [],
    ("method",): ["4"],
    ("bits",): [],
    ("recipe",): [{}, {"x": None}],
    ("cost",): [{}, {"x": None}],
    ("cost", "stages"): [[]],
    ("cost", "stages", 0, "iterations"): [],
    ("seconds",): [4.0, 2**40],
    ("peak_memory",): [4.0, 2**40],
    ("init",): [{}, {"x": None}],
    ("provenance",): [{}, {"x": None}],
}


@pytest.mark.parametrize("place", PLACES, ids=lambda place: ".".join(map(str, place)))
def test_a_header_field_of_another_type_or_range(uncond_pipe, saved, tmp_path, place):
    for value in ANYTHING:
        if any(type(value) is type(valid) and value == valid for valid in PLACES[place]):
            continue
        if place == ("time_groups",) and value is None:
            continue  # the scales are of three groups then, see below
        path = forged(saved, tmp_path, lambda header, _, value=value: put(*place)(header, value))
        with pytest.raises(ValueError, match=r"forged\.safetensors") as caught:
            quest.load(uncond_pipe, path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("field", ["weights", "layers", "shapes", "splits", "attentions", "hashes", "hash", "format"])
def test_a_missing_field(uncond_pipe, saved, tmp_path, field):
    path = forged(saved, tmp_path, lambda header, _: header.pop(field, None))
    if field == "hash":
        with safe_open(path, "pt") as file:
            header = json.loads(file.metadata()["quest"])
        save_file(saved[1], path, {"quest": json.dumps({k: v for k, v in header.items() if k != "hash"})})
    with pytest.raises(ValueError, match=rf"forged\.safetensors.*{field}"):
        quest.load(uncond_pipe, path)


@pytest.mark.parametrize("text", ["NaN", "[]", "null", '"text"', "{", '{"format": NaN}'])
def test_a_header_that_is_no_mapping(uncond_pipe, saved, tmp_path, text):
    save_file(saved[1], tmp_path / "forged.safetensors", {"quest": text})
    with pytest.raises(ValueError, match=r"forged\.safetensors"):
        quest.load(uncond_pipe, tmp_path / "forged.safetensors")


def filled(name, number):
    return lambda header, tensors: tensors[name].reshape(-1)[:1].fill_(number)


def renamed(header, tensors):
    tensors["nowhere.scale"] = tensors.pop("conv_in.input_quantizer.scale")


SCALE, ZERO = "conv_in.input_quantizer.scale", "conv_in.weight_quantizer.zero_point"
TENSORS = {
    "scale of nan": (filled(SCALE, torch.nan), "scale is not finite"),
    "scale of infinity": (filled(SCALE, torch.inf), "scale is not finite"),
    "scale of zero": (filled(SCALE, 0), "scale .*not positive"),
    "negative scale": (filled(SCALE, -1), "scale .*not positive"),
    "zero point of nan": (filled(ZERO, torch.nan), "zero_point is not finite"),
    "zero point between": (filled(ZERO, 0.5), "zero_point .*fraction"),
    "bias of infinity": (filled("conv_in.bias", -torch.inf), "conv_in.bias is not finite"),
    "code beyond its bits": (filled("conv_in.codes", 0x20), "conv_in.codes holds a code that 5 bits do not have"),
    "codes of another shape": (
        lambda header, tensors: tensors.update({"conv_in.codes": tensors["conv_in.codes"][:, 1:].contiguous()}),
        "conv_in.codes is torch.uint8",
    ),
    "codes of another type": (
        lambda header, tensors: tensors.update({"conv_in.codes": tensors["conv_in.codes"].float()}),
        "conv_in.codes is torch.float32",
    ),
    "scales of too few groups": (
        lambda header, tensors: tensors.update({SCALE: torch.cat([tensors[SCALE]] * 2)[:2].contiguous()}),
        "or not of its groups",
    ),
    "scales of groups without groups": (
        lambda header, tensors: header.update(time_groups=None),
        "or not of its groups",
    ),
    "a quantizer without scale": (renamed, "conv_in.input_quantizer.scale is missing"),
    "a name that is no line": (
        lambda header, tensors: tensors.update({"x\u2028\n" * 999: torch.ones(1)}),
        r"^[^\n\u2028]{,1100}$",
    ),
    "statistics of a name that is no line": (
        lambda header, tensors: tensors.update({"scheduler.\n": torch.ones(1)}),
        r"the scheduler's statistics are \\n; needed: timesteps",
    ),
    "a layer that is none": (
        lambda header, tensors: [header[key].update(nowhere=header[key]["conv_in"]) for key in ("layers", "shapes")],
        "nowhere",
    ),
    "a split behind the last channel": (
        lambda header, tensors: header["splits"].update(conv_in=99),
        "splits conv_in at 99",
    ),
    "time groups without timesteps": (lambda header, tensors: header.pop("timesteps"), "no timesteps"),
}


@pytest.mark.parametrize("fault", TENSORS)
def test_tensors_that_are_not_what_the_header_says(uncond_pipe, saved, tmp_path, fault):
    change, words = TENSORS[fault]
    with pytest.raises(ValueError, match=words):
        quest.load(uncond_pipe, forged(saved, tmp_path, change))
