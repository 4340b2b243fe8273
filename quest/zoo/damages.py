"""How does each metric order known damages? Tables for docs/protocols.md, from held-out pictures.

Noise is independent for each pixel and channel; grain is grey and the same in blocks of 2x2 pixels; their levels are
standard deviations of 0 to 255. Levels of blur are standard deviations in pixels, of pictures of 64 pixels per side.
JPEG is no damage here, because CIFAR-10's data file holds JPEG images already.
"""

from pathlib import Path

import numpy as np
import torch
from scipy.ndimage import gaussian_filter

from quest.metrics import classifier
from quest.metrics.features import extract
from quest.metrics.frechet import Statistics, frechet_distance, load_reference
from quest.metrics.inception_score import inception_score
from quest.metrics.kernel_distance import mean_of_pairs, resampled_kernel_distances
from quest.metrics.lite0 import REFERENCE
from quest.metrics.manifold import inside
from quest.metrics.per_image import psnr, squared_distances
from quest.runtime import command_line
from quest.zoo import pictures

LEVELS = {"noise": (4, 8, 16, 32), "grain": (4, 8, 16, 32), "blur": (0.4, 0.7, 1.0, 1.5)}
BETTER_HIGH = {"precision", "IS (Lite0)", "PSNR [dB]", "class agreement"}
SUBSETS = 12


def damaged(images, kind, level, seed=0):
    """Damage uint8 pictures [N, S, S, 3] at one of LEVELS. Raises ValueError for an unknown kind."""
    n, side = images.shape[:2]
    rng = np.random.default_rng(seed)
    if kind == "blur":
        sigma = level * side / 64
        out = gaussian_filter(images.astype(np.float32), (0, sigma, sigma, 0), mode="nearest")
    elif kind == "noise":
        out = images + level * rng.standard_normal(images.shape, np.float32)
    elif kind == "grain":
        coarse = rng.standard_normal((n, side // 2, side // 2, 1), np.float32)
        out = images + level * coarse.repeat(2, 1).repeat(2, 2)
    else:
        raise ValueError(f"damage: {kind!r} is not one of {', '.join(LEVELS)}")
    return out.round().clip(0, 255).astype(np.uint8)


class Judge:
    """Computes every metric of damaged pictures on fixed subsets of `n` of them.

    shown: Pictures of a kind. folder: that of the classifier of photographs; without it, there is no class agreement.
    """

    def __init__(self, kind, shown, n=500, folder=None, seed=0):
        self.extractor, rows = f"lite0-{kind}", shown.rows("evaluation")
        self.images = shown.images[rows]
        self.labels = None if folder is None else shown.labels[rows]
        self.net = None if folder is None else classifier.load(folder)
        self.reference = load_reference(REFERENCE / f"{kind}.npz")
        self.pairs = mean_of_pairs(self.reference.features)
        rng = np.random.default_rng(seed)
        self.subsets = [np.sort(rng.permutation(len(rows))[:n]) for _ in range(SUBSETS)]
        self.clean = extract(self.images, self.extractor)

    def values(self, images):
        """Metric -> values on the subsets [SUBSETS]; paired metrics compare with the undamaged pictures."""
        found = self.clean if images is self.images else extract(images, self.extractor)
        per_image = {"precision": inside(found["pool"], self.reference.features)}
        if images is not self.images:
            per_image["PSNR [dB]"] = psnr(images, self.images)
            per_image["Lite0 distance"] = squared_distances(found["maps"], self.clean["maps"])
        if self.net is not None:
            per_image["class agreement"] = classifier.classes_of(self.net, images) == self.labels
        values = {"KID-64w": [], "FD-64w": [], "IS (Lite0)": []} | {name: [] for name in per_image}
        for rows in self.subsets:
            pool, once = found["pool"][rows], np.ones((1, len(rows)))
            kid = resampled_kernel_distances(pool, self.reference.features, once, self.pairs)[0]
            values["KID-64w"].append(kid)
            values["FD-64w"].append(frechet_distance(Statistics.from_features(pool), self.reference.pool))
            values["IS (Lite0)"].append(inception_score(found["logits"][rows]))
            for name, x in per_image.items():
                values[name].append(x[rows].mean())
        return {name: np.array(x) for name, x in values.items()}


def steps(values):
    """Each step to a stronger damage in standard deviations: `values` are [SUBSETS] for each level, mildest first.

    Subsets of half of the pictures overlap, so the standard deviation over them is multiplied by sqrt(2).
    """
    differences = [b - a for a, b in zip(values, values[1:], strict=False)]
    return [float(d.mean() / max(np.sqrt(2) * d.std(ddof=1), 1e-12)) for d in differences]


def table(judge):
    """Markdown: for every metric and damage, the mean at each level, and in brackets the step that led there."""
    clean = judge.values(judge.images)
    lines = [
        "| metric | damage | none | " + " | ".join(f"level {i}" for i in range(1, 5)) + " |",
        "|---|---|" + "---:|" * 5,
    ]
    rows = {}
    for kind, levels in LEVELS.items():
        measured = [judge.values(damaged(judge.images, kind, level)) for level in levels]
        for name in measured[0]:
            sign = -1 if name in BETTER_HIGH else 1
            there = ([clean[name]] if name in clean else []) + [values[name] for values in measured]
            sizes = [sign * size for size in steps(there)]
            cells = [f"{values.mean():.3g}" for values in there]
            for i, size in enumerate(sizes, 1):
                cells[i] += f" ({size:+.1f})"
            cells = cells if name in clean else ["", *cells]
            rows.setdefault(name, []).append(f"| {name} | {kind} | {' | '.join(cells)} |")
    return "\n".join(lines + [row for of_metric in rows.values() for row in of_metric])


def main():
    parser = command_line.parser(__doc__, "threads")
    parser.add_argument("kind", choices=pictures.LOADERS)
    parser.add_argument("--data", type=Path, required=True, help="data file (.npz), or folder of CIFAR-10")
    parser.add_argument("--classifier", type=Path, help="folder of the classifier of photographs")
    parser.add_argument("-n", type=int, default=500, help="pictures in a subset (default %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(
        table(Judge(arguments.kind, pictures.load(arguments.kind, arguments.data), arguments.n, arguments.classifier))
    )


if __name__ == "__main__":
    main()
