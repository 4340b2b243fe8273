"""What must not move while code is rearranged: the numbers that every method and every shipped model gives, pinned.

Each method quantizes tiny pipelines with a few steps at its own learning rates, and what its packed checkpoint says
(codes, scales, zero points, and what stays in float) is compared with `pins.json`. Of each shipped model it is the
prediction of one denoiser call: in float, and quantized by rtn on the reference and on the integer kernel.

Sums of floats depend on torch and on the processor. On a platform that `pins.json` knows (see `platform`), SHA-256 of
the values must be equal. Elsewhere samples of the values are compared to a tolerance, which finds another recipe, but
not another order of additions. The module's last line says how many were compared in which way.

This pins the numbers of another platform, of a new method, or new ones in place of old (with `-k`, of some cells):

    pytest tests/test_pins.py --write-pins

New ones are right where numbers should change: a fault was mended, a default was changed. The commit then says which
changed, and why. They are wrong where code was only moved, renamed or made faster: then that change has a fault. Where
a checkpoint's names change, let `contents` translate them to those pinned here.
"""

import hashlib
import json
import math
from collections import Counter
from dataclasses import replace
from functools import cache
from inspect import signature
from pathlib import Path
from platform import uname
from types import SimpleNamespace

import numpy
import pytest
import torch
import yaml
from safetensors import safe_open

import quest
from baselines import METHODS
from quest.config import parse_bits
from quest.diffusion import models
from quest.diffusion.calibration_set import collect
from quest.kernels.cpu import core

PINS = Path(__file__).with_name("pins.json")
RECIPES = Path(__file__).parents[1] / "workflow" / "config" / "all-methods.yaml"

# Every method on every kind of pipeline. On the first it starts from the checkpoint that its recipe names.
KINDS = {"uncond": "w4a4", "class": "w4a8", "text": "w4a4"}
FROM_STARTS = "uncond"
STARTS = {
    m: recipe["init"]
    for m, recipe in yaml.safe_load(RECIPES.read_text(encoding="utf-8"))["methods"].items()
    if "init" in recipe
}
# What the protocols of such models say, on the tiny ones too. Two kinds pin weights without split shortcuts, as LSUN's.
PROTOCOLS = {"uncond": dict(activation_ranges="ema-symmetric", split=False), "class": dict(split=False), "text": {}}
QUICK = dict(  # a few steps, at the learning rates of the presets
    samples=4,
    rows=8,
    batch=2,
    scaling_iterations=4,
    weight_iterations=16,  # AdaRound's rate is 20 over their number
    activation_iterations=4,
    iterations=4,
    grid=2,
    tla_iterations=4,
    cma_iterations=4,
)
BITS = ("w4a4", "w8a8")  # of the shipped models

# Where hashes cannot be compared: how many values of each part are, and, by part, how far the mean magnitude may lie
# from the pinned one (as a share of it), how far a value may (as a share of it or of the mean, the larger one), and
# which share of them may lie further. Learning on random weights amplifies the last bit of a sum: another instruction
# set moved as many as half of what is allowed here.
SAMPLES = 100
TOLERANCES = {
    "codes": (1e-3, 0.01, 0.4),
    "weight scales": (1e-3, 0.01, 0.0),
    "activation scales": (0.04, 0.1, 0.25),
    "zero points": (0.01, 0.01, 0.25),
    "floats": (1e-3, 0.03, 0.02),
    "prediction in float": (1e-4, 1e-3, 0.0),
    "prediction": (0.05, 0.1, 0.8),
}

# Cells whose numbers differ more between processors, by name and part, with what was seen.
OTHER_TOLERANCES = {
    # Nearest codes at four bits give images of noise there: one code that rounds the other way moves all that follow.
    # An Intel Xeon with AMX has 0.88 and 0.87 of the pinned magnitude. Codes and scales are compared as everywhere.
    ("scenes-text rtn w4a4", "prediction"): (0.25, 0.1, 0.8),
    ("scenes-text rtn w4a4 integer", "prediction"): (0.25, 0.1, 0.8),
    # Rows vote for the power of two of a channel; where they are split, another processor has a shortcut with powers
    # more or less, and so another number of floats (8,264 for 8,200 on that Xeon). None: only that there are some.
    ("uncond dmq", "floats"): None,
}


def platform() -> str:
    """What the last bits of a sum depend on: torch, what of it and of the core runs here, and the processor's model.

    The core's instruction set matters for learned activation scales, and torch's for all. oneDNN, which computes
    convolutions in float, dispatches on its own, by instruction set and caches, hence the model.
    """
    isa = core.best() if core.available() else "none"
    return f"torch {torch.__version__} {torch.backends.cpu.get_cpu_capability()}, core {isa}, {processor()}"


