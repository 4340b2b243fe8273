"""Draw figures of a run: metrics against bits, and errors and ranges against timesteps. Imports no torch."""

from pathlib import Path

from quest.runtime import command_line


def main() -> None:
    parser = command_line.parser(__doc__)
    parser.add_argument("--main", type=Path, required=True, help="main.csv")
    parser.add_argument("--eps-error", type=Path, required=True, help="eps_error.csv")
    parser.add_argument("--ranges", type=Path, nargs="+", required=True, help="{model}/ranges.csv of every model")
    outputs = "{metric}_vs_bits.png, eps_error_vs_timestep.png or activation_ranges_vs_timestep.png"
    parser.add_argument("-o", "--output", type=Path, nargs="+", required=True, help=outputs)
    arguments = parser.parse_args()

    import pandas as pd

    from quest.report import figures
    from quest.report.rendering import read_csv

    main_frame = read_csv(arguments.main)
    for output in arguments.output:
        if output.stem == "eps_error_vs_timestep":
            figures.eps_error_curves(pd.read_csv(arguments.eps_error), output)
        elif output.stem == "activation_ranges_vs_timestep":
            frames = [pd.read_csv(file).assign(model=file.parent.name) for file in arguments.ranges]
            figures.activation_ranges(pd.concat(frames), output)
        else:
            figures.metric_vs_bits(main_frame, output.stem.removesuffix("_vs_bits"), output)
        print(output, flush=True)


if __name__ == "__main__":
    main()
