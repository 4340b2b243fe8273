"""What a config will cost before anything starts: jobs, hours, disk and memory, from measured costs of single steps.

What was not measured on a machine is said to be unknown, and no total contains a guess.
"""

import functools
import math
from collections import Counter
from dataclasses import dataclass
from types import SimpleNamespace

from baselines import METHODS
from baselines.method import keywords
from quest.config import FULL_PRECISION, Run, parse_bits, recipe_of, runs, starting_points
from quest.diffusion.models import MODELS, Model
from quest.planning import measure

FLOAT = 4  # bytes of a float32
INCEPTION_VALUES = 2048 + 2023 + 1008
FEATURE_VALUES = {"scenes": 64 + 112 + 48, "adm": INCEPTION_VALUES}
FEATURE_VALUES |= {"torch-fidelity": INCEPTION_VALUES, "clean": INCEPTION_VALUES}
CLIP_VALUES = {None: 0, "scenes-clip": 2 * 64, "ViT-B-16": 2 * 512}
RANGES_SAMPLES = 32  # per timestep, of the ranges that the figures show


@dataclass(frozen=True)
class Shape:
    """Sizes of a model: denoiser parameters, values of a latent and of an image, values of the context of a sample."""

    parameters: int
    latent: int
    image: int
    context: int


@dataclass(frozen=True)
class Part:
    """Jobs of one kind of one model: hours is NaN where a cost was not measured."""

    model: str
    kind: str
    jobs: int
    hours: float
    bytes: float
    missing: tuple[str, ...] = ()


def cells(config: dict) -> tuple[list[Run], list[Run]]:
    """(cells that are sampled, checkpoints that are made): full precision and starting points included."""
    grid = runs(config)
    sampled = list(dict.fromkeys([Run(run.model, *FULL_PRECISION) for run in grid] + grid))
    made = [run for run in grid if run.method != FULL_PRECISION[0]]
    return sampled, list(dict.fromkeys(made + starting_points(config, grid)))


def jobs(config: dict) -> Counter:
    """Jobs of each rule, as `snakemake -n` counts them where nothing is there yet."""
    grid, (sampled, made) = runs(config), cells(config)
    settings = config["models"]
    drawn = dict.fromkeys(run.model for run in sampled)
    prepared = [name for name in settings if MODELS[name].origin]
    pairs = {(run.model, run.bits) for run in grid if run.method != FULL_PRECISION[0]}
    count = Counter(
        {
            "model": len(prepared),
            "network": len({net for name in drawn for net in _networks(MODELS[name])}),
            "tiny_checkpoint": sum(settings[n].get("checkpoint", "").startswith("results/") for n in prepared),
            "reference": sum(_has_reference(name, settings[name]) for name in drawn),
            "trajectories": len(settings),
            "evaluation": len(drawn),
            "quantize": len(made),
            "sample": sum(settings[run.model].get("shards", 1) for run in sampled),
            "metrics": len(grid),
            "tables": 1,
            "curves": 1,
            "grid": sum(settings[model].get("keep_images", True) for model, _ in pairs),
            "all": 1,
        }
    )
    return +count


def _networks(model):
    """The networks of a model's metrics that do not ship."""
    return ({"inception"} if model.extractor != "scenes" else set()) | ({model.clip} - {None, "scenes-clip"})


def _has_reference(name, settings):
    return MODELS[name].origin is not None and MODELS[name].extractor != "scenes" and settings["reference"] != "none"


def shape(model: Model) -> Shape:
    """Sizes of a model, exact without its weights."""
    unet = _denoiser(model.name)
    config, width = unet.config, measure.tokens(model)
    if model.origin is None:
        side = 64
    elif model.origin.compvis is None:
        side = config.sample_size  # its latents are the pixels
    else:
        side = config.sample_size * (8 if config.in_channels == 4 else 4)  # KL-f8 has four channels, VQ-f4 three
    return Shape(
        parameters=sum(p.numel() for p in unet.parameters()),
        latent=config.in_channels * config.sample_size**2,
        image=3 * side**2,
        context=width * config.cross_attention_dim if width else 0,
    )


