"""Measure the noise-prediction error of one model with one class of layers at few bits and the rest in float."""

from quest.runtime import command_line


def main() -> None:
    shared = ("model", "bits", "calibration", "evaluation", "file", "threads")
    arguments = command_line.parser(__doc__, *shared).parse_args()

    from quest.config import parse_bits
    from quest.properties.sensitivity import sensitivities
    from quest.runtime.provenance import write_json
    from workflow.scripts import opened

    _, pipe, calibration, evaluation = opened(arguments)
    rows = sensitivities(pipe, calibration, evaluation, *parse_bits(arguments.bits))
    write_json(arguments.output, {"model": arguments.model, "bits": arguments.bits, "rows": rows})


if __name__ == "__main__":
    main()
