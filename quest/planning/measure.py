"""Measures what the steps of a run cost on this machine: seconds of denoiser calls, training and decoding, and memory.

`python -m quest measure` adds rows to `resources/costs.csv`; `python -m quest plan` multiplies them by how often a
config takes each step. On a CPU, seconds are processor time of one thread, which other processes hardly change.
"""

import csv
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from baselines import METHODS
from baselines.method import Step
from quest.diffusion.models import ZOO
from quest.runtime import memory
from quest.runtime.files import one_line, read_json, read_rows

COSTS = Path(__file__).parents[2] / "resources" / "costs.csv"
# Steps that only some methods take.
STEPS = {what: step for method in METHODS.values() for what, step in method.steps.items()}
COLUMNS = ["model", "machine", "what", "value", "unit", "batch", "weights", "date"]
# What is measured, and in which unit.
WHAT = {
    "call": "seconds per sample of one denoiser call, full precision",
    "quantized call": "the same with fake quantization at W8A8",
    "training step": "seconds per sample of one forward and backward pass of the quantized denoiser",
    "weight ranges": "seconds of the MSE search of every weight's range",
    "ranges": "seconds of the MSE search of every activation's range, of one time group",
    # A fixed cost, and "... row": the cost per row of the calibration set or mini-batch.
    "threshold search": "seconds of the released PTQ4DM",
    "threshold search row": "seconds",
    "rounding": "seconds of one AdaRound iteration in every unit",
    "rounding row": "seconds",
    "step learning": "seconds of one iteration in every unit that learns activation steps",
    "step learning row": "seconds",
    **{what: "seconds of one iteration" for what in STEPS},
    **{f"{what} row": "seconds" for what, step in STEPS.items() if step.rows is None},
    "decode": "seconds per image",
    "features": "seconds per image",
    "start": "seconds until a process has imported and loaded what it needs",
    "memory": "MB at most, of the GPU where one is used, else resident",
}
# The same for single steps, with the measured number of rows.
WHAT |= {f"memory of {what}": WHAT["memory"] for what in WHAT if what not in ("memory", "start") and " row" not in what}


def read(path: Path = COSTS) -> list[dict]:
    """Rows of the measured costs. Raises ValueError, naming file and line, for one that is malformed."""
    rows = read_rows(path, COLUMNS)
    for line, row in enumerate(rows, start=2):
        if row["what"] not in WHAT:
            raise ValueError(f"{path}, line {line}: {one_line(repr(row['what']))} is not one of {', '.join(WHAT)}")
        if empty := [column for column in COLUMNS if not row[column]]:
            raise ValueError(f"{path}, line {line}: {empty[0]} is missing")
        try:
            row["value"], _ = float(row["value"]), int(row["batch"])
        except ValueError as error:
            raise ValueError(f"{path}, line {line}: {one_line(error)}") from None
        if not 0 <= row["value"] < math.inf:
            raise ValueError(f"{path}, line {line}: value {row['value']}; needed: a finite number from 0 on")
    return rows


def record(rows: list[dict], path: Path = COSTS) -> None:
    """Add rows to the measured costs. They replace rows of the same model, machine and kind."""
    from quest.runtime.files import atomic

    def key(row):
        return row["model"], row["machine"], row["what"]

    new = {key(row) for row in rows}
    kept = [row for row in read(path) if key(row) not in new] if path.is_file() else []
    with atomic(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept + rows)


def machine(device: str) -> str:
    """Name of the GPU or processor, as in `resources/costs.csv`. Jobs on a CPU have one thread."""
    import torch

    from quest.runtime.provenance import provenance

    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{provenance()['machine']['cpu']}, one thread"


