"""Measure how jobs grow with images, calibration rows, parameters, iterations and cells, each over a decade (Linux).

Every job is the real script, in a copy of this process, which has its imports already. So what is measured are the
processor seconds and the anonymous memory that the job's own work takes, on one thread, whatever else the machine does.
Rows of axes that are not measured again stay in the table.
"""

import importlib
import json
import os
import sys
from pathlib import Path

from quest.runtime import command_line

SCRIPTS = ("trajectories", "quantize", "sample", "metrics", "seeds", "tables", "settle")
IMAGES = (100, 200, 500, 1000)
TRAJECTORIES = (4, 8, 20, 40)
WIDTHS = (32, 48, 72, 104)  # channels of a random U-Net
ITERATIONS = (10, 20, 50, 100)
TIMES = (1, 2, 5, 10)  # a number of cells
METHODS = ("one", "two", "three")  # of the cells, which are drawn


def main() -> None:
    parser = command_line.parser(__doc__, "folder")
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--repeats", type=command_line.whole, default=2, help="of each job (default %(default)s)")
    parser.add_argument("--work", type=Path, help="folder for what jobs write (default: work, in the output)")
    arguments = parser.parse_args()
    work = (arguments.work or arguments.output / "work").absolute()
    work.mkdir(parents=True, exist_ok=True)
    os.environ["QUEST_RESULTS"] = str(work)  # models with random weights are recorded there

    import pandas as pd

    from quest.report import growth, rendering

    frame = growth.read(arguments.output / "growth.csv")
    frame = frame[~frame["axis"].isin(arguments.axes)]
    bench = Bench(work, arguments.repeats)
    for axis in arguments.axes:
        for row in AXES[axis](bench):
            rows = pd.DataFrame([{"axis": axis} | row], columns=growth.COLUMNS)
            frame = rows if frame.empty else pd.concat([frame, rows], ignore_index=True)
            rendering.write(arguments.output / "growth.csv", frame)
            told = f"{row['size']}: {row['seconds']:.3g} s, {row['memory_mb']:.3g} MB"
            print(axis, row["job"], told, flush=True)
    growth.write(frame, arguments.output)


class Bench:
    """Runs jobs in copies of this process, in a folder, and tells what they cost."""

    def __init__(self, folder: Path, repeats: int):
        import torch

        from quest.benchmark.machine import made_with
        from quest.report import speed

        torch.set_num_threads(1)
        self.folder, self.repeats = folder, repeats
        self.told = {"machine": speed.machine()} | made_with()

    def once(self, job: str, output: Path, *words) -> Path:
        """Run a script whose cost is not asked for, unless it has run. Returns its output."""
        if not output.exists():
            self._cost(job, words)
        return output

    def measured(self, job: str, size: int, outputs: list[Path], script: str, *words):
        """Run a script as often as asked for, each time without its outputs. Yields its costs."""
        from quest.benchmark.machine import busy_elsewhere, processor_time

        for _ in range(self.repeats):
            for output in outputs:
                output.unlink(missing_ok=True)
            before = processor_time()
            cost = self._cost(script, words)
            others = max(0.0, busy_elsewhere(before) - cost["seconds"] / (processor_time()[0] - before[0]))
            yield {"job": job, "size": size, "others": others} | cost | self.told

    def _cost(self, script: str, words) -> dict[str, float]:
        from quest.planning.meter import in_copy

        module = importlib.import_module(f"workflow.scripts.{script}")

        def work():
            sys.argv = [script, *map(str, words)]
            module.main()

        return in_copy(work, self.folder / f"{script}.log")

    def trajectories(self, model: str, n: int) -> tuple[Path, Path]:
        """A calibration set and a held-out set of a model."""
        files = [self.folder / f"{model}-{n}-{name}.safetensors" for name in ("calibration", "evaluation")]
        words = ["-n", n, "--calibration", files[0], "-e", n, "--evaluation", files[1]]
        self.once("trajectories", files[1], model, *words)
        return tuple(files)

    def quantized(self, model: str, size: int, method: str, calibration: Path, **recipe):
        """Costs of a method on a model, at 4 bits."""
        output = self.folder / f"{model}-{method}.safetensors"
        words = ["--recipe", json.dumps(recipe), "--calibration", calibration, "-o", output]
        bits = "w4a32" if method == "adaround" else "w4a4"
        return self.measured(method, size, [output], "quantize", model, method, bits, *words)


def images(bench: Bench):
    """Sampling and metrics; the cell is compared with itself, which costs the same."""
    from quest.diffusion.models import get

    model = get("photos-class")
    calibration, evaluation = bench.trajectories(model.name, 2)
    checkpoint = bench.folder / "rtn.safetensors"
    bench.once("quantize", checkpoint, model.name, "rtn", "w4a4", "--calibration", calibration, "-o", checkpoint)
    samples, features, output = (bench.folder / name for name in ("samples.npz", "features.npz", "metrics.json"))
    told = [model.name, "--checkpoint", checkpoint, "--evaluation", evaluation]
    for n in IMAGES:
        yield from bench.measured(
            "sample", n, [samples, features], "sample", *told, "-n", n, "--samples", samples, "--features", features
        )
        files = ["--features", features, "--samples", samples, "--fp-features", features, "--fp-samples", samples]
        run = [model.name, "rtn", "w4a4", *files, "--reference", model.reference, "-o", output]
        yield from bench.measured("metrics", n, [output], "metrics", *run)


