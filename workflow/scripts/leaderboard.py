"""Check submissions to the leaderboard, or make the table of those that were scored."""

from pathlib import Path

import numpy as np

from quest.runtime import command_line
from quest.runtime.files import atomic, dumps, one_line, read_arrays, read_json, write_text


def main() -> None:
    parser = command_line.parser(__doc__)
    parser.add_argument("entries", type=Path, nargs="*", help="folders of submissions, results/leaderboard/NAME")
    parser.add_argument("-o", "--output", type=Path, help="folder to write the table into")
    parser.add_argument("--scored", type=Path, help="folder with their scores; without it they are only checked")
    parser.add_argument("--checked", type=Path, help="write why the one entry is refused; it is also loaded")
    parser.add_argument("--hash", type=Path, help="print the hash of a folder or .npz file of images, for entry.yaml")
    parser.add_argument("--images", type=Path, help="folder to write images of the one entry, and their features, into")
    parser.add_argument("--draw", type=Path, help="draw the fresh images, and write the index of the first")
    try:
        run(parser.parse_args())
    except (ValueError, OSError, FloatingPointError) as error:  # people call this, too; one line is enough
        raise SystemExit(f"leaderboard: {error}") from None


def run(arguments) -> None:
    from quest.report import leaderboard

    if arguments.draw:
        write_text(arguments.draw, f"{leaderboard.draw()}\n")
    elif arguments.hash:
        print(leaderboard.images_hash(leaderboard.judged_images(arguments.hash)))
    elif arguments.images:
        (folder,) = arguments.entries
        extract(folder, arguments.images)
    elif arguments.checked:
        (folder,) = arguments.entries
        write_text(arguments.checked, dumps({"refused": refusal(folder)}))
    elif arguments.scored:
        table(arguments.entries, arguments.scored, arguments.output)
    else:
        for entry in map(leaderboard.check, arguments.entries):
            print(f"{entry.folder}: {entry.name}, {entry.bits.upper()}: keeps the rules ({entry.origin})")


def refusal(folder: Path) -> str | None:
    """Why an entry is refused before it is sampled; None if it is not. A checkpoint is loaded, as sampling does."""
    from quest.report import leaderboard

    try:
        if leaderboard.check(folder).origin == leaderboard.ONLY_IMAGES:
            return None
        import quest
        from quest.diffusion.models import MODELS

        quest.load(MODELS[leaderboard.MODEL].load(), leaderboard.checkpoint_of(folder))
    except (ValueError, OSError, FloatingPointError) as error:
        return one_line(error)
    return None


def extract(folder: Path, output: Path) -> None:
    """Write images that were sent, and their features, as sampling writes those that it makes."""
    from quest.diffusion.models import MODELS
    from quest.metrics.features import class_logits, loaded, of_networks
    from quest.report import leaderboard

    model, images = MODELS[leaderboard.MODEL], leaderboard.judged_images(leaderboard.images_place(folder))
    index = leaderboard.FIRST + np.arange(len(images))
    features = of_networks(images, *loaded(model.extractor, model.clip), batch=model.batch_size)
    features["class_logits"] = class_logits(images, model.classifier, batch=model.batch_size)
    features["labels"] = np.array(model.conditions("evaluation", index.tolist())["class_labels"])
    for name, arrays in (("samples", {"images": images}), ("features", features)):
        with atomic(output / f"{name}-images.npz") as file:
            np.savez(file, index=index, **arrays)


def table(entries: list[Path], scored: Path, output: Path) -> None:
    """Write the table. One entry that is refused, or made by no rule, is a row with the reason."""
    from quest.metrics import PER_IMAGE, Cell
    from quest.report import leaderboard
    from quest.report.rendering import write

    rows, refused = [], {}
    known, sent = {"full precision": _images(scored / leaderboard.FULL, "judged")}, {}  # images, by who made them
    for folder in entries:
        try:
            entry = leaderboard.check(folder)
        except (ValueError, OSError, FloatingPointError) as error:
            refused[folder.name] = one_line(error)
            continue
        own, values = scored / folder.name, []
        if why := read_json(own / "checked.json")["refused"]:
            refused[folder.name] = why
            continue
        if entry.origin == leaderboard.ONLY_IMAGES:
            sent[folder.name] = _images(own, "images")
            rows.append((entry, read_json(own / "metrics.json")))
            continue
        for part in ("judged", "fresh"):
            cells = [
                Cell.load([place / f"features-{part}.npz"], [place / f"samples-{part}.npz"])
                for place in (own, scored / leaderboard.FULL)
            ]
            values.append(PER_IMAGE["log_latent_mse"](*cells))
        if leaderboard.knows_the_images(*values):
            means = " and ".join(f"{one.mean():.3f}" for one in values)
            refused[folder.name] = (
                f"nearer to full precision on the judged images than on fresh ones (log10 latent MSE {means}); it was "
                "calibrated on images of evaluation"
            )
        else:
            rows.append((entry, read_json(own / "metrics.json")))
            known[folder.name] = _images(own, "judged")
    refused |= leaderboard.copies(sent, known)
    rows = [(entry, measured) for entry, measured in rows if entry.folder.name not in refused]
    first = int((scored / "draw.txt").read_text(encoding="utf-8"))
    for kind in ("csv", "md"):
        write(output / f"leaderboard.{kind}", leaderboard.table(rows, refused, first))


def _images(scored, part):
    return read_arrays(scored / f"samples-{part}.npz", ["images"])["images"]


if __name__ == "__main__":
    main()
