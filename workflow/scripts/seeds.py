"""Table of the methods that were quantized with several seeds. Imports no torch."""

import argparse
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("metrics", type=Path, nargs="+", help="metrics.json of every cell; methods are named NAME@SEED")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder to write seeds.csv and seeds.md into")
    arguments = parser.parse_args()

    from quest.report.seeds import write

    write(arguments.metrics, arguments.output)
    print((arguments.output / "seeds.md").read_text())


if __name__ == "__main__":
    main()
