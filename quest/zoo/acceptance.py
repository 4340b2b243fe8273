"""Measure whether a trained model is good enough to ship: one command, numbers and a grid of the first 64 samples.

Of a model of scenes `quest.zoo.judge` says what is measured. Of one of photographs or emoji it is

- the distances (FD-64w, KID-64w) of samples to held-out pictures, and those of the autoencoder's reconstructions;
- whether samples show what was asked: the class that a classifier sees (photos-class), or whether an image-text model
  ranks the caption first among 100 (emoji-text; trained captions, held-out styles and held-out concepts apart);
- whether samples are copies of training pictures (see `quest.zoo.neighbours`);

The samples of the grid are not chosen. Of emoji-text they have trained captions.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from quest.diffusion import models
from quest.diffusion.loading import load_pipeline
from quest.diffusion.sampling import generate
from quest.metrics import classifier
from quest.metrics.features import extract
from quest.metrics.frechet import Statistics, frechet_distance, load_reference
from quest.metrics.kernel_distance import kernel_distance
from quest.metrics.lite0 import REFERENCE, computed
from quest.runtime import command_line
from quest.zoo import neighbours, pictures
from quest.zoo.architectures import MODELS
from quest.zoo.judge import judge as judge_scenes
from quest.zoo.judge import write
from quest.zoo.train_autoencoder import RECIPES
from quest.zoo.train_extractor import reconstruct

MOST = 1.6  # times the distance of the autoencoder's reconstructions may samples be away from held-out pictures
LEAST = 0.7  # share of samples whose class the classifier has to see


def conditions(shown, conditioning, n):
    """What to ask for: (labels or captions [n], group of each, str [n]); (None, groups) for an unconditional model.

    Half of the captions are trained ones, a quarter each are of held-out styles and of held-out concepts.
    """
    if conditioning == "none":
        return None, np.full(n, "all")
    if conditioning == "class":
        labels = np.arange(n) % len(shown.classes)
        return labels.tolist(), np.array(shown.classes)[labels]
    rng, rows, groups, quarter = np.random.default_rng(0), [], [], n // 4
    for held_out, count in (("", n - 2 * quarter), ("style", quarter), ("concept", quarter)):
        there = np.flatnonzero((shown.held_out == held_out) & (shown.split != "reference"))
        rows += np.resize(rng.permutation(there), count).tolist()
        groups += [f"held-out {held_out}" if held_out else "trained"] * count
    return [shown.captions[row] for row in rows], np.array(groups)


def protocol(name, asked, guidance):
    """The protocol of the suite's model, for other labels or captions. `asked`: that of each image, or None."""
    # The last batch is filled up with further images.
    source = None if asked is None else lambda split, start, stop: [asked[i % len(asked)] for i in range(start, stop)]
    return replace(models.get(name), guidance=1.0 if asked is None else guidance, source=source)


def distances(features, reference):
    """FD-64w and KID-64w of whitened features [N, 64] to a reference."""
    return {
        "FD-64w": frechet_distance(Statistics.from_features(features), reference.pool),
        "KID-64w": kernel_distance(features, reference.features),
    }


def shows(images, asked, judge):
    """Whether each image [n, S, S, 3] shows the label or caption that was asked for, bool [n].

    judge: folder of the classifier, or of the image-text model.
    """
    if isinstance(asked[0], str):
        from quest.metrics.clip import load
        from quest.metrics.features import clip_features
        from quest.metrics.per_image import caption_first

        model, preprocess, tokenizer = load(judge)
        found = clip_features(images, asked, model, preprocess, tokenizer)
        return caption_first(found["clip_image"], found["clip_text"])
    return classifier.classes_of(classifier.load(judge), images) == np.array(asked)


