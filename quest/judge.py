"""Compare two image generators: `python -m quest judge A B` gives one verdict with an interval, and a page.

A is the new generator, for instance a quantized model; B is the one it is compared with. Each is a folder of images, an
.npz file with `arr_0` (uint8 [N, H, W, 3]) or a folder of a diffusers pipeline.

The distance is the kernel distance (KID, arXiv:1801.01401) on the 1,280 pooled features of EfficientNet-Lite0:

- without reference images, of A to B: a generator that differs from B counts as worse;
- with reference images R, that of A to R minus that of B to R.

Three numbers belong to it. The *interval* covers the choice of the images (bootstrap over images, with both images of a
pair drawn together). The *floor* is what chance alone reaches: the 95th percentile of the distance after the images of
A and B were exchanged at random. The *margin* is the smallest difference that matters: the distance of B to itself
after a Gaussian blur of 1/64 of the side, which is just visible.

    same or better   the whole interval is below the margin
    worse            the whole interval is above 0, and the distance is above the floor
    cannot tell      neither: more images are needed; the report says how many

Images are pairs if both sides have equally many of them (in folders: with the same names), as from equal seeds.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from quest.metrics import lite0
from quest.metrics.intervals import half_width, resample_counts, student
from quest.metrics.kernel_distance import kernel
from quest.metrics.per_image import psnr, squared_distances
from quest.metrics.reference import read_images
from quest.runtime.files import read_lines, write_text

EXIT = {"same or better": 0, "worse": 1, "cannot tell": 2}  # codes of the process
FEWEST, MOST = 20, 5000  # images of one side
BLUR = 1 / 64  # of the side: the standard deviation of the blur that sets the margin
SHOWN = 8  # pairs on the page


@dataclass
class Verdict:
    """What two sets of images show. All distances are kernel distances on Lite0's features."""

    verdict: str  # a key of EXIT
    estimate: float
    low: float
    high: float
    floor: float
    margin: float
    n: tuple[int, int]  # images of A and of B
    paired: bool
    reference: int = 0  # reference images; 0 without them
    needed: int | None = None  # images that would decide, if the estimate stays as it is; None if it is decided
    rows: dict[str, str] = field(default_factory=dict)  # further measures, and why some could not be taken
    worst: np.ndarray | None = None  # indices of images of A, the worst first

    def text(self) -> str:
        """The verdict and its numbers in a few lines."""
        what = "KID of A to the reference minus that of B" if self.reference else "KID of A to B"
        pairs = ", in pairs" if self.paired else ""
        lines = [
            f"A is {self.verdict}" if self.verdict != "cannot tell" else "These images cannot tell A from B",
            f"{what} x 1000 (Lite0): {1e3 * self.estimate:.3g}, 95 % interval {1e3 * self.low:.3g} to "
            f"{1e3 * self.high:.3g}",
            f"chance alone reaches {1e3 * self.floor:.3g}; a just visible blur of B is {1e3 * self.margin:.3g}",
            f"images: {self.n[0]} of A, {self.n[1]} of B{pairs}"
            + f"; {self.reference} of reference" * bool(self.reference),
            f"differences below {1e3 * max(self.high - self.estimate, 0):.2g} cannot be seen with so many images",
        ]
        if self.needed:
            lines.append(f"about {self.needed:,} images of each would decide, if the distance stays as it is")
        return "\n".join([*lines, *(f"{name}: {value}" for name, value in self.rows.items())]) + "\n"