@functools.cache
def _denoiser(name):
    from quest.diffusion import published

    return published.denoiser(MODELS[name])


@functools.cache
def _work(name):
    from quest.quantization import cost

    unet = _denoiser(name)
    return cost.macs(unet, measure.inputs(unet, MODELS[name], 1, "meta"))


@functools.cache
def footprint(name: str, bits: str) -> dict:
    """`quest.quantization.cost.footprint` of a model at some bits, exact without weights.

    Of the common stack: every layer quantized, with the model's exceptions, one scale per output channel of a weight
    and one per activation tensor. A method with time groups or split shortcuts stores 8 bytes more for each further
    scale.
    """
    from quest.quantization import cost
    from quest.quantization.swapping import swap

    model, unet = MODELS[name], _denoiser(name)
    if bits != FULL_PRECISION[1]:
        pipe = SimpleNamespace(unet=unet, scheduler=None)
        unet = swap(pipe, *parse_bits(bits), keep=model.keep, softmax_bits=model.softmax_bits).unet
    return cost.footprint(unet, _work(name))


def parts(config: dict, costs: list[dict], machine: str) -> list[Part]:
    """What each kind of job of each model needs in all, from what was measured on `machine`."""
    sampled, made = cells(config)
    starts = starting_points(config, runs(config))
    found = []
    for name, settings in config["models"].items():
        model, sizes = MODELS[name], shape(MODELS[name])
        known = {row["what"]: row["value"] for row in costs if (row["model"], row["machine"]) == (name, machine)}
        images, calls = settings["images"], model.calls * model.halves  # denoiser samples per image
        trajectories = settings.get("trajectories", model.trajectories)
        rows = [trajectories]
        if any(run.model == name for run in sampled):
            rows.append(settings.get("evaluation", 16))
        row_bytes = FLOAT * (2 * sizes.latent + sizes.context)
        found.append(_trajectories(name, model, known, rows, calls, row_bytes))
        checkpoints = [run for run in made if run.model == name]
        # What others start from keeps float weights.
        size = sum(
            FLOAT * sizes.parameters if run in starts else footprint(name, run.bits)["bytes"] for run in checkpoints
        )
        needed, unknown = Counter(), []
        for run in checkpoints:
            counted = quantizing(*recipe_of(config, run.method), run.bits, model, trajectories)
            needed.update(counted or {})
            unknown += [] if counted is not None else [f"what {run.method} does"]
        hours, missing = _hours(known, len(checkpoints), needed)
        if unknown:
            hours, missing = math.nan, (*missing, *dict.fromkeys(unknown))
        found.append(Part(name, "quantize", len(checkpoints), hours, size, missing))
        for kind, own, call in (
            ("fp", "sample, full precision", "call"),
            (None, "sample, quantized", "quantized call"),
        ):
            of_kind = [run for run in sampled if run.model == name and (run.method == "fp") == (kind == "fp")]
            made_images = images * len(of_kind)
            count = settings.get("shards", 1) * len(of_kind)
            hours, missing = _hours(
                known, count, {call: made_images * calls, "decode": made_images, "features": made_images}
            )
            kept = _image_bytes(model, sizes, settings.get("keep_images", True))
            found.append(Part(name, own, count, hours, kept * made_images, missing))
    return [part for part in found if part.jobs]


def quantizing(method: str, recipe: dict, bits: str, model: Model, trajectories: int) -> Counter | None:
    """What a checkpoint takes, {what of `measure`: how often}; None for a method that does not say it.

    method: a name in baselines.METHODS. recipe: its keyword arguments. trajectories: in the calibration set.
    """
    if method not in METHODS or METHODS[method].work is None:
        return None
    w, a = parse_bits(bits)
    quantize = METHODS[method].quantize
    # As the quantize script: the model's protocol, what the row fixes, and the recipe, which has the last word.
    defaults = {name: parameter.default for name, parameter in keywords(quantize).items()}
    recipe = defaults | model.recipe(quantize, a) | METHODS[method].fixed | recipe
    return METHODS[method].work(SimpleNamespace(**recipe), w, model, trajectories)


