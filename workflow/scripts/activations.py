"""Measure the distributions of the layers' inputs: in full precision, and quantized before and after finetuning."""

from pathlib import Path

from quest.runtime import command_line


def main() -> None:
    parser = command_line.parser(__doc__, "model", "bits", "calibration", "evaluation", "file", "threads")
    parser.add_argument("--init", type=Path, required=True, help="checkpoint that finetuning started from")
    parser.add_argument("--finetuned", type=Path, required=True, help="QuEST's checkpoint")
    arguments = parser.parse_args()

    import torch

    import quest
    from baselines import METHODS
    from quest.config import parse_bits
    from quest.diffusion.calibration_set import CalibrationSet
    from quest.diffusion.denoisers import denoiser_of
    from quest.diffusion.models import get
    from quest.properties.distributions import EDGES, distributions, spreads
    from quest.runtime.provenance import write_json

    torch.set_num_threads(arguments.threads)
    model = get(arguments.model)
    recipe = model.recipe(METHODS["quest-suite"].quantize, parse_bits(arguments.bits)[1]) | {
        "init": str(arguments.init)
    }
    recipe |= {"tla_iterations": 0, "cma_iterations": 0}
    pipe = model.load()
    calibration, evaluation = map(CalibrationSet.load, (arguments.calibration, arguments.evaluation))
    untuned = quest.quantize(pipe, "quest-suite", arguments.bits, calibration=calibration, **recipe)
    finetuned = quest.load(pipe, arguments.finetuned, kernel="reference")
    scale = spreads(denoiser_of(pipe), evaluation)
    pipes = {"full precision": pipe, "before finetuning": untuned, "after finetuning": finetuned}
    denoisers = {name: distributions(denoiser_of(one), evaluation, scale) for name, one in pipes.items()}
    content = {"model": arguments.model, "bits": arguments.bits, "edges": EDGES.tolist(), "denoisers": denoisers}
    write_json(arguments.output, content)


if __name__ == "__main__":
    main()
