"""Sample grid of one model at given bits: a row per method, the same seeds in each. Imports no torch."""

from pathlib import Path

from quest.runtime import command_line


def main() -> None:
    parser = command_line.parser(__doc__, "file")
    parser.add_argument("samples", type=Path, nargs="+", help="{model}/{method}/{bits}/samples-0.npz, a row each")
    parser.add_argument("-n", type=int, default=8, help="columns")
    arguments = parser.parse_args()

    import numpy as np

    from quest.report.figures import sample_grid

    rows = []
    for file in arguments.samples:
        model, method, bits = file.parts[-4:-1]
        with np.load(file) as arrays:
            label = "full precision" if method == "fp" else f"{method}\n{bits.upper()}"
            rows.append((label, arrays["images"][: arguments.n]))
    sample_grid(rows, arguments.output, title=f"{model}, the same seed in every row")


if __name__ == "__main__":
    main()