def _trajectories(name, model, known, rows, calls, row_bytes):
    """rows: trajectories of each set, which is a job of its own and has whole batches."""
    padded = sum(-(-count // model.batch_size) * model.batch_size for count in rows)
    hours, missing = _hours(known, len(rows), {"call": padded * calls + RANGES_SAMPLES * model.steps})
    return Part(name, "trajectories", len(rows), hours, sum(rows) * calls * row_bytes, missing)


def _image_bytes(model, sizes, keep):
    values = FEATURE_VALUES[model.extractor] + CLIP_VALUES[model.clip] + sizes.latent
    return FLOAT * values + (sizes.image if keep else 0)


def _hours(known, jobs, counted):
    """Hours of {what: how often} in `jobs` processes, and what of it was not measured."""
    needed = {what: often for what, often in counted.items() if often} | {"start": jobs}
    missing = tuple(what for what in needed if what not in known)
    seconds = sum(known.get(what, math.nan) * often for what, often in needed.items())
    return seconds / 3600, missing


def report(config: dict, costs: list[dict], machine: str) -> str:
    """The plan as Markdown: jobs by rule, work by model, disk, memory, and where each cost was measured."""
    of_rule, found = jobs(config), parts(config, costs, machine)
    lines = [f"## Plan of `{config['name']}` on {machine}", "", "| rule | jobs |", "|---|---:|"]
    lines += [f"| {rule} | {count} |" for rule, count in of_rule.items()]
    lines += [f"| in all | {sum(of_rule.values())} |", ""]
    lines += ["| model | jobs | number | hours | disk [GB] |", "|---|---|---:|---:|---:|"]
    for part in found:
        hours = f"{part.hours:.2f}" if math.isfinite(part.hours) else f"not measured: {', '.join(part.missing)}"
        lines.append(f"| {part.model} | {part.kind} | {part.jobs} | {hours} | {part.bytes / 1e9:.2f} |")
    lines += ["", *_totals(found), "", *_sizes(config), "", *_measured(config, costs, machine)]
    return "\n".join(lines) + "\n"


def _totals(found):
    hours = [part.hours for part in found if math.isfinite(part.hours)]
    size = sum(part.bytes for part in found)
    unknown = sum(not math.isfinite(part.hours) for part in found)
    told = f"Hours of one device, of what was measured: {sum(hours):.1f}"
    if unknown:
        told += f"; {unknown} of {len(found)} lines were not, so this is no total"
    return [f"{told}.", "", f"Disk: {size / 1e9:.1f} GB. Metrics, tables and figures are left out of both."]


def _sizes(config):
    lines = ["| model | bits | size [MB] | bits per parameter | TBOPs | times fewer |", "|---|---|---:|---:|---:|---:|"]
    for name in config["models"]:
        quantized = [run.bits for run in runs(config) if run.model == name]
        for bits in dict.fromkeys([FULL_PRECISION[1], *quantized]):
            found = footprint(name, bits)
            times = found["macs"] * 32**2 / found["bops"]
            lines.append(
                f"| {name} | {bits} | {found['bytes'] / 1e6:.1f} | {found['effective_bits']:.3f} "
                f"| {found['bops'] / 1e12:.4g} | {times:.1f} |"
            )
    return [*lines, "", "Sizes are of packed denoisers, scales included; bit operations of one call on one sample."]


def _measured(config, costs, machine):
    lines = []
    for name in config["models"]:
        rows = [row for row in costs if row["model"] == name]
        here = [row for row in rows if row["machine"] == machine]
        memory = next((row["value"] for row in here if row["what"] == "memory"), None)
        if here:
            kinds = ", ".join(row["what"] for row in here)
            one = here[0]
            told = f"measured on {one['date']}, batch {one['batch']}, {one['weights']} weights: {kinds}"
            told += f"; at most {memory:.0f} MB" if memory is not None else "; memory not measured"
        else:
            others = sorted({row["machine"] for row in rows})
            told = f"nothing measured here; `python -m quest measure {name} --device DEVICE` does, in a minute"
            told += f" (measured on {'; '.join(others)})" if others else ""
        lines.append(f"- {name}: {told}.")
    return lines
