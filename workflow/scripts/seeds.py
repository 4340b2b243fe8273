"""Write the table of methods that were quantized with several seeds and are named NAME@SEED. Imports no torch."""

from quest.runtime import command_line


def main() -> None:
    arguments = command_line.parser(__doc__, "metrics", "folder").parse_args()

    from quest.report.seeds import write

    write(arguments.metrics, arguments.output)
    print((arguments.output / "seeds.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
