"""A network of the metrics that does not ship: its weights found or fetched, and checked; writes where they lie."""

import argparse
import json
from pathlib import Path


def main() -> None:
    from quest.metrics import weights

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("network", choices=weights.WEIGHTS)
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()

    from quest.runtime.files import atomic

    try:
        path = weights.path(arguments.network)
    except (OSError, ValueError) as error:
        raise SystemExit(f"{arguments.network}: {error}; QUEST_WEIGHTS names another folder") from None
    with atomic(arguments.output) as file:
        file.write_text(json.dumps({"path": str(path), "sha256": weights.sha256(arguments.network)}) + "\n")
    print(f"{arguments.network}: {path}")


if __name__ == "__main__":
    main()
