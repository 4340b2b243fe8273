"""Measure the remainder of Taylor steps from full precision to a quantized denoiser, from 8 bits down to 2."""

from quest.runtime import command_line


def main() -> None:
    parser = command_line.parser(__doc__, "model", "evaluation", "file", "threads")
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 6, 5, 4, 3, 2], help="default %(default)s")
    arguments = parser.parse_args()

    from quest.diffusion.denoisers import denoiser_of
    from quest.properties.taylor import taylor
    from quest.runtime.provenance import write_json
    from workflow.scripts import opened

    _, pipe, evaluation = opened(arguments)
    rows = taylor(denoiser_of(pipe), evaluation, arguments.bits)
    write_json(arguments.output, {"model": arguments.model, "rows": rows})


if __name__ == "__main__":
    main()
