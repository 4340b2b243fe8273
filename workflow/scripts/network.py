"""A network of the metrics that does not ship: its weights found or fetched, and checked; writes where they lie."""

from quest.runtime import command_line


def main() -> None:
    from quest.metrics import weights

    parser = command_line.parser(__doc__, "file")
    parser.add_argument("network", choices=weights.WEIGHTS)
    arguments = parser.parse_args()

    from quest.runtime.files import atomic, dumps

    try:
        path = weights.path(arguments.network)
    except (OSError, ValueError) as error:
        raise SystemExit(f"{arguments.network}: {error}; QUEST_WEIGHTS names another folder") from None
    with atomic(arguments.output) as file:
        file.write_text(
            dumps({"path": str(path), "sha256": weights.sha256(arguments.network)}) + "\n", encoding="utf-8"
        )
    print(f"{arguments.network}: {path}")


if __name__ == "__main__":
    main()
