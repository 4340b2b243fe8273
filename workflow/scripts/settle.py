"""Take the records of new cells into results/settled, judge all pairs, and say which cells the next look needs.

LOOK is the number of the next look, from 0; or the file that this script wrote for the last one, with --tables; or
`lottery`, which estimates how far each source of chance moves a cell instead. Imports no model.
"""

import json
import time
from pathlib import Path

from quest.runtime import command_line


def main() -> None:
    parser = command_line.parser(__doc__)
    parser.add_argument("look", help="number of the next look, a file of this script, or lottery")
    parser.add_argument("--evidence", type=Path, nargs="*", default=[], help="evidence.json of new cells")
    parser.add_argument("--store", type=Path, default=Path("results/settled"), help="(default %(default)s)")
    parser.add_argument("--families", type=json.loads, help="JSON of quest.config.settled.families")
    parser.add_argument("--identities", type=json.loads, help="JSON list of [model, bits, row, identity]")
    parser.add_argument("--started", type=float, default=0.0, help="when the run began, in seconds since 1970")
    parser.add_argument("--hours", type=float, default=0.0, help="hours of the run; 0: no limit")
    parser.add_argument("--tables", type=Path, help="folder for settled.csv and settled.md")
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()

    from quest.report import rendering
    from quest.report.settle import LOOKS, cells, lottery, plan, verdicts
    from quest.runtime.files import read_json
    from quest.runtime.provenance import write_json

    if arguments.tables:
        last = read_json(Path(arguments.look))
        families, identities = last["families"], _by_row(last["identities"])
        evidence, floors = cells.read(arguments.store), cells.floors(arguments.store)
        verdicts.write(verdicts.frame(evidence, families, identities, floors), arguments.tables)
        return
    for file in arguments.evidence:
        print(f"recorded: {cells.write(read_json(file), arguments.store)}")
    if arguments.look == "lottery":
        rendering.write(arguments.output, lottery.frame(cells.read(arguments.store)))
        return
    look, rows = int(arguments.look), _by_row(arguments.identities)
    evidence = cells.read(arguments.store)
    judged = verdicts.frame(evidence, arguments.families, rows, cells.floors(arguments.store))
    left = arguments.started + 3600 * arguments.hours - time.time() if arguments.hours else None
    next_look = plan.next_look(evidence, judged, arguments.families, rows, look, left)
    for line in plan.lines(judged, next_look, look):
        print(line)
    told = {"look": look, "seeds": LOOKS[look] if look < len(LOOKS) else LOOKS[-1]}
    told |= {"families": arguments.families, "identities": arguments.identities, "out_of_budget": next_look.left_out}
    write_json(
        arguments.output, told | {"wanted": next_look.wanted, "verdicts": json.loads(judged.to_json(orient="records"))}
    )


def _by_row(identities: list) -> dict:
    return {(model, bits, row): identity for model, bits, row, identity in identities}


if __name__ == "__main__":
    main()
