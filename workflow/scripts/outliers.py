"""Write whether the lead of the last method grows with outliers. Imports no torch."""

from quest.runtime import command_line


def main() -> None:
    arguments = command_line.parser(__doc__, "metrics", "folder").parse_args()

    from quest.report.outliers import write

    write(arguments.metrics, arguments.output)
    print((arguments.output / "outliers.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
