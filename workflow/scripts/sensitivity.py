"""Noise-prediction error of one model with one class of layers at a time at few bits, the rest in float."""

import argparse
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a name in quest.diffusion.models.MODELS")
    parser.add_argument("bits", help="weight and activation bits of the class that is lowered, e.g. w4a4")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--evaluation", type=Path, required=True, help="held-out trajectories")
    parser.add_argument("-o", "--output", type=Path, required=True, help="json file to write")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()

    import torch

    from quest.config import parse_bits
    from quest.diffusion.calibration_set import CalibrationSet
    from quest.diffusion.models import MODELS
    from quest.properties.sensitivity import sensitivities
    from quest.runtime.provenance import write_json

    torch.set_num_threads(arguments.threads)
    calibration, evaluation = map(CalibrationSet.load, (arguments.calibration, arguments.evaluation))
    rows = sensitivities(MODELS[arguments.model].load(), calibration, evaluation, *parse_bits(arguments.bits))
    write_json(arguments.output, {"model": arguments.model, "bits": arguments.bits, "rows": rows})


if __name__ == "__main__":
    main()
