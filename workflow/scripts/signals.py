"""Quantize the denoiser of one-dimensional signals with several methods, and compare them with full precision."""

import time
from pathlib import Path

from quest.runtime import command_line

METHODS = ("rtn-mse", "q-diffusion", "quest-suite")


def main() -> None:
    parser = command_line.parser(__doc__, "bits", "file", "threads")
    parser.add_argument("--weights", type=Path, required=True, help="weights that quest.zoo.train_signals wrote")
    parser.add_argument("-n", type=int, default=200, help="signals to draw with each method (default %(default)s)")
    arguments = parser.parse_args()

    import tempfile

    import numpy as np
    import torch

    import quest
    from quest.config import parse_bits
    from quest.diffusion.calibration_set import collect
    from quest.diffusion.sampling import generate
    from quest.metrics.noise_prediction import eps_error
    from quest.metrics.per_image import latent_mse
    from quest.runtime.provenance import write_json
    from quest.zoo import signals, train_signals

    torch.set_num_threads(arguments.threads)
    model = train_signals.model(arguments.weights)
    pipe = model.load()
    calibration, evaluation = collect(pipe, model, "calibration", 50), collect(pipe, model, "evaluation", 16)

    def sample(one):
        return np.concatenate([latents.numpy() for _, latents, _ in generate(one, model, "evaluation", arguments.n)])

    exact = sample(pipe)
    results, examples = {}, {"full precision": exact[: len(signals.CLASSES), 0, 0].tolist()}
    with tempfile.TemporaryDirectory() as folder:
        start = Path(folder, "adaround.safetensors")
        began = time.perf_counter()
        w, _ = parse_bits(arguments.bits)
        rounded = quest.quantize(pipe, "adaround", f"w{w}a32", calibration=calibration)
        quest.save(rounded, start, floats=True)
        rounding = time.perf_counter() - began
        for method in METHODS:
            began = time.perf_counter()
            recipe = {} if method == "rtn-mse" else {"init": str(start)}
            student = quest.quantize(pipe, method, arguments.bits, calibration=calibration, **recipe)
            seconds = time.perf_counter() - began + (rounding if recipe else 0)
            samples = sample(student)
            results[method] = {
                "eps_error": eps_error(student, evaluation)[0].mean(1).tolist(),
                "latent_mse": latent_mse(samples, exact).tolist(),
                "seconds": round(seconds, 1),
            }
            examples[method] = samples[: len(signals.CLASSES), 0, 0].tolist()
            print(method, {k: round(float(np.mean(v)), 4) for k, v in results[method].items()}, flush=True)
    real = signals.draw("evaluation", len(signals.CLASSES)).values.tolist()
    content = {"bits": arguments.bits, "n": arguments.n, "methods": results, "classes": list(signals.CLASSES)}
    write_json(arguments.output, content | {"signals": {"data": real} | examples})


if __name__ == "__main__":
    main()
