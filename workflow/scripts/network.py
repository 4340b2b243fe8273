"""Find or download the weights of a network of the metrics, check them, and write their path and hash to a file."""

from quest.runtime import command_line


def main() -> None:
    from quest.metrics import weights

    parser = command_line.parser(__doc__, "file")
    parser.add_argument("network", choices=weights.WEIGHTS)
    arguments = parser.parse_args()

    from quest.runtime.files import dumps, write_text

    try:
        path = weights.path(arguments.network)
    except (OSError, ValueError) as error:
        raise SystemExit(f"{arguments.network}: {error}; QUEST_WEIGHTS names another folder") from None
    content = dumps({"path": str(path), "sha256": weights.sha256(arguments.network)})
    write_text(arguments.output, content + "\n")
    print(f"{arguments.network}: {path}")


if __name__ == "__main__":
    main()