def rows(bench: Bench):
    """Trajectories, and methods that take all rows; they hardly learn, so that rows are what costs."""
    from quest.diffusion.models import get

    model = get("scenes-class")
    for n in TRAJECTORIES:
        file, size = bench.folder / f"rows-{n}.safetensors", n * model.calls * model.halves
        yield from bench.measured(
            "trajectories", size, [file], "trajectories", model.name, "-n", n, "--calibration", file
        )
        every = 10**6
        yield from bench.quantized(model.name, size, "adaround", file, rows=every, weight_iterations=2)
        stages = dict(tla_iterations=2, cma_iterations=2)
        yield from bench.quantized(model.name, size, "quest-suite", file, samples=every, **stages)


def parameters(bench: Bench):
    """A method that learns units, one that learns the whole denoiser, and sampling."""
    for width in WIDTHS:
        model, size = random_model(bench.folder, width)
        calibration, evaluation = bench.trajectories(model, 4)
        yield from bench.quantized(model, size, "adaround", calibration, weight_iterations=20, batch=4)
        stages = dict(tla_iterations=10, cma_iterations=10, batch=4)
        yield from bench.quantized(model, size, "quest-suite", calibration, **stages)
        files = [bench.folder / name for name in ("samples.npz", "features.npz")]
        words = ["-n", 8, "--evaluation", evaluation, "--samples", files[0], "--features", files[1]]
        yield from bench.measured("sample, full precision", size, files, "sample", model, *words)


def iterations(bench: Bench):
    """The same methods on the smallest of these denoisers."""
    model, _ = random_model(bench.folder, WIDTHS[0])
    calibration, _ = bench.trajectories(model, 4)
    for n in ITERATIONS:
        yield from bench.quantized(model, n, "adaround", calibration, weight_iterations=n, batch=4)
        yield from bench.quantized(model, n, "quest-suite", calibration, tla_iterations=n, cma_iterations=n, batch=4)


def random_model(folder: Path, width: int) -> tuple[str, int]:
    """A random U-Net on pixels of this many channels, declared as a config declares one: its name and parameters."""
    import torch
    from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

    from quest.diffusion import declared
    from quest.diffusion.models import PREPARED

    torch.manual_seed(0)
    name, place = f"random-{width}", folder / f"pipeline-{width}"
    unet = UNet2DModel(
        sample_size=16,
        layers_per_block=1,
        block_out_channels=(width, 2 * width),
        down_block_types=("AttnDownBlock2D",) * 2,
        up_block_types=("AttnUpBlock2D",) * 2,
        norm_num_groups=8,
    )
    if not place.exists():
        DDIMPipeline(unet, DDIMScheduler()).save_pretrained(place)
        declared.prepare(name, {"pipeline": str(place), "sampler": "ddim", "steps": 5}, PREPARED / name)
    return name, sum(p.numel() for p in unet.parameters())


def cells(bench: Bench):
    """Tables and verdicts of quantization seeds, of drawn cells as small models have them."""
    import numpy as np

    from quest.metrics import Cell, measure
    from quest.report.settle import SEEDS
    from quest.report.settle import cells as records
    from quest.runtime.provenance import write_json

    draw = np.random.default_rng(0)

    def drawn() -> Cell:
        shapes = {"pool": (500, 16), "spatial": (500, 16), "logits": (500, 16)}
        pictures = draw.integers(0, 256, (500, 16, 16, 3), np.uint8)
        features, latents = {name: draw.normal(size=shape) for name, shape in shapes.items()}, draw.random((500, 64))
        return Cell(np.arange(500), features, pictures, latents, draw.random((4, 5)), None, np.arange(5))

    cell = drawn()
    measured = measure(cell, None, drawn(), extractor="scenes")
    folder = bench.folder / "cells"

    def file(model: str, method: str) -> Path:
        run = {"model": model, "method": method, "bits": "w4a4"}
        write_json(folder / model / f"{method}.json", run | measured)
        return folder / model / f"{method}.json"

    table, done = folder / "tables", 0
    pairs = [["one", "two"], ["one", "three"], ["two", "three"]]
    last = {"families": {"all": {"bits": ["w4a4"], "pairs": pairs}}, "identities": []}
    write_json(folder / "last.json", last)
    for times in TIMES:
        count = len(METHODS) * 3 * times
        of_seeds = [file("seeds", f"{method}@{seed}") for seed in range(3 * times) for method in METHODS]
        yield from bench.measured("seeds", count, [], "tables", *of_seeds, "--kind", "seeds", "-o", table)
        of_models = [file(f"m{i}", f"{method}{k}") for i in range(times) for k in range(3) for method in METHODS]
        yield from bench.measured("tables", count, [], "tables", *of_models, "-o", table)
        for model, seed, method in ((m, s, x) for m in range(done, times) for s in SEEDS for x in METHODS):
            told = measured | {"model": f"m{model}", "method": method, "bits": "w4a4"}
            records.write(records.content(cell, drawn(), told, seed, seed, {}, {}), folder / "settled")
        done = times
        words = [folder / "last.json", "--store", folder / "settled", "--tables", table]
        yield from bench.measured("settle", len(METHODS) * len(SEEDS) * times, [], "settle", *words)


AXES = {"images": images, "rows": rows, "parameters": parameters, "iterations": iterations, "cells": cells}

if __name__ == "__main__":
    main()
