"""Write tables of a run from the metrics of its cells, in the order of the cells. Imports no torch.

main: every metric, paired differences and the ledger. seeds: methods that were quantized with several seeds, NAME@SEED.
nulls: full precision against itself. outliers: whether the lead of the last method grows with outliers. paper: the
tables of the paper, by number.
"""

from importlib import import_module

from quest.runtime import command_line

# Kind of tables -> the module of quest.report that writes them, and those of its files that are printed.
KINDS = {name: (name, [f"{name}.md"]) for name in ("seeds", "nulls", "outliers")}
KINDS |= {"main": ("tables", ["main.md"]), "paper": ("paper", [f"table{number}.md" for number in range(2, 12)])}


def main() -> None:
    parser = command_line.parser(__doc__, "metrics", "folder")
    parser.add_argument("--kind", choices=KINDS, default="main", help="(default %(default)s)")
    arguments = parser.parse_args()
    module, files = KINDS[arguments.kind]
    import_module(f"quest.report.{module}").write(arguments.metrics, arguments.output)
    for file in files:
        print((arguments.output / file).read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