def measure(model, device: str, batch: int | None = None, repeats: int = 3, random: bool = False) -> list[dict]:
    """Measure a model's steps on this machine. Returns rows with COLUMNS.

    Without a published model's weights, or with `random`, its architecture is measured with random ones.
    batch: samples per call; default: a sampling batch, twice as many under guidance. A value is the minimum of
    `repeats` runs after a warm-up, or the median where it is a difference of two times.
    Raises FileNotFoundError where the weights of a model that ships are missing.
    """
    import torch

    from quest.diffusion import published

    try:
        pipe = None if random else model.load(device=device)
    except FileNotFoundError:
        if model.origin is None:
            raise
        pipe = None
    weights = "random" if pipe is None else "trained"
    pipe = pipe or published.rehearsed(model, device)
    denoiser = pipe.unet
    costs = {"start": time.process_time()}  # from the start of the process: imports and loading
    batch = batch or model.batch_size * model.halves
    arguments = inputs(denoiser, model, batch, device, pipe)
    with torch.no_grad(), peak_of("call", costs, device):
        costs["call"] = _least(lambda: denoiser(**arguments), repeats, device) / batch
    quantized = _quantized(pipe, model, arguments)
    with torch.no_grad(), peak_of("quantized call", costs, device):
        costs["quantized call"] = _least(lambda: quantized(**arguments), repeats, device) / batch
    quantized.requires_grad_(True)
    # A mini-batch has 16 rows, or 4 where the graph of the denoiser takes gigabytes per row.
    most = 16 if sum(p.numel() for p in denoiser.parameters()) < 1e8 else 4
    few = inputs(denoiser, model, min(max(batch, 2), most), device, pipe)
    with peak_of("training step", costs, device):
        seconds = _least(lambda: quantized(**few).sample.sum().backward(), repeats, device)
        costs["training step"] = seconds / len(few["sample"])
    with peak_of("threshold search", costs, device):
        costs |= _threshold_search(pipe, _calibration(few), 2 * max(batch, 2), repeats, device)
    costs |= _quantizing(pipe, model, few, repeats, device)
    costs |= _images(pipe, model, min(model.batch_size, batch), repeats, device)
    costs["memory"] = max(value for what, value in costs.items() if what.startswith("memory of "))
    where, now = machine(device), datetime.now(UTC).date().isoformat()
    return [
        {"model": model.name, "machine": where, "what": what, "value": f"{value:.4g}"}
        | {"unit": "MB" if what.startswith("memory") else "s", "batch": batch, "weights": weights, "date": now}
        for what, value in costs.items()
    ]


def inputs(denoiser, model, batch: int, device: str, pipe=None) -> dict:
    """Random arguments of one call on `batch` samples."""
    import torch

    size, config = denoiser.config.sample_size, denoiser.config
    arguments = {
        "sample": torch.randn(batch, config.in_channels, size, size, device=device),
        "timestep": torch.full((batch,), 500, device=device),
    }
    if model.conditioning != "none":
        count = tokens(model, pipe)
        arguments["encoder_hidden_states"] = torch.randn(batch, count, config.cross_attention_dim, device=device)
    return arguments


def tokens(model, pipe=None) -> int:
    """Number of tokens in the condition of a sample, of the pipeline or else of the model as shipped or published."""
    if model.conditioning == "none":
        return 0
    if pipe is not None and (hasattr(pipe, "tokenizer") or pipe.class_embedder is not None):
        return pipe.tokenizer.model_max_length if model.conditioning == "text" else pipe.class_embedder.config.tokens
    if model.origin is not None:
        return {"class": 1, "text": 77}[model.conditioning]
    encoder, key = {"class": ("class_embedder", "tokens"), "text": ("text_encoder", "max_position_embeddings")}[
        model.conditioning
    ]
    return read_json(ZOO / model.name / encoder / "config.json")[key]


def _calibration(arguments):
    """A calibration set of one denoiser call: one row per sample, with zeros as the predicted noise."""
    import torch

    from quest.diffusion.calibration_set import CalibrationSet

    arguments = dict(arguments)
    sample, timestep = arguments.pop("sample"), arguments.pop("timestep")
    order = torch.arange(len(sample), device=sample.device)
    return CalibrationSet(sample, timestep, torch.zeros_like(sample), order, torch.zeros_like(order), arguments)


def _quantized(pipe, model, arguments):
    import quest

    few = _calibration({key: value[:4] for key, value in arguments.items()})
    return quest.quantize(pipe, "rtn", "w8a8", calibration=few, samples=4).unet


def _threshold_search(pipe, calibration, rows, repeats, device):
    """Costs of the released PTQ4DM. It may draw more rows than the calibration set has."""
    import quest

    def search(count):
        quest.quantize(pipe, "ptq4dm-as-released", "w8a8", calibration=calibration, rows=count)

    small = len(calibration)
    seconds = [_least(partial(search, count), repeats, device) for count in (small, rows)]
    return _fixed_and_row("threshold search", small, rows, *seconds)