class Pooled:
    """Kernel means over images of A and B together; weights [R, N + M] say how often each image counts.

    Pairs of an image with itself never count, and neither do, if A and B are paired, those of an image with its
    partner: both start from the same noise and would make A and B look closer than they are.
    """

    def __init__(self, a: np.ndarray, b: np.ndarray, paired: bool, reference: np.ndarray | None = None):
        x = np.concatenate([a, b]).astype(np.float64)
        self.counted = 1 - np.eye(len(x))
        if paired:
            self.counted -= np.eye(len(x), k=len(a)) + np.eye(len(x), k=-len(a))
        self.kernel = kernel(x, x) * self.counted
        # Reference images in blocks, because all kernels with 50,000 of them would take gigabytes.
        blocks = [] if reference is None else np.array_split(reference.astype(np.float64), 1 + len(reference) // 1000)
        self.to_reference = sum(kernel(x, block).sum(1) for block in blocks) / len(reference) if blocks else None

    def mean(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Weighted mean kernel [R] between two weightings."""
        return np.einsum("rn,rn->r", a @ self.kernel, b) / np.einsum("rn,rn->r", a @ self.counted, b)

    def distance(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """KID [R] of a to b; with a reference, that of a to the reference minus that of b."""
        if self.to_reference is None:
            return self.mean(a, a) + self.mean(b, b) - 2 * self.mean(a, b)
        cross = [w @ self.to_reference / w.sum(1) for w in (a, b)]
        return self.mean(a, a) - 2 * cross[0] - self.mean(b, b) + 2 * cross[1]


def weights(n: int, m: int, paired: bool) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Weights of A and B, [R, n + m] each: "all" images, "resampled" ones, and "exchanged" at random."""
    both = np.eye(2).repeat([n, m], axis=1)  # row 0 counts A, row 1 counts B
    first = resample_counts(n)
    second = first if paired else resample_counts(m, seed=1)
    rng, exchanged = np.random.default_rng(2), []
    for _ in range(len(first)):
        swap = rng.random(n) < 0.5
        mixed = np.concatenate([swap, ~swap]) if paired else rng.permutation(n + m) < n
        exchanged.append(mixed.astype(np.float64))
    mixed = np.array(exchanged)
    resampled = np.pad(first, ((0, 0), (0, m))), np.pad(second, ((0, 0), (n, 0)))
    return {"all": (both[:1], both[1:]), "resampled": resampled, "exchanged": (mixed, 1 - mixed)}


def decide(a: np.ndarray, b: np.ndarray, margin: float, paired: bool, reference: np.ndarray | None = None) -> Verdict:
    """The verdict on features of A [N, D] and B [M, D]. reference: features [K, D] of real images.

    Raises ValueError for paired features of different lengths.
    """
    if paired and len(a) != len(b):
        raise ValueError(f"{len(a)} images of A and {len(b)} of B cannot be pairs")
    pooled = Pooled(a, b, paired, reference)
    values = {name: pooled.distance(*pair) for name, pair in weights(len(a), len(b), paired).items()}
    estimate, half = float(values["all"][0]), float(half_width(values["resampled"]))
    low, high, floor = estimate - half, estimate + half, float(np.quantile(values["exchanged"], 0.95))
    if high < margin:
        verdict = "same or better"
    else:
        verdict = "worse" if low > 0 and estimate > floor else "cannot tell"
    needed = None
    if verdict == "cannot tell":
        # The interval narrows as 1 / sqrt(n). It decides once it excludes 0, or lies below the margin.
        gap = max(estimate, margin - estimate)
        needed = math.ceil(max(len(a), len(b)) * max((half / gap) ** 2, 1.0) * 1.1)
    count = 0 if reference is None else len(reference)
    return Verdict(verdict, estimate, low, high, floor, margin, (len(a), len(b)), paired, count, needed)


def judge(
    a: str | Path,
    b: str | Path,
    reference: str | Path | None = None,
    prompts: str | Path | None = None,
    page: str | Path | None = None,
    images: int = 200,
) -> Verdict:
    """Compare A with B, see the module. page: an HTML file to write; images: how many a pipeline makes.

    Raises FileNotFoundError and ValueError that name the file or folder for input that cannot be used.
    """
    captions = read_lines(prompts) if prompts else None
    if captions is not None and len(captions) < FEWEST:  # before anything is sampled
        raise ValueError(f"{prompts}: {len(captions)} prompts; at least {FEWEST} are needed")
    (first, names), (second, other_names) = (load(source, captions, images) for source in (a, b))
    paired = len(first) == len(second) and names == other_names
    real = load(reference, None, images)[0] if reference else None
    for source, x in ((a, first), (b, second), (reference, real)):
        if x is not None and len(x) < FEWEST:
            raise ValueError(f"{source}: {len(x)} images; at least {FEWEST} are needed")
    if captions is not None and len(captions) < len(first):
        raise ValueError(f"{prompts}: {len(captions)} prompts for {len(first)} images of {a}")
    (a_features, a_maps), (b_features, b_maps) = (lite0.computed(x, "features", "maps") for x in (first, second))
    (blurry,) = lite0.computed(blurred(second), "features")
    margin = float(Pooled(blurry, b_features, True).distance(*weights(len(second), len(second), True)["all"])[0])
    real_features = None if real is None else lite0.computed(real, "features")[0]
    verdict = decide(a_features, b_features, margin, paired, real_features)
    if paired and first.shape == second.shape:
        apart = squared_distances(a_maps, b_maps)
        for name, values in (("PSNR of pairs [dB]", psnr(first, second)), ("Lite0 distance of pairs", apart)):
            mean, low, high = student(values)
            verdict.rows[name] = f"{mean:.4g} ({low:.4g} to {high:.4g})"
    else:
        # From each image of A to the nearest one of B.
        apart = np.sqrt([((b_features - row) ** 2).sum(1).min() for row in a_features.astype(np.float64)])
    verdict.worst = np.argsort(-apart)[:SHOWN]
    verdict.rows |= _by_other_networks(first, second, captions)
    if page:
        write_text(page, html(verdict, first, second, (str(a), str(b))))
    return verdict


def load(source: str | Path, prompts: Sequence[str] | None, images: int) -> tuple[np.ndarray, list[str] | None]:
    """Images uint8 [N, S, S, 3] of a source, at most MOST, and their names; no names for an array or a pipeline.

    Images of a folder are cropped at the centre to the smaller side of the first one.
    """
    source = Path(source)
    if not source.exists():
        raise FileNotFoundError(f"{source}: no such file or folder")
    if (source / "model_index.json").is_file():
        return generated(source, prompts, images), None
    images, names = read_images(source, MOST)
    return images, names and [Path(name).stem for name in names]


def generated(folder: Path, prompts: Sequence[str] | None, images: int) -> np.ndarray:
    """Images of a diffusers pipeline, of the seeds 0, 1, ... with its own sampler, number of steps and guidance scale.

    Raises ValueError for a pipeline with text without prompts, or without text with them.
    """
    from quest.diffusion.declared import of_pipeline
    from quest.diffusion.loading import load_pipeline
    from quest.diffusion.sampling import generate

    pipe = load_pipeline(folder)
    model = of_pipeline(pipe, prompts)
    if (model.conditioning == "text") != (prompts is not None):
        needs = "no prompts" if prompts else "a file of --prompts"
        raise ValueError(f"{folder}: a {type(pipe).__name__} needs {needs}")
    count = images if prompts is None else len(prompts)
    return np.concatenate([made for *_, made in generate(pipe, model, "evaluation", count)])


def blurred(images: np.ndarray) -> np.ndarray:
    """The images after a Gaussian blur of BLUR of their side."""
    from PIL import Image, ImageFilter

    blur = ImageFilter.GaussianBlur(BLUR * min(images.shape[1:3]))
    return np.stack([np.asarray(Image.fromarray(image).filter(blur)) for image in images])


def _by_other_networks(a, b, captions):
    """Rows of Inception and CLIP where their weights lie on this machine; nothing is downloaded."""
    from quest.metrics import weights as network
    from quest.metrics.features import extract
    from quest.metrics.frechet import Statistics, frechet_distance
    from quest.metrics.per_image import clip_scores

    def there(name):
        return (network.folder() / network.WEIGHTS[name].file).is_file()

    if not there("inception"):
        rows = {"FID of A to B (clean-fid)": "not measured: Inception's weights are not on this machine"}
    else:
        pool = [Statistics.from_features(extract(x, "clean")["pool"]) for x in (a, b)]
        rows = {"FID of A to B (clean-fid)": f"{frechet_distance(*pool):.4g}"}
    if captions is None:
        return rows
    if not there("ViT-B-16"):
        return rows | {"CLIP score, A minus B": "not measured: CLIP's weights are not on this machine"}
    scores = []
    for x in (a, b):
        found = extract(x, "clean", "ViT-B-16", list(captions[: len(x)]))
        scores.append(clip_scores(found["clip_image"], found["clip_text"]))
    n = min(map(len, scores))
    mean, low, high = student(scores[0][:n] - scores[1][:n])
    return rows | {"CLIP score, A minus B": f"{mean:.3g} ({low:.3g} to {high:.3g})"}


def html(verdict: Verdict, a: np.ndarray, b: np.ndarray, names: tuple[str, str]) -> str:
    """A page with the verdict and the worst images: pairs, or images of A that are far from all of B."""
    from markupsafe import escape

    from quest.report.page_images import strip

    def image(x, label):
        shown = strip(x[None])
        size = f'width="{shown["width"]}" height="{shown["height"]}"'
        return f'<img src="{shown["uri"]}" alt="{escape(label)}" {size}>'

    cells = []
    for i in map(int, verdict.worst):
        pair = image(a[i], f"image {i} of A") + (image(b[i], f"image {i} of B") if verdict.paired else "")
        cells.append(f"<figure>{pair}<figcaption>image {i}</figcaption></figure>")
    head, *lines = verdict.text().strip().split("\n")
    said = (
        "The pairs that differ most, A on the left" if verdict.paired else "Images of A that are farthest from all of B"
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{escape(head)}</title>
<style>body {{ font: 1rem/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }}
figure {{ display: inline-block; margin: .5rem }} img {{ image-rendering: pixelated; min-width: 8rem; height: auto }}
@media (prefers-color-scheme: dark) {{ body {{ background: #111; color: #eee }} }}</style></head>
<body><h1>{escape(head)}</h1>
<p>A: {escape(names[0])}<br>B: {escape(names[1])}</p>
<ul>{"".join(f"<li>{escape(line)}</li>" for line in lines)}</ul>
<h2>{said}</h2>
{"".join(cells)}
</body></html>
"""
