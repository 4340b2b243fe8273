"""Check a submission to the leaderboard, or make the table of those that were scored. Imports no torch."""

from pathlib import Path

from quest.runtime import command_line


def main() -> None:
    parser = command_line.parser(__doc__)
    parser.add_argument("entries", type=Path, nargs="*", help="folders of submissions, results/leaderboard/NAME")
    parser.add_argument("-o", "--output", type=Path, help="folder to write the table into")
    parser.add_argument("--scored", type=Path, help="folder with their scores; without it they are only checked")
    try:
        run(parser.parse_args())
    except (ValueError, OSError, FloatingPointError) as error:  # people call this, too; one line is enough
        raise SystemExit(f"leaderboard: {error}") from None


def run(arguments) -> None:
    from quest.metrics import PER_IMAGE, Cell
    from quest.report import leaderboard
    from quest.report.rendering import write

    entries = [leaderboard.check(folder) for folder in arguments.entries]
    for entry in entries:
        print(f"{entry.folder}: {entry.name}, {entry.bits.upper()}: keeps the rules")
    if not arguments.scored:
        return
    rows = []
    for entry in entries:
        folder, values = arguments.scored / entry.folder.name, []
        for part, full in (("judged", arguments.scored / "full"), ("fresh", folder / "full")):
            cells = [
                Cell.load([place / f"features-{part}.npz"], [place / f"samples-{part}.npz"]) for place in (folder, full)
            ]
            values.append(PER_IMAGE["log_latent_mse"](*cells))
        if leaderboard.knows_the_images(*values):
            means = " and ".join(f"{one.mean():.3f}" for one in values)
            raise ValueError(
                f"{entry.folder}: nearer to full precision on the judged images than on fresh ones (log10 latent MSE "
                f"{means}); it was calibrated on images of evaluation"
            )
        rows.append((entry, leaderboard.scores(folder)))
    for kind in ("csv", "md"):
        write(arguments.output / f"leaderboard.{kind}", leaderboard.table(rows))


if __name__ == "__main__":
    main()
