"""Answer the ten questions from the results of a run, in a text with tables and figures. Imports no torch."""

from pathlib import Path

from quest.runtime import command_line


def main() -> None:
    parser = command_line.parser(__doc__, "folder")
    parser.add_argument("--properties", type=Path, nargs="+", required=True, help="tables of the three properties")
    parser.add_argument("--cells", type=Path, nargs="+", required=True, help="metrics.json of one model and bits")
    parser.add_argument("--taylor", type=Path, required=True)
    parser.add_argument("--tunings", type=Path, nargs="+", required=True, help="{variant}.json of every variant")
    parser.add_argument("--inference", type=Path, required=True)
    parser.add_argument("--signals", type=Path, required=True)
    arguments = parser.parse_args()

    import pandas as pd

    from quest.report import evidence, property_figures, questions
    from quest.report.rendering import write

    files = {name: path for name, path in vars(arguments).items() if name != "output"}
    results = evidence.read(**files)
    for name in ("taylor", "tunings", "inference", "comparisons", "qat"):
        write(arguments.output / f"{name}.csv", pd.DataFrame(getattr(evidence, f"{name}_rows")(results)))
    folder, taylor = arguments.output / "figures", pd.DataFrame(evidence.taylor_rows(results))
    title = f"{results.taylor['model']}, n = {taylor['n'].iloc[0]} trajectories"
    property_figures.taylor(taylor, folder / "taylor.png", title)
    property_figures.signals(results.signals["signals"], results.signals["classes"], folder / "signals.png")
    write(arguments.output / "questions.md", questions.document(results))


if __name__ == "__main__":
    main()
