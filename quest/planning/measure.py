"""Measures what the steps of a run cost on this machine: seconds and memory of each, for the table of `costs`.

Most steps are measured with few and with many rows, which gives a fixed part and a part per row of both. A rehearsal is
the same on random weights, with as little work as that takes: one repeat, one or two rows of a large model, AdaRound
in the unit with the most work.
"""

import math
import time
from collections.abc import Callable
from functools import partial

from baselines.method import Step
from quest.planning import shapes
from quest.planning.costs import MEASURED, SAMPLED, SCALED, STEPS
from quest.planning.meter import Meter
from quest.runtime import memory

LARGE = 1e8  # parameters of a denoiser from which the graph of a row takes gigabytes
EVERY = 16  # of the layers of a large model, in the search of weight ranges


def measure(
    model,
    device: str,
    batch: int | None = None,
    repeats: int = 3,
    random: bool = False,
    wanted: set[str] | None = None,
    limit: str | None = None,
    done: Callable[[list[dict]], object] = lambda rows: None,
) -> list[dict]:
    """Measure a model's steps on this machine. Returns rows with `costs.COLUMNS`; done(rows) sees those of each step.

    Without a published model's weights, or with `random`, its architecture is rehearsed with random ones. wanted: the
    steps to measure, names of `costs.SECONDS`; default: all. limit: what the process may address, e.g. "20GB".
    batch: samples per call; default: a sampling batch, twice as many under guidance, or of a rehearsal two.
    Raises FileNotFoundError where the weights of a model that ships are missing, MemoryError where a step does not fit,
    and ValueError for a transformer.
    """
    import torch

    from quest.diffusion import published
    from quest.diffusion.denoisers import denoiser_of, name_of

    if limit:
        memory.limit(memory.parse(limit))
    try:
        pipe = None if random else model.load(device=device)
    except FileNotFoundError:
        if model.ships:
            raise
        pipe = None
    random = pipe is None
    pipe = pipe or published.rehearsed(model, device)
    if name_of(pipe) != "unet":
        raise ValueError(f"model: {model.name} has a {type(denoiser_of(pipe)).__name__}; valid: models with a U-Net")
    denoiser = denoiser_of(pipe)
    weights = sum(p.numel() for p in denoiser.parameters())
    meter = Meter(model.name, device, "random" if random else "trained", 1 if random else repeats, wanted, done)
    meter.add(1, start=time.process_time())  # from the start of the process: imports and loading
    block = torch.ones(2**27, dtype=torch.float64, device=device)
    meter.add(1, copy=min(meter.seconds(block.clone) for _ in range(3)) / (block.nbytes / 1e9))
    del block
    # Rows of calls, and of mini-batches.
    calls = batch or (2 if random else model.batch_size * model.halves)
    few_calls = max(1, calls // 2 if random else calls // 4)
    many = 2 if random else min(max(calls, 2), 4 if weights >= LARGE else 16)
    few = max(1, many // 4)
    arguments = shapes.inputs(denoiser, model, max(calls, many), device, pipe)

    def first(rows):
        return {name: value[:rows] for name, value in arguments.items()}

    with torch.no_grad():
        meter.per_row("call", lambda rows: denoiser(**first(rows)), few_calls, calls)
        _images(meter, pipe, model, 1 if random else min(model.batch_size, calls), random)
    student = _student(pipe, model, _calibration(first(1)))
    # Of a quantized pipeline that samples, neither the network it came from nor the floats of its layers are there.
    unneeded = sum(p.nbytes for p in denoiser.parameters())
    unneeded += sum(b.nbytes for n, b in student.named_buffers() if n.rpartition(".")[2] == "origin")
    with torch.no_grad():
        meter.per_row("quantized call", lambda rows: student(**first(rows)), few_calls, calls, unneeded)
    _quantizing(meter, pipe, student, model, first, few, many, scaled=random)
    meter.add(many, memory=meter.most)
    return meter.rows


def _calibration(arguments):
    """A calibration set of one denoiser call: one row per sample, with zeros as the predicted noise."""
    import torch

    from quest.diffusion.calibration_set import CalibrationSet

    arguments = dict(arguments)
    sample, timestep = arguments.pop("sample"), arguments.pop("timestep")
    order = torch.arange(len(sample), device=sample.device)
    return CalibrationSet(sample, timestep, torch.zeros_like(sample), order, torch.zeros_like(order), arguments)


def _student(pipe, model, calibration):
    """The denoiser at W4A8 with whole ranges, those of activations in one time group; frozen, as it is sampled."""
    from quest.learning.calibrate import calibrate
    from quest.quantization import ranges
    from quest.quantization.layers import freeze, quant_layers
    from quest.quantization.swapping import swap
    from quest.quantization.timegroups import TimeGroups

    groups = TimeGroups(calibration.timesteps)
    student = swap(pipe, 4, 8, keep=model.keep, softmax_bits=model.softmax_bits, groups=groups).unet
    for _, layer in quant_layers(student):
        layer.choose_weight_range()
    freeze(student)
    calibrate(student, calibration, ranges.minmax, samples=len(calibration), seed=0)
    return student


def _quantizing(meter, pipe, student, model, first, few, many, scaled):
    """Costs of the steps of methods. Learning rates are zero, so no measurement changes the next one."""
    import quest
    from quest.learning.calibrate import calibrate
    from quest.quantization import ranges
    from quest.quantization.layers import freeze, quant_layers

    calibration = _calibration(first(many))

    def search(rows):
        calibrate(student, calibration, ranges.mse_zero_point, samples=rows, seed=0)

    meter.line("ranges", search, few, many)
    layers = sorted((m for _, m in quant_layers(student)), key=lambda layer: -math.prod(layer.weight_shape))
    searched = layers[::EVERY] if scaled else layers
    share = sum(math.prod(x.weight_shape) for x in layers) / sum(math.prod(x.weight_shape) for x in searched)

    def search_weights():
        for layer in searched:
            ranges.mse(layer.float_weight, layer.weight_quantizer.spec)

    meter.once("weight ranges", search_weights, 1, share, SAMPLED if scaled else MEASURED)
    steps = {}
    if meter.wanted & {"rounding", "step learning"}:
        if scaled:
            steps = _of_largest_unit(student, pipe.unet, shapes.work(model), first, many)
        else:
            steps = _of_all_units(student, pipe, calibration)
    for what, (step, scales) in steps.items():
        meter.iterations(what, step, few, many, scales, SCALED if scaled else MEASURED)
        freeze(student)
    for what, step in STEPS.items():

        def learn(iterations, batch, step=step):
            step.learn(student, pipe, _calibration(first(batch)), model, iterations, batch)

        meter.iterations(what, step._replace(learn=learn), few, many)
        freeze(student)

    def whole(rows, method, bits, **settings):
        quest.quantize(pipe, method, bits, calibration=calibration, rows=rows, **settings)

    released = partial(whole, method="ptq4dm-as-released", bits="w8a8")
    meter.line("threshold search", released, many, 2 * many)  # it may draw more rows than the set has
    meter.line("gptq", partial(whole, method="gptq", bits="w4a32"), few, many)
    meter.line("svdquant", partial(whole, method="svdquant", bits="w4a4", iterations=1, grid=1), few, many)


def _of_all_units(student, pipe, calibration):
    """{step: (Step, scales)} of a pass over all units, which learn one after the other."""
    import torch

    from quest.learning.adam import Descent
    from quest.learning.reconstruction import reconstruct_activations, reconstruct_weights

    def step(reconstruct):
        def learn(iterations, batch):
            descent = Descent(iterations, batch, 0.0, torch.Generator().manual_seed(0))
            reconstruct(student, pipe.unet, calibration, descent)

        return Step(learn, ()), (1, 1)

    return {"rounding": step(reconstruct_weights), "step learning": step(reconstruct_activations)}


def _of_largest_unit(student, teacher, work, first, many):
    """The same of the unit with the most work alone.

    Its fixed cost is in proportion to weights, or to activation quantizers; that of a row to multiply-accumulates.
    """
    import torch
    from torch.utils._pytree import tree_map

    from quest.diffusion.denoisers import hooked
    from quest.learning import reconstruction
    from quest.learning.adam import Descent
    from quest.learning.units import call_modules, units
    from quest.quantization.layers import input_quantizers, quant_layers

    def of_unit(unit):
        return sum(n for name, n in work.items() if any(f"{name}.".startswith(f"{m}.") for m in unit.modules))

    met: dict[torch.nn.Module, dict] = {}  # module -> arguments

    def keep(module, args, kwargs):
        met[module] = {"args": args, "kwargs": kwargs}

    with hooked(m.register_forward_pre_hook(keep, with_kwargs=True) for n, m in student.named_modules() if n):
        unit = max((unit for unit in units(student, first(1)) if unit.layers), key=of_unit)
    arguments = met[next(iter(unit.modules.values()))]
    met.clear()
    # As many rows as are wanted, all equal: what they hold changes no cost.
    arguments = tree_map(lambda v: v.repeat(many, *[1] * (v.ndim - 1)) if isinstance(v, torch.Tensor) else v, arguments)
    call = partial(call_modules, **arguments, n=many, device=student.device)
    forwards = [module.forward for module in unit.modules.values()]
    exact = [teacher.get_submodule(name).forward for name in unit.modules]

    def learn(function, learned, iterations, batch):
        rows = torch.arange(batch, device="cpu")
        with torch.no_grad():
            target = unit.arrange(call(exact, rows), batch)
        run, wanted = lambda r: unit.arrange(call(forwards, r), len(r)), lambda r: target[r]
        descent = Descent(iterations, batch, 0.0, torch.Generator().manual_seed(0))
        function(unit.name, learned, run, wanted, batch, descent)

    def rounding(iterations, batch):
        for layer in unit.layers.values():
            layer.thaw()
        with reconstruction.float_activations(input_quantizers(student).values()):
            learn(reconstruction.learn_rounding, unit.layers, iterations, batch)

    def step_learning(iterations, batch):
        with student.time_groups.inside(student.time_groups.starts[0]):
            learn(reconstruction.learn_steps, unit.quantizers, iterations, batch)

    weights = {name: math.prod(layer.weight_shape) for name, layer in quant_layers(student)}
    rows = sum(work.values()) / of_unit(unit)
    return {
        "rounding": (Step(rounding, ()), (sum(weights.values()) / sum(map(weights.get, unit.layers)), rows)),
        "step learning": (Step(step_learning, ()), (len(input_quantizers(student)) / len(unit.quantizers), rows)),
    }


def _images(meter, pipe, model, batch, random):
    import torch

    from quest.diffusion.sampling import decode
    from quest.metrics import features

    config = pipe.unet.config
    latents = torch.randn(batch, config.in_channels, config.sample_size, config.sample_size, device=meter.device)
    images = []

    def decoding(rows):
        images[:] = [decode(pipe, latents[:rows])]

    meter.per_row("decode", decoding, batch, batch)
    if "features" not in meter.wanted:
        return
    images = images or [decode(pipe, latents)]
    try:
        networks = (features.untrained if random else features.loaded)(model.extractor, model.clip)
    except OSError:  # Inception's weights are missing and cannot be fetched
        return

    def extracting(rows):
        features.of_networks(images[0][:rows], *networks, ["a photograph"] * rows, meter.device)

    meter.per_row("features", extracting, batch, batch)
