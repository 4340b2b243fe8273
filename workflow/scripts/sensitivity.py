"""Measure the noise-prediction error of one model with one class of layers at few bits and the rest in float."""

from quest.runtime import command_line


def main() -> None:
    shared = ("model", "bits", "calibration", "evaluation", "file", "threads")
    arguments = command_line.parser(__doc__, *shared).parse_args()

    import torch

    from quest.config import parse_bits
    from quest.diffusion.calibration_set import CalibrationSet
    from quest.diffusion.models import get
    from quest.properties.sensitivity import sensitivities
    from quest.runtime.provenance import write_json

    torch.set_num_threads(arguments.threads)
    calibration, evaluation = map(CalibrationSet.load, (arguments.calibration, arguments.evaluation))
    rows = sensitivities(get(arguments.model).load(), calibration, evaluation, *parse_bits(arguments.bits))
    write_json(arguments.output, {"model": arguments.model, "bits": arguments.bits, "rows": rows})


if __name__ == "__main__":
    main()
