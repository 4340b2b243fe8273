"""Estimates what a config will cost: jobs, hours, disk and memory, from measured costs of single steps.

Costs that were measured on no processor are reported as unknown. No total contains a guess. Hours that rest on another
processor's costs (`costs.with_stand_ins`) are marked.
"""

import math
from collections import Counter
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

from baselines import METHODS
from baselines.method import keywords
from quest.config import FULL_PRECISION, Run, ablation_runs, parse_bits, recipe_of, runs, starting_points
from quest.diffusion.declared import of_config
from quest.diffusion.models import Model
from quest.metrics import LITE0, RESIZE, SHIPPED_CLIPS
from quest.planning import keep
from quest.planning.costs import MEASURED, SECONDS
from quest.planning.forecast import GPUS, assumptions, forecast
from quest.planning.shapes import footprint, is_unet, shape, work

FLOAT = 4  # bytes of a float32
INCEPTION_VALUES = 2048 + 2023 + 1008
FEATURE_VALUES = {"scenes": 64 + 112 + 48, "adm": INCEPTION_VALUES}
FEATURE_VALUES |= dict.fromkeys(LITE0, 64 + 112 + 1000 + 7168 // 2)  # the last are in float16
FEATURE_VALUES |= {"torch-fidelity": INCEPTION_VALUES, "clean": INCEPTION_VALUES}
CLASSES = 10  # of a classifier of photographs
CLIP_VALUES = {None: 0, "scenes-clip": 2 * 64, "emoji-clip": 2 * 64, "ViT-B-16": 2 * 512}
ROWS = 64  # of a denoiser call where nothing is learned, see quest.learning.units.CHUNK
# While a model is quantized, full precision and the quantized denoiser are in memory, as in the search of ranges.
TOGETHER = {"at_once": dict.fromkeys(("call", "quantized call", "gptq", "svdquant"), ROWS), "beside": "ranges"}
RANGES_SAMPLES = 32  # samples per timestep, for the figure of activation ranges


class Needs(NamedTuple):
    """What a job needs: seconds and MB at most, NaN where a step was not measured; `missing` names these steps."""

    seconds: float
    memory: float
    missing: tuple[str, ...]


@dataclass(frozen=True)
class Part:
    """All jobs of one kind for one model. hours is NaN where a cost was not measured; `missing` names these costs.

    memory: MB at most of one of the jobs; NaN where the memory of a step was not measured.
    """

    model: str
    kind: str
    jobs: int
    hours: float
    bytes: float
    missing: tuple[str, ...] = ()
    memory: float = math.nan
    longest: float = math.nan  # hours of the longest of the jobs


def cells(config: dict) -> tuple[list[Run], list[Run]]:
    """(cells to sample, with full precision; checkpoints to make, with starting points)."""
    grid = runs(config)
    sampled = list(dict.fromkeys([Run(run.model, *FULL_PRECISION) for run in grid] + grid))
    made = [run for run in grid if run.method != FULL_PRECISION[0]]
    return sampled, list(dict.fromkeys(made + starting_points(config, grid)))


def jobs(config: dict) -> Counter:
    """Number of jobs of each rule, as `snakemake -n` counts them in a fresh clone."""
    grid, (sampled, made) = runs(config), cells(config)
    settings, of_name = config["models"], of_config(config)
    models = dict.fromkeys(run.model for run in sampled)
    prepared = [name for name in settings if of_name[name].origin]
    pairs = {(run.model, run.bits) for run in grid if run.method != FULL_PRECISION[0]}
    count = Counter(
        {
            "model": len(prepared),
            "network": len({net for name in models for net in _networks(of_name[name])}),
            "tiny_checkpoint": sum(settings[n].get("checkpoint", "").startswith("results/") for n in prepared),
            "reference": sum(_has_reference(of_name[name], settings[name]) for name in models),
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


def _has_reference(model, settings):
    return model.origin is not None and model.extractor in RESIZE and settings.get("reference", "none") != "none"


def parts(config: dict, costs: list[dict], machine: str) -> list[Part]:
    """What all jobs of each kind need, for each model, from the costs measured on `machine`."""
    sampled, made = cells(config)
    starts = starting_points(config, runs(config))
    all_parts, models = [], of_config(config)
    for name, settings in config["models"].items():
        model, sizes = models[name], shape(models[name])
        known = known_of(costs, name, machine)

        def part(kind, jobs, size, name=name):
            if jobs:
                hours, memory = [job.seconds / 3600 for job in jobs], [job.memory for job in jobs]
                missing = tuple(dict.fromkeys(step for job in jobs for step in job.missing))
                all_parts.append(Part(name, kind, len(jobs), sum(hours), size, missing, _most(memory), _most(hours)))

        drawn = [n := settings.get("trajectories", model.trajectories)]
        if any(run.model == name for run in sampled):
            drawn.append(settings.get("evaluation", 16))
        part("trajectories", [trajectories(model, known, n) for n in drawn], sum(set_bytes(model, n) for n in drawn))
        checkpoints = [run for run in made if run.model == name]
        # Checkpoints from which other methods start keep float weights.
        size = sum(
            FLOAT * sizes.parameters if run in starts else footprint(model, run.bits)["bytes"] for run in checkpoints
        )
        of_runs = {run: quantizing(*recipe_of(config, run.method), run.bits, model, n) for run in checkpoints}
        part("quantize", [quantize(known, steps, run.method) for run, steps in of_runs.items()], size)
        image_bytes = _image_bytes(model, sizes, settings.get("keep_images", True))
        for label, exact in (("sample, full precision", True), ("sample, quantized", False)):
            of_kind = [run for run in sampled if run.model == name and (run.method == FULL_PRECISION[0]) == exact]
            shards = settings.get("shards", 1)
            job = sample(model, known, settings["images"] / shards, exact)
            part(label, [job] * shards * len(of_kind), image_bytes * settings["images"] * len(of_kind))
    return all_parts


def _most(values):
    """The largest; NaN where one is NaN, which max() would do in some orders only."""
    return math.nan if any(map(math.isnan, values)) else max(values)


def known_of(costs: list[dict], model: str, machine: str) -> dict[str, float]:
    """{step: value} of a model's costs on one machine."""
    return {row["what"]: row["value"] for row in costs if (row["model"], row["machine"]) == (model, machine)}


def trajectories(model: Model, known: dict, n: int) -> Needs:
    """The job that draws n full-precision trajectories, in whole batches, which the sampler also decodes."""
    padded = -(-n // model.batch_size) * model.batch_size
    calls = model.calls * model.halves
    steps = Counter({"call": padded * calls + RANGES_SAMPLES * model.steps, "decode": padded})
    # Each tensor of the set is joined from those of the batches, the largest of them as well.
    sizes = shape(model)
    largest = max(sizes.latent, sizes.context) / (2 * sizes.latent + sizes.context)
    return _needs(known, steps, _batches(model), held=(1 + largest) * set_bytes(model, n))


def sample(model: Model, known: dict, images: float, exact: bool) -> Needs:
    """The job that samples so many images, in full precision (`exact`) or quantized."""
    calls = images * model.calls * model.halves
    return _needs(
        known,
        Counter({"call" if exact else "quantized call": calls, "decode": images, "features": images}),
        _batches(model),
    )


def quantize(known: dict, steps: Counter | None, method: str = "") -> Needs:
    """The job that makes a checkpoint by the steps that `quantizing` returns; None: what `method` does is not known."""
    if steps is None:
        return Needs(math.nan, math.nan, (f"what {method} does",))
    return _needs(known, steps, **TOGETHER)


def steps(config: dict, name: str) -> set[str]:
    """All steps that the jobs of a config take for a model."""
    model, settings = of_config(config)[name], config["models"][name]
    taken = {"call", "quantized call", "decode", "features", "ranges"}
    for run in cells(config)[1]:
        if run.model == name:
            n = settings.get("trajectories", model.trajectories)
            taken |= set(quantizing(*recipe_of(config, run.method), run.bits, model, n) or ())
    return taken


def set_bytes(model: Model, n: int) -> int:
    """Bytes of a calibration set of n trajectories."""
    sizes = shape(model)
    return n * model.calls * model.halves * FLOAT * (2 * sizes.latent + sizes.context)


def _batches(model):
    """Rows of each step of sampling that are in memory at once."""
    batch = model.batch_size * model.halves
    extracted = min(model.batch_size, 50)  # images of a pass of Inception
    return {"call": batch, "quantized call": batch, "decode": model.batch_size, "features": extracted}


def _needs(known: dict, steps: Counter, at_once: dict, held: float = 0, beside: str | None = None) -> Needs:
    """What one process needs for these steps, which has `held` bytes in memory all the time; see `peaks`."""
    counts = Counter({step: count for step, count in steps.items() if count}) + Counter({"start": 1})
    seconds = sum(known.get(step, math.nan) * count for step, count in counts.items())
    memory = [fixed + (rows and rows * row) for fixed, row, rows in peaks(known, steps, at_once, beside).values()]
    return Needs(seconds, _most(memory) + held / 1e6, tuple(step for step in counts if step not in known))


def peaks(known: dict, steps: Counter, at_once: dict, beside: str | None = None) -> dict[str, tuple]:
    """{step: (MB beside its rows, MB of a row, rows)} that are in memory at once; NaN where it was not measured.

    at_once: the rows, where the steps themselves do not say it (rows of an iteration, of a range).
    beside: a step whose fixed part of memory is also that of calls.
    """
    found = {}
    for step in {step.removesuffix(" row") for step, count in steps.items() if count}:
        rows = min(at_once[step], steps[step]) if step in at_once else steps[f"{step} row"] / max(1, steps[step])
        fixed = known.get(f"memory of {beside if beside and step.endswith('call') else step}", math.nan)
        found[step] = fixed, known.get(f"memory of {step} row", math.nan), rows
    return found


def quantizing(method: str, recipe: dict, bits: str, model: Model, trajectories: int) -> Counter | None:
    """How often making a checkpoint takes each step of `costs.WHAT`; None where a method has no `work`.

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


def _image_bytes(model, sizes, keep):
    values = FEATURE_VALUES[model.extractor] + CLIP_VALUES[model.clip] + sizes.latent
    values += CLASSES + 2 if model.classifier else 0  # logits, and the label in 64 bits
    return FLOAT * values + (sizes.image if keep else 0)


def report(config: dict, costs: list[dict], machine: str) -> str:
    """The plan as Markdown: jobs by rule, work by model, disk, memory, and where each cost was measured."""
    keep.check(config, [*cells(config)[1], *ablation_runs(config)])
    of_rule, all_parts = jobs(config), parts(config, costs, machine)
    lines = [f"## Plan of `{config['name']}` on {machine}", "", "| rule | jobs |", "|---|---:|"]
    lines += [f"| {rule} | {count} |" for rule, count in of_rule.items()]
    lines += [f"| in all | {sum(of_rule.values())} |", ""]
    lines += ["| model | jobs | number | hours | disk [GB] | peak memory [GB] |", "|---|---|---:|---:|---:|---:|"]
    elsewhere = {row["model"] for row in costs if "elsewhere" in row and row["what"] in SECONDS}
    for part in all_parts:
        about = "about " if part.model in elsewhere else ""
        hours = (
            f"{about}{part.hours:,.{0 if part.hours > 100 else 2}f}"
            if math.isfinite(part.hours)
            else f"not measured: {', '.join(part.missing)}"
        )
        memory = f"{part.memory / 1e3:.1f}" if math.isfinite(part.memory) else "not measured"
        lines.append(f"| {part.model} | {part.kind} | {part.jobs} | {hours} | {part.bytes / 1e9:.2f} | {memory} |")
    lines += ["", *_totals(all_parts), "", *_sizes(config), "", *_measured(config, costs, machine)]
    if machine not in GPUS and all(math.isfinite(part.hours) for part in all_parts):
        lines += ["", *_forecasts(config, costs, machine)]
    return "\n".join(lines) + "\n"


def forecasts(config: dict, costs: list[dict], machine: str, gpu: str) -> list[dict]:
    """The rows of costs that `gpu` would have, from those of `machine`; see `quest.planning.forecast`."""
    return forecast(costs, machine, gpu, {name: sum(work(m).values()) for name, m in of_config(config).items()})


def _forecasts(config, costs, machine):
    lines = ["### Forecasts for GPUs, not measurements", ""]
    lines += ["| GPU | hours of one GPU | longest job [h] | most memory of a job [GB] | the GPU has [GB] |"]
    lines += ["|---|---:|---:|---:|---:|"]
    for gpu, sheet in GPUS.items():
        found = parts(config, forecasts(config, costs, machine, gpu), gpu)
        longest = max(part.longest for part in found)
        memory = (
            "not measured" if any(math.isnan(p.memory) for p in found) else f"{max(p.memory for p in found) / 1e3:.1f}"
        )
        hours = sum(part.hours for part in found)
        lines.append(f"| {gpu} | {hours:,.1f} | {longest:,.1f} | {memory} | {sheet.memory:g} |")
    return [*lines, "", assumptions(machine)]


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
    for name, model in of_config(config).items():
        quantized = [run.bits for run in runs(config) if run.model == name]
        for bits in dict.fromkeys([FULL_PRECISION[1], *quantized]):
            size = footprint(model, bits)
            times = size["macs"] * 32**2 / size["bops"]
            lines.append(
                f"| {name} | {bits} | {size['bytes'] / 1e6:.1f} | {size['effective_bits']:.3f} "
                f"| {size['bops'] / 1e12:.4g} | {times:.1f} |"
            )
    return [*lines, "", "Sizes are of packed denoisers, scales included; bit operations of one call on one sample."]


def _measured(config, known, machine):
    lines = []
    for name, model in of_config(config).items():
        rows = [row for row in known if row["model"] == name]
        here = [row for row in rows if row["machine"] == machine and "elsewhere" not in row]
        stand_in = Counter(row["elsewhere"] for row in rows if "elsewhere" in row and row["what"] in SECONDS)
        memory = next((row["value"] for row in here if row["what"] == "memory"), None)
        if here:
            row, steps = here[0], [row for row in here if row["what"] in SECONDS]
            scaled = [row["what"] for row in steps if row["how"] != MEASURED]
            sentence = f"{len(steps)} costs, measured on {row['date']} with {row['weights']} weights"
            sentence += f" ({', '.join(scaled)}: of a part, scaled)" if scaled else ""
            sentence += f"; at most {memory:.0f} MB" if memory is not None else "; memory not measured"
        else:
            how = f"`python -m quest {'measure' if model.ships else 'rehearse'} {name}` does"
            if not is_unet(model):
                how = "`python -m quest measure` takes U-Nets only"
            sentence = f"nothing measured here; {how}"
            if not stand_in and (others := sorted({row["machine"] for row in rows})):
                sentence += f" (measured on {'; '.join(others)})"
        for other, count in stand_in.items():
            sentence += f"; {count} costs are those of another processor ({other})"
        lines.append(f"- {name}: {sentence}.")
    return lines
