"""Measure the effect of quantizing the time-embedding path of one model, and of everything but it and the ends.

Activation ranges are static, or there is one for each timestep. It also measures the embeddings of QuEST's checkpoint.
"""

from pathlib import Path

from quest.runtime import command_line


def main() -> None:
    parser = command_line.parser(__doc__, "model", "bits", "calibration", "evaluation", "file", "threads")
    parser.add_argument("--finetuned", type=Path, required=True, help="QuEST's checkpoint at these bits")
    arguments = parser.parse_args()

    import quest
    from quest.config import parse_bits
    from quest.diffusion.denoisers import denoiser_of
    from quest.metrics.noise_prediction import eps_error
    from quest.properties.embeddings import PATH, embeddings, moved
    from quest.properties.sensitivity import ENDS, lowered, parts
    from quest.report.properties import RANGE_KINDS
    from quest.runtime.provenance import write_json
    from workflow.scripts import opened

    _, pipe, calibration, evaluation = opened(arguments)
    bits = parse_bits(arguments.bits)
    exact = embeddings(denoiser_of(pipe), evaluation)
    layers = parts(denoiser_of(pipe))  # class of layers -> names
    rest = [name for layer_class, names in layers.items() if layer_class not in (PATH, ENDS) for name in names]
    errors, distances = [], []

    def measure(ranges, student):
        for name, value in moved(exact, embeddings(denoiser_of(student), evaluation)).items():
            distances.append({"ranges": ranges, "what": name, "values": value.tolist()})

    for ranges, time_groups in zip(RANGE_KINDS, (1, len(calibration.timesteps)), strict=True):
        for quantized, names in ((PATH, layers[PATH]), (f"all but {PATH}", rest), ("all", layers[PATH] + rest)):
            student = lowered(pipe, calibration, names, *bits, time_groups=time_groups)
            error, _ = eps_error(student, evaluation)
            errors.append({"quantized": quantized, "ranges": ranges, "errors": error.mean(1).tolist()})
            print(f"{quantized}, {ranges}: {error.mean().item():.4g}", flush=True)
            if quantized == PATH:
                measure(ranges, student)
    diverged = ""
    try:
        measure("QuEST", quest.load(pipe, arguments.finetuned, kernel="reference"))
    except FloatingPointError as error:  # there is no denoiser of which embeddings could be measured
        diverged = str(error)
        print(f"diverged: {diverged}", flush=True)
    content = {"model": arguments.model, "bits": arguments.bits, "timesteps": evaluation.timesteps}
    write_json(arguments.output, content | {"errors": errors, "distances": distances, "diverged": diverged})


if __name__ == "__main__":
    main()