def processor() -> str:
    """Vendor, family and model as numbers: a virtual machine may hide the name."""
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0]
    except OSError:
        return uname().processor
    fields = dict(map(str.strip, line.split(":", 1)) for line in first.splitlines() if ":" in line)
    wanted = ("vendor_id", "cpu family", "model", "CPU implementer", "CPU part")
    return " ".join(fields[name] for name in wanted if name in fields)


class Pins:
    """The file of pins, and how many of them were compared in which way."""

    RULE = f"the top of {Path(__file__).name} says when --write-pins is right"

    def __init__(self, write: bool):
        self.write, self.platform, self.compared = write, platform(), Counter()
        self.content = json.loads(PINS.read_text(encoding="utf-8")) if PINS.exists() else {"hashes": {}, "samples": {}}
        self.hashes = self.content["hashes"].get(self.platform, {})

    def check(self, name: str, parts: dict[str, dict[str, numpy.ndarray]]) -> None:
        """Assert that {part: {name: values}} are as pinned; when writing, pin them."""
        hashes = {part: digest(values) for part, values in parts.items()}
        samples = {part: sampled(values) for part, values in parts.items()}
        if name in self.hashes:
            self.compared["by hash"] += 1
            wrong = [
                f"{p}: another hash" for p in hashes | self.hashes[name] if hashes.get(p) != self.hashes[name].get(p)
            ]
        else:
            self.compared["by samples, to a tolerance"] += 1
            pinned = self.content["samples"].get(name, {})
            bounds = {p: OTHER_TOLERANCES.get((name, p), TOLERANCES[p]) for p in samples | pinned}
            wrong = [f"{p}: {said}" for p in bounds if (said := apart(bounds[p], samples.get(p), pinned.get(p)))]
        if not self.write:
            assert not wrong, f"{name} does not give the numbers that are pinned ({self.RULE}): {'; '.join(wrong)}"
            return
        if wrong:  # hashes of other platforms are of the old numbers
            for others in self.content["hashes"].values():
                others.pop(name, None)
            self.content["samples"][name] = samples
        self.hashes[name] = hashes

    def save(self) -> None:
        """Write the file, one part of one pin to a line."""
        self.content["hashes"][self.platform] = self.hashes
        PINS.write_text(laid_out(self.content, 3) + "\n", encoding="utf-8")


def laid_out(value, levels: int) -> str:
    """JSON with the keys of the outer levels sorted, each on a line of its own."""
    if not isinstance(value, dict) or not levels:
        return json.dumps(value)
    rows = [f"{json.dumps(key)}: {laid_out(value[key], levels - 1)}" for key in sorted(value)]
    return "{\n" + ",\n".join(rows) + "\n}"


def digest(values: dict[str, numpy.ndarray]) -> str:
    """SHA-256 of names, shapes and bytes."""
    found = hashlib.sha256()
    for name, value in sorted(values.items()):
        found.update(f"{name} {value.shape} ".encode())
        found.update(numpy.ascontiguousarray(value).tobytes())
    return found.hexdigest()


def sampled(values: dict[str, numpy.ndarray]) -> list[int | float]:
    """How many values there are, their mean magnitude, and some of them at equal distances."""
    flat = numpy.concatenate([value.astype(numpy.float64).ravel() for _, value in sorted(values.items())])
    chosen = flat[numpy.linspace(0, len(flat) - 1, min(SAMPLES, len(flat))).astype(int)]
    rounded = (float(f"{value:.5g}") for value in (len(flat), abs(flat).mean(), *chosen))
    return [int(value) if value.is_integer() else value for value in rounded]


def apart(bounds: tuple | None, own: list[float] | None, pinned: list[float] | None) -> str | None:
    """How samples differ by more than platforms do; None where they do not. bounds: one of TOLERANCES; None: any."""
    if own is None or pinned is None:
        return "is missing" if own is None else "is not pinned"
    if bounds is None:
        return None
    (count, mean, *values), (pinned_count, pinned_mean, *pinned_values) = own, pinned
    if count != pinned_count:
        return f"{count:g} values, not {pinned_count:g}"
    of_mean, tolerance, share = bounds
    if abs(mean - pinned_mean) > of_mean * pinned_mean:
        return f"mean magnitude {mean:g}, not {pinned_mean:g}"
    pairs = zip(values, pinned_values, strict=True)
    far = [f"{a:g} for {b:g}" for a, b in pairs if abs(a - b) > tolerance * max(abs(b), pinned_mean)]
    return f"{len(far)} of {len(values)} samples, such as {far[0]}" if len(far) > share * len(values) else None


def contents(path) -> dict[str, dict[str, numpy.ndarray]]:
    """What a packed checkpoint says: {part: {name: values}}. Codes are unpacked; they count from the smallest one."""
    with safe_open(path, "np") as file:
        shapes = json.loads(file.metadata()["quest"])["shapes"]
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    parts = {}
    for name, value in tensors.items():
        module, _, leaf = name.rpartition(".")
        if leaf == "codes":
            part, value = "codes", unpacked(value, shapes[module])
        elif leaf == "scale":
            part = "weight scales" if module.endswith(".weight_quantizer") else "activation scales"
        else:
            part = "zero points" if leaf == "zero_point" else "floats"
        parts.setdefault(part, {})[name] = value
    return parts


