"""Compute all metrics of one cell from its arrays. Imports no torch."""

from pathlib import Path

from quest.runtime import command_line


def main() -> None:
    parser = command_line.parser(__doc__, "model", "method", "bits", "file")
    parser.add_argument("--features", type=Path, nargs="+", required=True, help="features-*.npz of the cell")
    parser.add_argument("--samples", type=Path, nargs="+", required=True, help="samples-*.npz of the cell")
    parser.add_argument("--fp-features", type=Path, nargs="+", required=True, help="features-*.npz of full precision")
    parser.add_argument("--fp-samples", type=Path, nargs="+", required=True, help="samples-*.npz of full precision")
    parser.add_argument(
        "--reference", type=Path, nargs="?", help="statistics of real images, for FID, sFID and precision"
    )
    parser.add_argument("--null", action="store_true", help="a null control of full precision, on fewer of its images")
    arguments = parser.parse_args()

    with command_line.imports():
        from quest.diffusion.models import get
        from quest.metrics import Cell, measure
        from quest.metrics.frechet import load_reference
        from quest.report.ledger import fingerprint
        from quest.runtime.download import sha256_of
        from quest.runtime.provenance import write_json

    model = get(arguments.model)
    cell = Cell.load(arguments.features, arguments.samples)
    fp = None if arguments.method == "fp" else Cell.load(arguments.fp_features, arguments.fp_samples)
    reference, reference_sha256 = None, ""
    if arguments.reference:
        reference, reference_sha256 = load_reference(arguments.reference), sha256_of(arguments.reference)
        reference.check(model.extractor, str(arguments.reference))
    settings = {"extractor": model.extractor, "clip": model.clip, "protocol": model.protocol}
    if arguments.null:
        fp = fp.only(cell.index)
    measured = measure(cell, reference, fp, **settings, reference_sha256=reference_sha256)
    if arguments.null:  # what full precision itself has on these images
        measured["full_precision"] = {
            row["metric"]: row["value"] for row in measure(fp, reference, None, **settings)["rows"]
        }
    run = {"model": arguments.model, "method": arguments.method, "bits": arguments.bits}
    measured["fingerprint"] = fingerprint(model, measured["drawn"]["images"], len(cell.index), reference_sha256)
    write_json(arguments.output, run | measured)
    for row in measured["rows"]:
        print(f"{row['metric']:>10} {row['value']:10.4g}  [{row['low']:.4g}, {row['high']:.4g}]  {row['note']}")


if __name__ == "__main__":
    main()
