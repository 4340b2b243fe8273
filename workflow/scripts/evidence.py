"""Write what a cell leaves in results/settled: values per image and resamples, with machine, versions and hashes."""

import json
from pathlib import Path

from quest.runtime import command_line


def main() -> None:
    parser = command_line.parser(__doc__, "file")
    parser.add_argument("--metrics", type=Path, required=True, help="metrics.json of the cell")
    parser.add_argument("--checkpoint", type=Path, nargs="?", help="its quantized denoiser; full precision has none")
    for name in ("features", "samples", "fp-features", "fp-samples"):
        parser.add_argument(f"--{name}", type=Path, nargs="+", required=True, help=f"{name}-*.npz, as for metrics")
    parser.add_argument("--told", type=json.loads, required=True, help="what all seeds share, see quest.config.settled")
    arguments = parser.parse_args()

    from quest.config import parts_of
    from quest.metrics import Cell
    from quest.quantization.header import read as read_header
    from quest.report.cells import read_cells
    from quest.report.settle import cells
    from quest.runtime.download import sha256_of
    from quest.runtime.files import dumps, loads, read_arrays, write_text

    (measured,) = read_cells([arguments.metrics])
    cell = Cell.load(arguments.features, arguments.samples)
    exact = measured["method"] == "fp"
    fp = None if exact else Cell.load(arguments.fp_features, arguments.fp_samples)
    _, draw, seed = parts_of(measured["method"])
    seed = int(seed) if seed else arguments.told["recipes"][0][1].get("seed", 0)
    header = read_header(arguments.checkpoint, diverged=True) if arguments.checkpoint else {}
    metadata = [loads(str(read_arrays(file)["metadata"]), file) for file in arguments.samples]
    # What is not known of an old file is left out of the sum.
    spent = [one.get("seconds") or 0 for one in (header, header.get("init") or {}, *metadata)]
    about = {
        "seconds": round(sum(spent), 1),
        "commits": sorted({str(one.get("commit")) for one in [*measured["sampled"], measured["provenance"]]}),
        "versions": measured["provenance"].get("versions"),
        "machine": next((one.get("machine") for one in measured["sampled"]), None),
        "date": measured["provenance"].get("date"),
        "checkpoint": header.get("hash"),
        "footprint": {name: measured["footprint"].get(name) for name in ("effective_bits", "realizable")},
        "samples": [sha256_of(file) for file in arguments.samples],
    }
    record = cells.content(cell, fp, measured, seed, int(draw or 0), arguments.told, about)
    write_text(arguments.output, dumps(record))


if __name__ == "__main__":
    main()
