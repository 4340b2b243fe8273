"""Write the table and the figure of ablations, where each row changes one setting. Imports no torch."""

import json
from pathlib import Path

from quest.runtime import command_line


def main() -> None:
    parser = command_line.parser(__doc__)
    parser.add_argument(
        "metrics", type=Path, nargs="*", help="metrics.json of every cell, in the folder of its checkpoint"
    )
    parser.add_argument("--ablations", type=json.loads, required=True, help="`ablations` of the config, as JSON")
    parser.add_argument("--csv", type=Path, required=True, help="file to write")
    parser.add_argument("--markdown", type=Path, required=True, help="file to write")
    parser.add_argument("--figure", type=Path, required=True, help="file to write")
    arguments = parser.parse_args()
    if not arguments.ablations:
        parser.error("the config has no ablations")

    from quest.report import ablations, figures

    frame = ablations.write(arguments.metrics, arguments.ablations, arguments.csv, arguments.markdown)
    figures.paired_differences(frame, arguments.ablations["against"], "log_latent_mse", arguments.figure)
    print(arguments.markdown.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
