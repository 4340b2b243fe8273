"""Draw a sample grid of one model at one bit width: a row per method, the same seeds in each. Imports no torch."""

from pathlib import Path

from quest.runtime import command_line


def main() -> None:
    parser = command_line.parser(__doc__, "file")
    parser.add_argument("samples", type=Path, nargs="+", help="{model}/{method}/{bits}/samples-0.npz, a row each")
    parser.add_argument("-n", type=int, default=8, help="columns")
    arguments = parser.parse_args()

    from quest.report.figures import sample_grid
    from quest.runtime.files import read_arrays

    rows = []
    for file in arguments.samples:
        model, method, bits = file.parts[-4:-1]
        label = "full precision" if method == "fp" else f"{method}\n{bits.upper()}"
        rows.append((label, read_arrays(file, ["images"])["images"][: arguments.n]))
    sample_grid(rows, arguments.output, title=f"{model}, the same seed in every row")


if __name__ == "__main__":
    main()