def _quantizing(pipe, model, arguments, repeats, device):
    """Costs of the steps of methods at W4A8. Learning rates are zero, so no measurement changes the next one."""
    import torch

    import quest
    from quest.learning.calibrate import calibrate
    from quest.learning.reconstruction import reconstruct_activations, reconstruct_weights
    from quest.quantization import ranges
    from quest.quantization.layers import quant_layers

    calibration, bits = _calibration(arguments), {"keep": model.keep, "softmax_bits": model.softmax_bits}
    n = len(calibration)
    rows = torch.arange(n, device=calibration.sample.device)
    student = quest.quantize(pipe, "rtn", "w4a8", calibration=calibration, samples=n, **bits).unet
    timed = quest.quantize(
        pipe, "quest-suite", "w4a8", calibration=calibration, samples=n, selection=model.selection, **bits,
        tla_iterations=0, cma_iterations=0,
    ).unet  # fmt: skip
    for denoiser in (student, timed):
        for _, layer in quant_layers(denoiser):
            layer.thaw()
    layers = [layer for _, layer in quant_layers(student)]
    costs = {}
    with peak_of("weight ranges", costs, device):
        costs["weight ranges"] = _least(lambda: [x.choose_weight_range(ranges.mse) for x in layers], 1, device)
    with peak_of("ranges", costs, device):
        search = partial(calibrate, student, calibration, ranges.mse_zero_point, samples=n, seed=0)
        costs["ranges"] = _least(search, 1, device)
    common = dict(lr=0.0, generator=torch.Generator().manual_seed(0))

    def rounding(iterations, batch):
        reconstruct_weights(student, pipe.unet, calibration, rows, iterations=iterations, batch=batch, **common)

    def step_learning(iterations, batch):
        reconstruct_activations(student, pipe.unet, calibration, rows, iterations=iterations, batch=batch, **common)

    all_steps = {
        "rounding": Step(rounding, ("AdaRound",)),
        "step learning": Step(step_learning, ("activation steps",)),
    }
    for what, step in STEPS.items():
        all_steps[what] = step._replace(learn=partial(step.learn, timed, pipe, calibration, model))
    small = max(1, n // 4)
    for what, step in all_steps.items():
        with peak_of(what, costs, device):
            if step.rows is None:
                seconds = [_iteration(step.learn, batch, repeats, device) for batch in (small, n)]
                costs |= _fixed_and_row(what, small, n, *seconds)
            else:
                costs[what] = _iteration(step.learn, step.rows, repeats, device)
    return costs


def _fixed_and_row(name, small, large, few, many):
    """Fixed and per-row seconds of a step that takes `few` seconds with `small` rows and `many` with `large` rows."""
    row = max(0.0, many - few) / (large - small)
    return {name: max(0.0, many - large * row), f"{name} row": row}


def _iteration(learn: Callable, batch: int, repeats: int, device: str) -> float:
    """Seconds of one iteration: the median difference between five iterations and one, divided by four.

    Both times of a difference are taken together, so that other load affects them alike; it would not affect their two
    minima alike.
    """
    learn(1, batch)  # to warm up
    differences = []
    for _ in range(repeats):
        one, five = (_seconds(partial(learn, count, batch), device) for count in (1, 5))
        differences.append(five - one)
    return max(0.0, statistics.median(differences)) / 4


def _images(pipe, model, batch, repeats, device):
    import torch

    from quest.diffusion.sampling import decode
    from quest.metrics.features import EXTRACTORS

    config = pipe.unet.config
    latents = torch.randn(batch, config.in_channels, config.sample_size, config.sample_size, device=device)
    costs = {}
    with peak_of("decode", costs, device):
        costs["decode"] = _least(lambda: decode(pipe, latents), repeats, device) / batch
    try:
        network = EXTRACTORS[model.extractor]()
    except OSError:  # Inception's weights are missing and cannot be fetched
        return costs
    network = network.to(device) if hasattr(network, "to") else network
    images = torch.from_numpy(decode(pipe, latents)).permute(0, 3, 1, 2).to(device)
    with torch.no_grad(), peak_of("features", costs, device):
        costs["features"] = _least(lambda: network(images), repeats, device) / batch
    return costs


def _least(step: Callable, repeats: int, device: str) -> float:
    step()  # to warm up
    return min(_seconds(step, device) for _ in range(repeats))


def seconds_in_turns(steps: dict[str, Callable], repeats: int, device: str = "cpu") -> dict[str, list[float]]:
    """Seconds of each step, run in turns so that other load affects all alike. One more turn warms up."""
    measured: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeats + 1):
        for name, step in steps.items():
            seconds = _seconds(step, device)
            if turn:
                measured[name].append(seconds)
    return measured


def _seconds(step: Callable, device: str) -> float:
    import torch

    clock = time.perf_counter if device == "cuda" else time.process_time
    start = clock()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - start


@contextmanager
def peak_of(what: str, costs: dict, device: str) -> Iterator[None]:
    """Add the most memory that the process holds inside to `costs`, in MB: of the GPU, else resident (on Linux)."""
    import torch

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak is what is held now
    yield
    if device == "cuda":
        costs[f"memory of {what}"] = torch.cuda.max_memory_allocated() / 1e6
    else:
        costs[f"memory of {what}"] = memory.field("/proc/self/status", "VmHWM") / 1e6
