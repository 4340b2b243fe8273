"""Write the errors of the layers of quantized denoisers of one model: their median and quartiles, a row for each cell.

A checkpoint lies in a folder METHOD/BITS. One that diverged has no layers, and no row.
"""

from pathlib import Path

from quest.runtime import command_line

COLUMNS = ["model", "method", "bits", "checkpoint", "layers", "lower", "median", "upper"]


def main() -> None:
    parser = command_line.parser(__doc__, "model", "evaluation", "file", "threads", "device")
    parser.add_argument("--checkpoints", type=Path, nargs="*", default=[], help="model.safetensors of cells")
    arguments = parser.parse_args()

    with command_line.imports():
        import numpy as np
        import pandas as pd

        import quest
        from quest.properties.layer_errors import layer_errors
        from quest.quantization.header import read as read_header
        from quest.report import rendering
        from workflow.scripts import opened

    model, pipe, evaluation = opened(arguments)
    rows = []
    for file in arguments.checkpoints:
        header = read_header(file, diverged=True)
        if "diverged" in header:
            continue
        errors = list(layer_errors(pipe, quest.load(pipe, file, "reference"), evaluation).values())
        lower, median, upper = np.quantile(errors, (0.25, 0.5, 0.75)).tolist()
        names = {"model": model.name, "method": file.parts[-3], "bits": file.parts[-2], "checkpoint": header["hash"]}
        rows.append(names | {"layers": len(errors), "lower": lower, "median": median, "upper": upper})
        print(f"{file}: median {median:.3g} of {len(errors)} layers", flush=True)
    rendering.write(arguments.output, pd.DataFrame(rows, columns=COLUMNS))


if __name__ == "__main__":
    main()
