"""Quantize the denoiser of one model with one method.

A method that diverges ends in a checkpoint without a denoiser, whose header says where and why.
"""

import json
import time
from pathlib import Path

from quest.runtime import command_line


def main() -> None:
    parser = command_line.parser(__doc__, "model", "method", "bits", "calibration", "file", "threads", "device")
    parser.add_argument("--recipe", type=json.loads, default={}, help="the method's keyword arguments, as JSON")
    parser.add_argument("--init", type=Path, nargs="?", help="checkpoint to start from")
    parser.add_argument("--floats", action="store_true", help="store float weights, from which other methods start")
    arguments = parser.parse_args()

    with command_line.imports():
        import torch

        import baselines
        import quest
        from baselines import METHODS
        from quest.config import parse_bits
        from quest.config.old_names import current
        from quest.diffusion.calibration_set import CalibrationSet
        from quest.diffusion.denoisers import denoiser_of
        from quest.diffusion.models import get
        from quest.kernels.cpu.core import identity
        from quest.planning import budget
        from quest.quantization.checkpoint import save_diverged
        from quest.quantization.cost import peak_memory
        from quest.quantization.header import read as read_header
        from quest.runtime import gpu_lock
        from quest.runtime.resume import digest, resuming

    torch.set_num_threads(arguments.threads)
    gpu_lock.take(arguments.device)
    torch.manual_seed(0)
    model, arguments.method = get(arguments.model), current(arguments.method)
    recipe = model.recipe(METHODS[arguments.method].quantize, parse_bits(arguments.bits)[1]) | arguments.recipe
    started = {}
    if arguments.init:
        recipe["init"] = str(arguments.init)
        header = read_header(arguments.init, diverged=True)
        started = {"init": {k: header.get(k) for k in ("method", "bits", "recipe", "cost", "seconds", "peak_memory")}}
    print(f"{arguments.model} {arguments.method} {arguments.bits}: {json.dumps(recipe)}", flush=True)

    calibration = CalibrationSet.load(arguments.calibration)
    drawn = len(calibration.trajectory.unique())
    print(budget.check(model, arguments.method, recipe, arguments.bits, drawn, arguments.device), flush=True)
    calibration = calibration.to(arguments.device)
    files = [arguments.calibration, *([arguments.init] if arguments.init else [])]
    job = {
        "job": [arguments.model, arguments.method, arguments.bits, arguments.device, arguments.threads],
        "recipe": recipe,
        "inputs": digest(*files),
        "code": digest(*(f for package in (quest, baselines) for f in Path(package.__file__).parent.rglob("*.py"))),
        "torch": torch.__version__,
        "machine": identity() | {"gpu": torch.cuda.get_device_name() if arguments.device != "cpu" else None},
    }
    with resuming(arguments.output.with_suffix(".parts"), job) as earlier:
        start = time.perf_counter()

        def spent():
            seconds = round(time.perf_counter() - start + earlier.seconds, 1)
            return {"model": model.name, "seconds": seconds, "peak_memory": peak_memory(), **started}

        try:
            pipe = quest.quantize(
                model.load(device=arguments.device),
                method=arguments.method,
                bits=arguments.bits,
                calibration=calibration,
                **recipe,
            )
            quest.save(pipe, arguments.output, arguments.floats, **spent())
            said = json.dumps(denoiser_of(pipe).quantization["cost"], indent=1)
        except FloatingPointError as error:
            of = {"method": arguments.method, "bits": arguments.bits, "recipe": recipe}
            save_diverged(arguments.output, str(error), **of, **spent())
            said = f"diverged: {error}"
    print(said)
    written = read_header(arguments.output, diverged=True)
    took = f"{written['seconds']} s, {written['peak_memory']} MB"
    print(f"{arguments.model} {arguments.method} {arguments.bits}: {took}", flush=True)


if __name__ == "__main__":
    main()
