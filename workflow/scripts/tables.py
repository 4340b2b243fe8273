"""Tables of a run from the metrics of its cells. Imports no torch."""

import argparse
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("metrics", type=Path, nargs="+", help="metrics.json of every cell, in the order of the rows")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder to write the tables into")
    arguments = parser.parse_args()

    from quest.report.tables import write

    write(arguments.metrics, arguments.output)
    print((arguments.output / "main.md").read_text())


if __name__ == "__main__":
    main()