def unpacked(packed: numpy.ndarray, shape: list[int]) -> numpy.ndarray:
    """The codes of a weight. Where a row has less bytes than the weight's has values, two share one, low half first."""
    row = math.prod(shape[1:])
    if packed.ndim == 1:  # channels of different bits
        return packed
    if packed.shape[1] < row:
        packed = numpy.stack([packed & 15, packed >> 4], 2).reshape(len(packed), -1)[:, :row]
    return packed.astype(numpy.int32).reshape(shape)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pins(request):
    made = Pins(request.config.getoption("--write-pins"))
    yield made
    if made.write:
        made.save()
    said = "written" if made.write else ", ".join(f"{n} compared {how}" for how, n in made.compared.items())
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\npins on {made.platform}: {said}")


@pytest.fixture(scope="module")
def quantized(request, tmp_path_factory):
    """(kind, method) -> a tiny pipeline, quantized once, from a calibration set of two trajectories of two steps."""
    starts = tmp_path_factory.mktemp("starts")

    @cache
    def tiny(kind):
        pipe, model = (request.getfixturevalue(f"{kind}_{what}") for what in ("pipe", "model"))
        model = replace(model, steps=2, batch_size=2, time_groups=2, **PROTOCOLS[kind])
        return pipe, model, collect(pipe, model, "calibration", 2)

    @cache
    def make(kind, method):
        pipe, model, calibration = tiny(kind)
        bits = "w32a32" if method == "fp" else "w4a32" if METHODS[method].weights_only else KINDS[kind]
        recipe = model.recipe(METHODS[method].quantize, parse_bits(bits)[1])
        recipe |= {
            name: value for name, value in QUICK.items() if name in signature(METHODS[method].quantize).parameters
        }
        if kind == FROM_STARTS and method in STARTS:
            recipe["init"] = str(starts / f"{method}.safetensors")
            quest.save(make(kind, STARTS[method]), recipe["init"], floats=True)
        return quest.quantize(pipe, method, bits, calibration=calibration, **recipe)

    return make


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_method(kind, method, quantized, pins, tmp_path):
    pipe = quantized(kind, method)
    if method == "fp":
        parts = {"floats": {name: value.numpy() for name, value in pipe.unet.state_dict().items()}}
    else:
        quest.save(pipe, tmp_path / "model.safetensors")
        parts = contents(tmp_path / "model.safetensors")
    pins.check(f"{kind} {method}", parts)


@pytest.fixture(scope="module", params=["scenes-uncond", "scenes-class", "scenes-text"])
def shipped(request, tmp_path_factory):
    """A shipped model, the inputs of its denoiser's first call, and its checkpoints by rtn."""
    model = replace(models.get(request.param), steps=2, batch_size=2)
    pipe = model.load()
    calibration = collect(pipe, model, "calibration", 2)
    folder = tmp_path_factory.mktemp(model.name)
    for bits in BITS:
        recipe = model.recipe(METHODS["rtn"].quantize, int(bits[3]))
        new = quest.quantize(pipe, "rtn", bits, calibration=calibration, **recipe)
        quest.save(new, folder / bits)
    inputs = calibration.inputs(calibration.calls()[:2].flatten())
    return SimpleNamespace(name=model.name, pipe=pipe, inputs=inputs, folder=folder)


@torch.no_grad()
def predicted(pipe, inputs) -> dict[str, numpy.ndarray]:
    return {"sample": pipe.unet(**inputs).sample.numpy()}


def test_shipped_model_in_float(shipped, pins):
    pins.check(f"{shipped.name} fp", {"prediction in float": predicted(shipped.pipe, shipped.inputs)})


@pytest.mark.parametrize("bits", BITS)
def test_shipped_model_on_the_reference_kernel(shipped, bits, pins):
    pipe = quest.load(shipped.pipe, shipped.folder / bits, kernel="reference")
    parts = contents(shipped.folder / bits) | {"prediction": predicted(pipe, shipped.inputs)}
    pins.check(f"{shipped.name} rtn {bits}", parts)


@pytest.mark.skipif(not core.available(), reason="no compiled core: installed without a C++ compiler")
@pytest.mark.parametrize("bits", BITS)
def test_shipped_model_on_the_integer_kernel(shipped, bits, pins):
    pipe = quest.load(shipped.pipe, shipped.folder / bits, kernel="integer")
    assert not pipe.unet.placement.refused
    pins.check(f"{shipped.name} rtn {bits} integer", {"prediction": predicted(pipe, shipped.inputs)})
