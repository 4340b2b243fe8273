"""Write whether cheap measures rank the methods of a run as endpoints do: tables and a figure. Imports no torch."""

from pathlib import Path

from quest.runtime import command_line


def main() -> None:
    parser = command_line.parser(__doc__, "folder")
    parser.add_argument("--main", type=Path, required=True, help="main.csv")
    parser.add_argument("--paired", type=Path, help="paired.csv")
    parser.add_argument("--layers", type=Path, nargs="*", default=[], help="layer_errors.csv of each model")
    arguments = parser.parse_args()

    import pandas as pd

    from quest.report import rankings
    from quest.report.rendering import read_csv

    layers = pd.concat([read_csv(file) for file in arguments.layers]) if arguments.layers else None
    paired = read_csv(arguments.paired) if arguments.paired else None
    rankings.write(read_csv(arguments.main), paired, layers, arguments.output)
    print((arguments.output / "tables" / "rankings.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
