"""Write tables of a run from the metrics of its cells, in the order of the cells. Imports no torch.

main: every metric, paired differences and the ledger. seeds: methods that were quantized with several seeds, NAME@SEED.
nulls: full precision against itself. outliers: whether the lead of the last method grows with outliers. paper: the
tables of the paper, by number.
"""

from importlib import import_module

from quest.runtime import command_line

KINDS = ("main", "seeds", "nulls", "outliers", "paper")


def main() -> None:
    parser = command_line.parser(__doc__, "metrics", "folder")
    parser.add_argument("--kind", choices=KINDS, default="main", help="(default %(default)s)")
    arguments = parser.parse_args()
    kind = arguments.kind
    module = import_module(f"quest.report.{'tables' if kind == 'main' else kind}")
    module.write(arguments.metrics, arguments.output)
    for name in [f"table{number}" for number in module.TABLES] if kind == "paper" else [kind]:
        print((arguments.output / f"{name}.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
