"""Quantize the denoiser of one model with one method."""

import argparse
import json
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a name in quest.models.MODELS")
    parser.add_argument("method", help="a name in baselines.METHODS")
    parser.add_argument("bits", help="weight and activation bits, e.g. w4a8")
    parser.add_argument("--recipe", type=json.loads, default={}, help="the method's keyword arguments, as JSON")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--init", type=Path, nargs="?", help="checkpoint to start from")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()

    import torch

    import quest
    from quest.calibration import CalibrationSet
    from quest.files import atomic
    from quest.models import MODELS
    from quest.provenance import provenance

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model = MODELS[arguments.model]
    calibration = CalibrationSet.load(arguments.calibration)
    recipe = arguments.recipe | ({"init": arguments.init} if arguments.init else {})
    start = time.perf_counter()
    pipe = quest.quantize(
        model.load(), method=arguments.method, bits=arguments.bits, calibration=calibration, model=model, **recipe
    )
    metadata = {
        "model": arguments.model,
        "method": arguments.method,
        "bits": arguments.bits,
        "recipe": arguments.recipe,
        "seed": 0,
        "seconds": round(time.perf_counter() - start, 1),
        "provenance": provenance(),
    }
    with atomic(arguments.output) as file:
        quest.save(pipe, file, **metadata)
    print(f"{arguments.model} {arguments.method} {arguments.bits}: {metadata['seconds']} s", flush=True)


if __name__ == "__main__":
    main()