def measure(name, folder, data, n=500, guidance=3.0, judge=None):
    """Returns (numbers, samples uint8 [n, S, S, 3]). Raises ValueError for a model of scenes, or fewer than 65 samples.

    n: samples, and held-out pictures that are reconstructed (all, if there are fewer). judge: see `shows`; without it,
    nothing says whether samples show what was asked.
    """
    kind = MODELS[name].pictures
    if kind not in pictures.LOADERS:
        raise ValueError(f"{name}: a model of {kind}; this measures models of {', '.join(pictures.LOADERS)}")
    if n < 65:
        raise ValueError(f"n: {n}; at least 65, for distances on 64 components")
    shown, extractor = pictures.load(kind, data), f"lite0-{kind}"
    reference = load_reference(REFERENCE / f"{kind}.npz")
    reference.check(extractor)
    asked, groups = conditions(shown, MODELS[name].conditioning, n)
    model, pipe = protocol(name, asked, guidance), load_pipeline(Path(folder))
    images = np.concatenate([batch[2] for batch in generate(pipe, model, "evaluation", n)])
    rows = np.random.default_rng(0).permutation(shown.rows("evaluation"))[:n]
    unseen = shown.images[rows]
    sets = {"samples": images, "reconstructions": reconstruct(pipe.vae, unseen), "held out": unseen}
    of = {what: distances(extract(x, extractor)["pool"], reference) for what, x in sets.items()}
    ratio = of["samples"]["FD-64w"] / of["reconstructions"]["FD-64w"]
    numbers = {"model": name, "protocol": model.protocol, "n": n, "held-out pictures": len(rows), "distances": of}
    numbers |= {"FD-64w, samples / reconstructions": ratio, "good enough": {"distance": ratio <= MOST}}
    if judge is not None and asked is not None:
        right = shows(images, asked, judge)
        shares = {group: float(right[groups == group].mean()) for group in dict.fromkeys(groups.tolist())}
        numbers["shows what was asked"] = {"all": float(right.mean())} | shares
        if MODELS[name].conditioning == "class":
            labels = shown.labels[rows].tolist()
            for what in ("reconstructions", "held out"):
                numbers[f"shows what was asked, {what}"] = float(shows(sets[what], labels, judge).mean())
            numbers["good enough"]["class"] = bool(right.mean() >= LEAST)
    (features,) = computed(images, "features")
    numbers["nearest training pictures"] = neighbours.compare(images, features, shown, RECIPES[kind].flips)
    return numbers, images


def main():
    parser = command_line.parser(__doc__, "file", "threads")
    parser.add_argument("folder", type=Path, help="pipeline folder")
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--data", type=Path, nargs="?", help="data file (.npz), or folder of CIFAR-10; not of scenes")
    parser.add_argument("-n", type=int, help="samples (default 500, of scenes 1000)")
    parser.add_argument("--guidance", type=float, default=3.0, help="of photographs and emoji (default %(default)s)")
    judge = "folder of the classifier, of the image-text model of emoji, or of the extractor of scenes, which ships"
    parser.add_argument("--judge", type=Path, nargs="?", help=judge)
    parser.add_argument("--reference", type=Path, nargs="?", help="statistics of scenes (default: those that ship)")
    parser.add_argument("--grid", type=Path, required=True, help="picture (.png) of the first 64 samples to write")
    arguments = parser.parse_args()
    name, judge = arguments.model, arguments.judge
    torch.set_num_threads(arguments.threads)
    if MODELS[name].pictures == "scenes":
        extractor = judge or models.ZOO / "scenes-extractor"
        reference = arguments.reference or models.MODELS[name].reference
        numbers, images = judge_scenes(name, arguments.folder, extractor, reference, arguments.n or 1000)
    elif arguments.data is None:
        parser.error(f"--data: {name} needs a data file of {MODELS[name].pictures}")
    else:
        settings = (arguments.n or 500, arguments.guidance, judge)
        numbers, images = measure(name, arguments.folder, arguments.data, *settings)
    write(numbers, images, arguments.output, arguments.grid)


if __name__ == "__main__":
    main()
