"""What the steps of a run cost on a machine, measured: seconds of a denoiser call, of decoding, of features; memory.

`resources/costs.csv` keeps what was measured where; `python -m quest plan` multiplies it out, `python -m quest measure`
adds to it. Seconds on a CPU are those of the processor with one thread, so that a shared machine says the same.
"""

import csv
import json
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from quest.zoo import ZOO

COSTS = Path(__file__).parents[1] / "resources" / "costs.csv"
COLUMNS = ["model", "machine", "what", "value", "unit", "batch", "weights", "date"]
# What is measured, and in which unit.
WHAT = {
    "call": "seconds per sample of one denoiser call, full precision",
    "quantized call": "the same with fake quantization at W8A8",
    "training step": "seconds per sample of one forward and backward pass of the quantized denoiser",
    "decode": "seconds per image",
    "features": "seconds per image",
    "start": "seconds until a process has imported and loaded what it needs",
    "memory": "MB at most, of the GPU where one is used, else resident",
}


def read(path: Path = COSTS) -> list[dict]:
    """Rows of the measured costs. Raises ValueError, naming file and line, for one that is malformed."""
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != COLUMNS:
            raise ValueError(f"{path}: columns are {reader.fieldnames}; needed: {', '.join(COLUMNS)}")
        rows = list(reader)
    for line, row in enumerate(rows, start=2):
        if row["what"] not in WHAT:
            raise ValueError(f"{path}, line {line}: {row['what']!r} is not one of {', '.join(WHAT)}")
        row["value"] = float(row["value"])
    return rows


def record(rows: list[dict], path: Path = COSTS) -> None:
    """Add rows to the measured costs, in place of those of the same model, machine and kind."""
    from quest.files import atomic

    def key(row):
        return row["model"], row["machine"], row["what"]

    new = {key(row) for row in rows}
    kept = [row for row in read(path) if key(row) not in new] if path.is_file() else []
    with atomic(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept + rows)


def machine(device: str) -> str:
    """The GPU's name, or the processor's; jobs on a CPU have one thread."""
    import torch

    from quest.provenance import provenance

    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{provenance()['machine']['cpu']}, one thread"


def measure(model, device: str, batch: int | None = None, repeats: int = 3) -> list[dict]:
    """Costs of a model's steps on this machine, rows of COLUMNS.

    Without its weights, those of the denoiser alone, untrained: a call takes as long. batch: samples per call, by
    default a sampling batch (twice as many under guidance). Each is the least of `repeats` after one to warm up.
    """
    import torch

    try:
        pipe = model.load(device=device)
    except FileNotFoundError:
        if model.origin is None or model.origin.compvis is None:
            raise
        pipe = None
    denoiser = untrained(model, device) if pipe is None else pipe.unet
    costs = {"start": time.process_time()}  # since the process began: imports and loading
    batch = batch or model.batch_size * (2 if model.guidance > 1 else 1)
    given = inputs(denoiser, model, batch, device, pipe)
    with torch.no_grad():
        costs["call"] = _least(lambda: denoiser(**given), repeats, device) / batch
    if pipe is not None:
        quantized = _quantized(pipe, model, given)
        with torch.no_grad():
            costs["quantized call"] = _least(lambda: quantized(**given), repeats, device) / batch
        quantized.requires_grad_(True)
        few = inputs(denoiser, model, min(batch, 16), device, pipe)
        costs["training step"] = _least(lambda: quantized(**few).sample.sum().backward(), repeats, device) / len(
            few["sample"]
        )
        costs |= _images(pipe, model, min(model.batch_size, batch), repeats, device)
    costs["memory"] = _memory(device)
    where, now = machine(device), datetime.now(UTC).date().isoformat()
    weights = "untrained" if pipe is None else "trained"
    return [
        {"model": model.name, "machine": where, "what": what, "value": f"{value:.4g}"}
        | {"unit": "MB" if what == "memory" else "s", "batch": batch, "weights": weights, "date": now}
        for what, value in costs.items()
    ]


def untrained(model, device: str):
    """A model's denoiser from its configuration, every parameter at a small constant: no time goes into drawing any."""
    import torch

    from quest import origins

    built = origins.denoiser(model).to_empty(device=device)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.fill_(0.01)
    return built.to(memory_format=torch.channels_last)


def inputs(denoiser, model, batch: int, device: str, pipe=None) -> dict:
    """Random arguments of one call on `batch` samples."""
    import torch

    size, config = denoiser.config.sample_size, denoiser.config
    given = {
        "sample": torch.randn(batch, config.in_channels, size, size, device=device),
        "timestep": torch.full((batch,), 500, device=device),
    }
    if model.conditioning != "none":
        count = tokens(model, pipe)
        given["encoder_hidden_states"] = torch.randn(batch, count, config.cross_attention_dim, device=device)
    return given


def tokens(model, pipe=None) -> int:
    """Tokens of the condition of a sample: those of the pipeline where there is one, else of the model as published."""
    if model.conditioning == "none":
        return 0
    if pipe is not None:
        return pipe.tokenizer.model_max_length if model.conditioning == "text" else pipe.class_embedder.config.tokens
    if model.origin is not None:
        return {"class": 1, "text": 77}[model.conditioning]
    encoder, key = {"class": ("class_embedder", "tokens"), "text": ("text_encoder", "max_position_embeddings")}[
        model.conditioning
    ]
    return json.loads((ZOO / model.name / encoder / "config.json").read_text())[key]


def _quantized(pipe, model, given):
    import torch

    import quest
    from quest.calibration import CalibrationSet

    few = {key: value[:4] for key, value in given.items()}
    sample, timestep = few.pop("sample"), few.pop("timestep")
    order = torch.arange(len(sample))
    calibration = CalibrationSet(sample, timestep, torch.zeros_like(sample), order, torch.zeros_like(order), few)
    return quest.quantize(pipe, "rtn", "w8a8", calibration=calibration, samples=4).unet


def _images(pipe, model, batch, repeats, device):
    import torch

    from quest.metrics.features import EXTRACTORS
    from quest.sampling import decode

    config = pipe.unet.config
    latents = torch.randn(batch, config.in_channels, config.sample_size, config.sample_size, device=device)
    costs = {"decode": _least(lambda: decode(pipe, latents), repeats, device) / batch}
    try:
        network = EXTRACTORS[model.extractor]()
    except OSError:  # Inception's weights are neither there nor to be fetched
        return costs
    network = network.to(device) if hasattr(network, "to") else network
    images = torch.from_numpy(decode(pipe, latents)).permute(0, 3, 1, 2).to(device)
    with torch.no_grad():
        costs["features"] = _least(lambda: network(images), repeats, device) / batch
    return costs


def _least(step: Callable, repeats: int, device: str) -> float:
    import torch

    clock = time.perf_counter if device == "cuda" else time.process_time
    seconds = []
    for _ in range(1 + repeats):
        start = clock()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(clock() - start)
    return min(seconds[1:])


def _memory(device):
    import resource

    import torch

    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6  # Linux counts in KiB
