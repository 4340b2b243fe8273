"""Measure how fast kernels are on this machine, by layer and by denoiser step, and compare them with alternatives."""

from pathlib import Path

from quest.runtime import command_line


def main() -> None:
    parser = command_line.parser(__doc__)
    models = "names in diffusion.models.MODELS (default: those that ship and two of the paper)"
    parser.add_argument("--models", nargs="+", help=models)
    parser.add_argument("--threads", type=command_line.whole, nargs="+", default=[1, 2])
    parser.add_argument("--parts", nargs="+", choices=("peak", "layer", "step"), default=["peak", "layer", "step"])
    budget = "minutes; the table lists the timings that did not fit, and the next run begins with them"
    parser.add_argument("--budget", type=float, default=25, help=budget)
    output = "folder to write MACHINE.csv, .md and .png into"
    parser.add_argument("-o", "--output", type=Path, default="results/kernels", help=output)
    arguments = parser.parse_args()

    from quest import benchmark
    from quest.benchmark.machine import instruction_set
    from quest.benchmark.shapes import PAPER, ZOO
    from quest.diffusion.models import get
    from quest.report import figures, speed

    models = tuple(get(name).name for name in arguments.models or (*ZOO, *PAPER))
    path = arguments.output / f"{speed.slug(speed.machine(), instruction_set())}.csv"
    frame = speed.read(path) if path.is_file() else None
    known = set() if frame is None else {speed.key(row) for row in frame.to_dict("records") if not speed.left_out(row)}
    left_out = []
    threads, parts = (tuple(dict.fromkeys(given)) for given in (arguments.threads, arguments.parts))
    for rows in benchmark.run(models, threads, arguments.budget, known, parts):
        if all(map(speed.left_out, rows)):
            left_out += rows
            continue
        frame = speed.merge(frame, rows)
        speed.write(frame, path)
        print(*map(describe, rows), sep="\n", flush=True)
    frame = speed.merge(frame, left_out)
    speed.write(frame, path)
    figures.roofline(frame, path.with_suffix(".png"))
    print(path.with_suffix(".md").read_text(encoding="utf-8"))


def describe(row: dict) -> str:
    """Return the line of the log for a row."""
    name = ", ".join(filter(None, [row.get("model"), row.get("layer"), row["part"] if not row.get("layer") else ""]))
    name += f", batch {row['batch']}, {row['threads']} threads, {row['kernel']}"
    if note := row.get("note"):
        return f"{name}: {note}"
    error = f", error {row['error']:.2g}" if "error" in row else ""
    if row["part"] == "peak":
        return f"{name}: {row.get('gops') or row['gbs']:.4g}"
    return f"{name}: {row['ms']:.4g} ms, {row['speedup']:.2f} times fp32, others busy {row['others']}{error}"


if __name__ == "__main__":
    main()
