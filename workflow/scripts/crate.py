"""Write ro-crate-metadata.json, which describes a run for archives and other tools (RO-Crate 1.1). Imports no torch."""

from pathlib import Path

from quest.runtime import command_line


def main() -> None:
    parser = command_line.parser(__doc__)
    parser.add_argument("run", type=Path, help="results/NAME of a run; the file is written into it")
    run = parser.parse_args().run

    from quest.report.crate import FILE, crate
    from quest.runtime.files import dumps, write_text

    try:
        told = crate(run, run.resolve().name)
    except ValueError as error:
        raise SystemExit(f"crate: {error}") from None
    write_text(run / FILE, dumps(told, indent=1))
    print(f"{run / FILE}: {sum(entity['@type'] == 'File' for entity in told['@graph'])} files")


if __name__ == "__main__":
    main()
