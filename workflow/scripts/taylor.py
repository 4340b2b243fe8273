"""What Taylor steps from full precision to a quantized denoiser leave over, from 8 bits down to 2."""

import argparse
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a name in quest.diffusion.models.MODELS")
    parser.add_argument("--evaluation", type=Path, required=True, help="held-out trajectories")
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 6, 5, 4, 3, 2], help="default %(default)s")
    parser.add_argument("-o", "--output", type=Path, required=True, help="json file to write")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()

    import torch

    from quest.diffusion.calibration_set import CalibrationSet
    from quest.diffusion.models import MODELS
    from quest.properties.taylor import taylor
    from quest.runtime.provenance import write_json

    torch.set_num_threads(arguments.threads)
    evaluation = CalibrationSet.load(arguments.evaluation)
    rows = taylor(MODELS[arguments.model].load().unet, evaluation, arguments.bits)
    write_json(arguments.output, {"model": arguments.model, "rows": rows})


if __name__ == "__main__":
    main()
