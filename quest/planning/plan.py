"""Estimates what a config will cost: jobs, hours, disk and memory, from measured costs of single steps.

Costs that were not measured on a machine are reported as unknown. No total contains a guess.
"""

import functools
import math
from collections import Counter
from dataclasses import dataclass
from types import SimpleNamespace

from baselines import METHODS
from baselines.method import keywords
from quest.config import (
    FULL_PRECISION,
    Run,
    ablation_runs,
    parse_bits,
    recipe_of,
    runs,
    starting_points,
)
from quest.diffusion.models import MODELS, Model
from quest.metrics import LITE0, RESIZE, SHIPPED_CLIPS
from quest.planning import keep, measure

FLOAT = 4  # bytes of a float32
INCEPTION_VALUES = 2048 + 2023 + 1008
FEATURE_VALUES = {"scenes": 64 + 112 + 48, "adm": INCEPTION_VALUES}
FEATURE_VALUES |= dict.fromkeys(LITE0, 64 + 112 + 1000 + 7168 // 2)  # the last are in float16
FEATURE_VALUES |= {"torch-fidelity": INCEPTION_VALUES, "clean": INCEPTION_VALUES}
CLASSES = 10  # of a classifier of photographs
CLIP_VALUES = {None: 0, "scenes-clip": 2 * 64, "emoji-clip": 2 * 64, "ViT-B-16": 2 * 512}
RANGES_SAMPLES = 32  # samples per timestep, for the figure of activation ranges


@dataclass(frozen=True)
class Shape:
    """Number of denoiser parameters, and number of values in a latent, an image and the context of a sample."""

    parameters: int
    latent: int
    image: int
    context: int


@dataclass(frozen=True)
class Part:
    """All jobs of one kind for one model. hours is NaN where a cost was not measured; `missing` names these costs.

    memory: MB at most of one job, with the rows per step that were measured; NaN where a step was not.
    """

    model: str
    kind: str
    jobs: int
    hours: float
    bytes: float
    missing: tuple[str, ...] = ()
    memory: float = math.nan


def cells(config: dict) -> tuple[list[Run], list[Run]]:
    """(cells to sample, with full precision; checkpoints to make, with starting points)."""
    grid = runs(config)
    sampled = list(dict.fromkeys([Run(run.model, *FULL_PRECISION) for run in grid] + grid))
    made = [run for run in grid if run.method != FULL_PRECISION[0]]
    return sampled, list(dict.fromkeys(made + starting_points(config, grid)))


def jobs(config: dict) -> Counter:
    """Number of jobs of each rule, as `snakemake -n` counts them in a fresh clone."""
    grid, (sampled, made) = runs(config), cells(config)
    settings = config["models"]
    models = dict.fromkeys(run.model for run in sampled)
    prepared = [name for name in settings if MODELS[name].origin]
    pairs = {(run.model, run.bits) for run in grid if run.method != FULL_PRECISION[0]}
    count = Counter(
        {
            "model": len(prepared),
            "network": len({net for name in models for net in _networks(MODELS[name])}),
            "tiny_checkpoint": sum(settings[n].get("checkpoint", "").startswith("results/") for n in prepared),
            "reference": sum(_has_reference(name, settings[name]) for name in models),
            "trajectories": len(settings),
            "evaluation": len(models),
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
    """Networks for a model's metrics that do not ship and are fetched."""
    return ({"inception"} if model.extractor in RESIZE else set()) | ({model.clip} - {None, *SHIPPED_CLIPS})


def _has_reference(name, settings):
    return MODELS[name].origin is not None and MODELS[name].extractor in RESIZE and settings["reference"] != "none"


def shape(model: Model) -> Shape:
    """The Shape of a model. It is exact and needs no weights."""
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
    """`quest.quantization.cost.footprint` of a model at some bits. It is exact and needs no weights.

    It assumes the common stack: every layer is quantized, with the model's exceptions, one scale per output channel of
    a weight and one per activation tensor. Each further scale, of time groups or split shortcuts, takes 8 bytes.
    """
    from quest.quantization import cost
    from quest.quantization.swapping import swap

    model, unet = MODELS[name], _denoiser(name)
    if bits != FULL_PRECISION[1]:
        pipe = SimpleNamespace(unet=unet, scheduler=None)
        unet = swap(pipe, *parse_bits(bits), keep=model.keep, softmax_bits=model.softmax_bits).unet
    return cost.footprint(unet, _work(name))


def parts(config: dict, costs: list[dict], machine: str) -> list[Part]:
    """What all jobs of each kind need, for each model, from the costs measured on `machine`."""
    sampled, made = cells(config)
    starts = starting_points(config, runs(config))
    all_parts = []
    for name, settings in config["models"].items():
        model, sizes = MODELS[name], shape(MODELS[name])
        known = {row["what"]: row["value"] for row in costs if (row["model"], row["machine"]) == (name, machine)}
        images, calls = settings["images"], model.calls * model.halves  # denoiser samples per image
        trajectories = settings.get("trajectories", model.trajectories)
        rows = [trajectories]
        if any(run.model == name for run in sampled):
            rows.append(settings.get("evaluation", 16))
        row_bytes = FLOAT * (2 * sizes.latent + sizes.context)
        all_parts.append(_trajectories(name, model, known, rows, calls, row_bytes))
        checkpoints = [run for run in made if run.model == name]
        # Checkpoints from which other methods start keep float weights.
        size = sum(
            FLOAT * sizes.parameters if run in starts else footprint(name, run.bits)["bytes"] for run in checkpoints
        )
        steps_in_all, unknown = Counter(), []
        for run in checkpoints:
            steps = quantizing(*recipe_of(config, run.method), run.bits, model, trajectories)
            steps_in_all.update(steps or {})
            unknown += [] if steps is not None else [f"what {run.method} does"]
        hours, missing = _hours(known, len(checkpoints), steps_in_all)
        if unknown:
            hours, missing = math.nan, (*missing, *dict.fromkeys(unknown))
        memory = math.nan if unknown else _memory(known, steps_in_all)
        all_parts.append(Part(name, "quantize", len(checkpoints), hours, size, missing, memory))
        for kind, label, call in (
            ("fp", "sample, full precision", "call"),
            (None, "sample, quantized", "quantized call"),
        ):
            of_kind = [run for run in sampled if run.model == name and (run.method == "fp") == (kind == "fp")]
            made_images = images * len(of_kind)
            count = settings.get("shards", 1) * len(of_kind)
            steps = {call: made_images * calls, "decode": made_images, "features": made_images}
            hours, missing = _hours(known, count, steps)
            image_bytes = _image_bytes(model, sizes, settings.get("keep_images", True))
            size = image_bytes * made_images
            all_parts.append(Part(name, label, count, hours, size, missing, _memory(known, steps)))
    return [part for part in all_parts if part.jobs]


def quantizing(method: str, recipe: dict, bits: str, model: Model, trajectories: int) -> Counter | None:
    """How often making a checkpoint takes each step of `measure.WHAT`; None where a method has no `work`.

    method: a name in baselines.METHODS. recipe: its keyword arguments. trajectories: number in the calibration set.
    """
    if method not in METHODS or METHODS[method].work is None:
        return None
    w, a = parse_bits(bits)
    quantize = METHODS[method].quantize
    # As in the quantize script, the recipe overrides what the row fixes, which overrides the model's protocol.
    defaults = {name: parameter.default for name, parameter in keywords(quantize).items()}
    recipe = defaults | model.recipe(quantize, a) | METHODS[method].fixed | recipe
    return METHODS[method].work(SimpleNamespace(**recipe), w, model, trajectories)


def _trajectories(name, model, known, rows, calls, row_bytes):
    """rows: trajectories of each set, which is a job of its own and has whole batches."""
    padded = sum(-(-count // model.batch_size) * model.batch_size for count in rows)
    steps = {"call": padded * calls + RANGES_SAMPLES * model.steps}
    hours, missing = _hours(known, len(rows), steps)
    return Part(name, "trajectories", len(rows), hours, sum(rows) * calls * row_bytes, missing, _memory(known, steps))


def _image_bytes(model, sizes, keep):
    values = FEATURE_VALUES[model.extractor] + CLIP_VALUES[model.clip] + sizes.latent
    values += CLASSES + 2 if model.classifier else 0  # logits, and the label in 64 bits
    return FLOAT * values + (sizes.image if keep else 0)


def _hours(known, jobs, steps):
    """Hours of {step: count} in `jobs` processes, and the steps without a measured cost."""
    counts = {step: count for step, count in steps.items() if count} | {"start": jobs}
    missing = tuple(step for step in counts if step not in known)
    seconds = sum(known.get(step, math.nan) * count for step, count in counts.items())
    return seconds / 3600, missing


def _memory(known, steps):
    """MB that the largest of these steps takes, NaN where one was not measured."""
    whole = {step.removesuffix(" row") for step, count in steps.items() if count}
    found = [known.get(f"memory of {step}", math.nan) for step in whole]
    return math.nan if any(map(math.isnan, found)) else max(found, default=math.nan)


def report(config: dict, costs: list[dict], machine: str) -> str:
    """The plan as Markdown: jobs by rule, work by model, disk, memory, and where each cost was measured."""
    keep.check(config, [*cells(config)[1], *ablation_runs(config)])
    of_rule, all_parts = jobs(config), parts(config, costs, machine)
    lines = [f"## Plan of `{config['name']}` on {machine}", "", "| rule | jobs |", "|---|---:|"]
    lines += [f"| {rule} | {count} |" for rule, count in of_rule.items()]
    lines += [f"| in all | {sum(of_rule.values())} |", ""]
    lines += ["| model | jobs | number | hours | disk [GB] | peak memory [GB] |", "|---|---|---:|---:|---:|---:|"]
    for part in all_parts:
        hours = f"{part.hours:.2f}" if math.isfinite(part.hours) else f"not measured: {', '.join(part.missing)}"
        memory = f"{part.memory / 1e3:.1f}" if math.isfinite(part.memory) else "not measured"
        lines.append(f"| {part.model} | {part.kind} | {part.jobs} | {hours} | {part.bytes / 1e9:.2f} | {memory} |")
    lines += ["", *_totals(all_parts), "", *_sizes(config), "", *_measured(config, costs, machine)]
    return "\n".join(lines) + "\n"


def _totals(all_parts):
    hours = [part.hours for part in all_parts if math.isfinite(part.hours)]
    size = sum(part.bytes for part in all_parts)
    unknown = sum(not math.isfinite(part.hours) for part in all_parts)
    sentence = f"Hours of one device, of what was measured: {sum(hours):.1f}"
    if unknown:
        sentence += f"; {unknown} of {len(all_parts)} lines were not, so this is no total"
    return [f"{sentence}.", "", f"Disk: {size / 1e9:.1f} GB. Metrics, tables and figures are left out of both."]


def _sizes(config):
    lines = ["| model | bits | size [MB] | bits per parameter | TBOPs | times fewer |", "|---|---|---:|---:|---:|---:|"]
    for name in config["models"]:
        quantized = [run.bits for run in runs(config) if run.model == name]
        for bits in dict.fromkeys([FULL_PRECISION[1], *quantized]):
            size = footprint(name, bits)
            times = size["macs"] * 32**2 / size["bops"]
            lines.append(
                f"| {name} | {bits} | {size['bytes'] / 1e6:.1f} | {size['effective_bits']:.3f} "
                f"| {size['bops'] / 1e12:.4g} | {times:.1f} |"
            )
    return [*lines, "", "Sizes are of packed denoisers, scales included; bit operations of one call on one sample."]


def _measured(config, costs, machine):
    lines = []
    for name in config["models"]:
        rows = [row for row in costs if row["model"] == name]
        here = [row for row in rows if row["machine"] == machine]
        memory = next((row["value"] for row in here if row["what"] == "memory"), None)
        if here:
            kinds = ", ".join(row["what"] for row in here if not row["what"].startswith("memory"))
            row = here[0]
            sentence = f"measured on {row['date']}, batch {row['batch']}, {row['weights']} weights: {kinds}"
            sentence += f"; at most {memory:.0f} MB" if memory is not None else "; memory not measured"
        else:
            others = sorted({row["machine"] for row in rows})
            sentence = f"nothing measured here; `python -m quest measure {name} --device DEVICE` does, in a minute"
            sentence += f" (measured on {'; '.join(others)})" if others else ""
        lines.append(f"- {name}: {sentence}.")
    return lines
