"""`measure` computes every metric of one cell (model, method, bits); `compare` compares two measured cells.

A cell holds what one denoiser produced on the evaluation seeds: images, latents, features and noise-prediction errors.
`measure` returns one row per metric with its interval, and the values of the metric on R resamples of the images. All
cells resample the same images (see intervals.py), so `compare` needs these values only. For example, with FID 9.0 and
8.0, and resampled values [9.1, 8.8, ...] and [8.1, 7.9, ...], the difference is 1.0, and the standard deviation of
[1.0, 0.9, ...] gives its paired interval. This module needs no torch.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter

import numpy as np

from quest.metrics import intervals
from quest.metrics.cell import Cell
from quest.metrics.comparison import Comparison, has_diverged
from quest.metrics.floors import doubted
from quest.metrics.frechet import Reference, Statistics, fid_infinity, floor, frechet_distance
from quest.metrics.inception_score import inception_score, partition, resampled_inception_scores, splits_note
from quest.metrics.kernel_distance import mean_of_pairs, resampled_kernel_distances
from quest.metrics.manifold import MOST, NEIGHBOURS, inside, recall
from quest.metrics.per_image import CANDIDATES, caption_first, clip_scores, latent_mse, psnr, squared_distances
from quest.runtime.files import one_line

SHIPPED_CLIPS = ("scenes-clip", "emoji-clip")  # image-text models in resources/zoo
LITE0 = ("lite0-photos", "lite0-emoji")  # extractors whose distances have names of their own, never FID
SMALLEST_MSE = 1e-10  # stands for the latent MSE of identical latents, whose logarithm is not finite
# How each protocol of Inception resizes an image to 299x299; the column `protocol` shows this text.
RESIZE = {"adm": "TensorFlow bilinear", "torch-fidelity": "TensorFlow bilinear", "clean": "Pillow bicubic"}
OF_TRAJECTORIES = ("eps_error", "guided_eps_error")  # metrics of held-out trajectories, not of images
INCEPTION_RESAMPLES = 100  # each resample takes seconds for the eigenvalues of a 2048x2048 matrix


@dataclass(frozen=True, eq=False)
class Estimate:
    """The value of a metric, its values on the resamples [R], and the number n of independent draws that it uses."""

    value: float
    resampled: np.ndarray
    n: int
    protocol: str = ""  # choices of the metric itself; rows show them after the model's protocol
    note: str = ""


@dataclass(frozen=True)
class Metric:
    """One row of METRICS: the label in tables, the better direction, and the function that estimates the metric."""

    label: str
    better: str  # "lower" or "higher"
    # (cell, full-precision cell, reference, counts [R, N], extractor) -> Estimate, or None if the cell lacks an input
    estimate: Callable[[Cell, Cell | None, Reference | None, np.ndarray, str], Estimate | None]
    is_mean: bool = False  # the metric is a mean over n draws, so its interval uses Student's factor
    paired: bool = False  # it compares with full precision, so full precision itself has no such row
    network: str | None = None  # the network that its label names: "extractor", "clip" or None
    real: bool = False  # it compares with real images; the row names their file
    lite0: bool | None = None  # it is for the extractors LITE0 only (True), or for all others (False)


def _kid(cell, fp, reference, counts, extractor):
    real = reference.features
    if real is None:
        return None
    features, pairs = cell.features["pool"], mean_of_pairs(real)
    once = np.ones((1, len(features)))
    value, *resampled = resampled_kernel_distances(features, real, np.concatenate([once, counts]), pairs)
    return Estimate(float(value), np.array(resampled), len(features), protocol=f"{len(real)} real images")


def _fid_infinity(cell, fp, reference, counts, extractor):
    if extractor not in RESIZE or len(cell.index) < 10_000:
        return None
    value = fid_infinity(cell.features["pool"], reference.pool)
    # `measure` fills in the resampled values: those of FID, shifted.
    return Estimate(value, np.array([]), len(cell.index), _resized(extractor), "interval: that of FID, moved")


def _manifold(function, cell, fp, reference, counts, extractor):
    samples, real = cell.features["pool"], reference.features
    if real is None or len(real) <= NEIGHBOURS or function is recall and len(samples) // 2 <= NEIGHBOURS:
        return None
    protocol = _joined(_resized(extractor), f"k = {NEIGHBOURS}, {len(real)} real images")
    if function is inside:
        return _mean(inside(samples, real), counts, protocol=protocol)
    value, halves = recall(samples[:MOST], real, len(counts))
    return Estimate(value, halves, min(MOST, len(samples)), protocol)


def _frechet(kind, cell, fp, reference, counts, extractor):
    features, target = cell.features[kind], getattr(reference, kind)
    statistics = Statistics.from_features(features)
    resampled = intervals.resampled_frechet(features, target, counts)
    value = frechet_distance(statistics, target)
    return Estimate(value, resampled, statistics.n, protocol=_resized(extractor), note=_rank_note(statistics))


def _resized(extractor):
    return f"resize {RESIZE[extractor]}" if extractor in RESIZE else ""


def _joined(*parts):
    return "; ".join(filter(None, parts))


def _rank_note(statistics):
    dimensions = statistics.mean.size
    return f"n = {statistics.n} <= {dimensions} dimensions: singular covariance" if statistics.singular else ""


def _inception_score(cell, fp, reference, counts, extractor):
    if extractor == "clean":  # clean-fid defines no Inception score
        return None
    logits = cell.features["logits"]
    splits = partition(len(logits), extractor)
    resampled = resampled_inception_scores(logits, counts, splits)
    shuffled = " of shuffled images" if extractor == "torch-fidelity" else ""
    protocol = _joined(_resized(extractor), f"{len(splits)} split{'s' if len(splits) > 1 else ''}{shuffled}")
    note = splits_note(len(logits), extractor)
    return Estimate(inception_score(logits, splits), resampled, len(logits), protocol=protocol, note=note)


def _clip(cell, fp, reference, counts, extractor):
    if "clip_image" not in cell.features or "clip_text" not in cell.features:
        return None
    return _mean(clip_scores(cell.features["clip_image"], cell.features["clip_text"]), counts)


def _retrieval(cell, fp):
    image, text = cell.features.get("clip_image"), cell.features.get("clip_text")
    if image is None or text is None or len(image) < CANDIDATES:
        return None
    return caption_first(image, text, CANDIDATES).astype(np.float64)


def _agreement(cell, fp):
    logits, labels = cell.features.get("class_logits"), cell.features.get("labels")
    if logits is None or labels is None:
        return None
    return (logits.argmax(axis=1) == labels).astype(np.float64)


def _mean(values, counts, note="", protocol=""):
    resampled = intervals.resampled_means(values, counts)
    return Estimate(float(np.mean(values)), resampled, len(values), protocol=protocol, note=note)


def _identical_note(cell, fp):
    identical = sum(map(np.array_equal, cell.images, fp.images))  # image by image, which takes no memory
    return f"{identical} of {len(cell.images)} images identical, counted as one level apart" if identical else ""


def _apart(distance, read, cell, fp):
    """The distance of each image to the same one of full precision, of arrays that `read` takes from both cells."""
    ours, theirs = (None if one is None else read(one) for one in (cell, fp))
    return None if ours is None or theirs is None else distance(ours, theirs)


_latent_mse = partial(_apart, latent_mse, attrgetter("latents"))


def _log_latent_mse(cell, fp):
    errors = _latent_mse(cell, fp)
    return None if errors is None else np.log10(np.maximum(errors, SMALLEST_MSE))


def _trajectory_errors(kind, cell, fp):
    errors = getattr(cell, kind)  # [trajectories, calls]; of a model without guidance, none of the guided prediction
    return None if errors is None else errors.mean(axis=1, dtype=np.float64)


def _broken_note(values, what):
    broken = sum(not np.isfinite(one).all() for one in values)
    return f"{broken} of {len(values)} {what} not finite" if broken else ""


def _fid_to_fp(cell, fp, reference, counts, extractor):
    features, target = cell.features["pool"], fp.features["pool"]
    statistics = Statistics.from_features(features)
    value = frechet_distance(statistics, Statistics.from_features(target))
    resampled = intervals.resampled_frechet_between(features, target, counts)
    return Estimate(value, resampled, statistics.n, note=_joined(_floor_note(target), _rank_note(statistics)))


def _floor_note(features):
    # The text is the same for all methods, so it stands once below a table.
    found = floor(features)
    return "" if found is None else "two independent sets of full precision are {:.3g} ± {:.1g} apart".format(*found)


# Metric -> function of a cell and of full precision (None where the cell is it) that gives the value of every image, of
# every trajectory for the errors of the noise prediction; None if an input is missing.
PER_IMAGE = {
    "agreement": _agreement,
    "retrieval": _retrieval,
    "psnr": partial(_apart, psnr, attrgetter("images")),
    "latent_mse": _latent_mse,
    "log_latent_mse": _log_latent_mse,
    "lite0_distance": partial(_apart, squared_distances, lambda cell: cell.features.get("maps")),
    "eps_error": partial(_trajectory_errors, "eps_error"),
    "guided_eps_error": partial(_trajectory_errors, "guided_eps_error"),
}
NOTES = {
    "psnr": _identical_note,
    "latent_mse": lambda cell, fp: _broken_note(cell.latents, "latents"),
    "log_latent_mse": lambda cell, fp: _broken_note(cell.latents, "latents"),
    "eps_error": lambda cell, fp: _broken_note(cell.eps_error, "trajectories"),
    "guided_eps_error": lambda cell, fp: _broken_note(cell.guided_eps_error, "trajectories"),
}


def _mean_of(name, cell, fp, reference, counts, extractor):
    values = PER_IMAGE[name](cell, fp)
    if values is None:
        return None
    if name.endswith("eps_error"):
        # The bootstrap resamples whole trajectories, because the calls of one trajectory are not independent.
        counts = intervals.resample_counts(len(values), len(counts))
    return _mean(values, counts, NOTES[name](cell, fp) if name in NOTES else "")


def _per_image(name, label, better, **settings):
    return Metric(label, better, partial(_mean_of, name), is_mean=True, **settings)


METRICS = {
    "kid_64w": Metric("KID-64w", "lower", _kid, network="extractor", real=True, lite0=True),
    "fd_64w": Metric("FD-64w", "lower", partial(_frechet, "pool"), network="extractor", real=True, lite0=True),
    "fid": Metric("FID", "lower", partial(_frechet, "pool"), network="extractor", real=True, lite0=False),
    "sfid": Metric("sFID", "lower", partial(_frechet, "spatial"), network="extractor", real=True, lite0=False),
    "is": Metric("IS", "higher", _inception_score, network="extractor"),
    "precision": Metric(
        "precision", "higher", partial(_manifold, inside), is_mean=True, network="extractor", real=True
    ),
    "recall": Metric("recall", "higher", partial(_manifold, recall), network="extractor", real=True),
    "fid_infinity": Metric("FID at infinity", "lower", _fid_infinity, network="extractor", real=True),
    "clip": Metric("CLIP score", "higher", _clip, is_mean=True, network="clip"),
    "agreement": _per_image("agreement", "class agreement", "higher"),
    "retrieval": _per_image("retrieval", "caption first of 100", "higher", network="clip"),
    "psnr": _per_image("psnr", "PSNR to FP [dB]", "higher", paired=True),
    "latent_mse": _per_image("latent_mse", "latent MSE to FP", "lower", paired=True),
    "log_latent_mse": _per_image("log_latent_mse", "log10 latent MSE to FP", "lower", paired=True),
    "lite0_distance": _per_image("lite0_distance", "Lite0 distance to FP", "lower", paired=True, lite0=True),
    "fd_64w_to_fp": Metric("FD-64w to FP", "lower", _fid_to_fp, paired=True, network="extractor", lite0=True),
    "fid_to_fp": Metric("FID to FP", "lower", _fid_to_fp, paired=True, network="extractor", lite0=False),
    "eps_error": _per_image("eps_error", "noise-prediction error", "lower", paired=True),
    "guided_eps_error": _per_image("guided_eps_error", "guided noise-prediction error", "lower", paired=True),
}


def measure(
    cell: Cell,
    reference: Reference | None,
    fp: Cell | None,
    *,
    extractor: str,
    clip: str | None = None,
    protocol: str = "",
    reference_sha256: str = "",
) -> dict:
    """Compute every metric of a cell.

    fp: the full-precision cell of the same seeds; None if `cell` is that cell. reference: statistics of real images;
    without it, metrics against real images are left out. Every value of a cell that diverged is NaN, with the reason in
    its note.

    The result can be written as JSON. It holds
    - "rows": [{metric, value, low, high, n, extractor, protocol, reference, note}], where `reference` is the beginning
      of the hash of the reference file. A row without an interval says why in its note: the value "diverged", or how
      many draws an interval needs.
    - "eps_error": one row per denoiser call, [{call, timestep, value, low, high, n}].
    - "resampled": {metric: [R values]}.
    - "drawn": images, trajectories and timesteps, which two cells must share to be compared.
    - "sampled": the provenance of each shard. "footprint": size and work of the denoiser.

    Raises ValueError if cell and full precision hold different images, or if the cell has only one image, or latents
    and no eps_error. One without both is of images that were made elsewhere.
    """
    if len(cell.index) < 2:
        raise ValueError(f"{len(cell.index)} image: metrics have an interval, which needs 2 or more")
    if fp is not None and not np.array_equal(cell.index, fp.index):
        ours, theirs = index_ranges(cell.index), index_ranges(fp.index)
        raise ValueError(f"only the same images are compared: the cell has {ours}, full precision {theirs}")
    if fp is not None and cell.eps_error is None and cell.latents is not None:
        raise ValueError("the cell has no eps_error; it belongs into the first feature shard")
    resamples = INCEPTION_RESAMPLES if extractor in RESIZE else intervals.RESAMPLES
    counts = intervals.resample_counts(len(cell.index), resamples)
    rows, resampled, values = [], {}, {}
    for name, metric in METRICS.items():
        lacking = metric.paired and fp is None or metric.real and reference is None
        lacking |= metric.lite0 not in (None, extractor in LITE0)
        estimate = None if lacking else metric.estimate(cell, fp, reference, counts, extractor)
        if estimate is None:
            continue
        if cell.diverged:
            undefined = np.full_like(estimate.resampled, math.nan)
            estimate = replace(estimate, value=math.nan, resampled=undefined, note=cell.diverged)
        draws = estimate.resampled
        if name == "fid_infinity":
            # All resamples are shifted by the same estimated bias; the spread of that estimate is left out.
            draws = np.array(resampled["fid"]) + (estimate.value - values["fid"])
        values[name], resampled[name] = estimate.value, draws.tolist()
        low, high = intervals.interval(estimate.value, draws, estimate.n if metric.is_mean else None)
        rows.append(
            {
                "metric": name,
                "value": estimate.value,
                "low": float(low),
                "high": float(high),
                "n": estimate.n,
                "extractor": {"extractor": extractor, "clip": clip, None: ""}[metric.network],
                "protocol": _joined(protocol, estimate.protocol),
                "reference": reference_sha256[:12] if metric.real else "",
                "note": _note(estimate, low, high),
            }
        )
    return {
        "rows": rows,
        "eps_error": [] if fp is None or cell.eps_error is None else _eps_error_by_call(cell),
        "resampled": resampled,
        "drawn": {
            "images": index_ranges(cell.index),
            "trajectories": 0 if cell.eps_error is None else len(cell.eps_error),
            "timesteps": [] if cell.timesteps is None else cell.timesteps.tolist(),
        },
        "sampled": list(cell.sampled),
        "footprint": cell.footprint,
    }


def compare(a: dict, b: dict) -> dict[str, Comparison]:
    """Compare two cells that `measure` returned: the difference "a minus b" in every metric that both have.

    Neither is better where the one that seems so is compared with full precision (`method` of a cell), or where the two
    are nearer to each other than full precision is to itself (`floors`), see `quest.metrics.floors`.

    Raises ValueError if the two differ in images, networks or protocol, or if their noise-prediction errors were
    measured on different trajectories.
    """
    of_a, of_b = ({row["metric"]: row for row in cell["rows"]} for cell in (a, b))
    diverged = has_diverged(a), has_diverged(b)
    compared = {}
    for name in (name for name in METRICS if name in of_a and name in of_b):
        keys = ("images", "trajectories", "timesteps") if name in OF_TRAJECTORIES else ("images",)
        equal = [(key, a["drawn"][key], b["drawn"][key]) for key in keys]
        shared = ("n", "extractor", "protocol", "reference")
        equal += [(key, of_a[name].get(key), of_b[name].get(key)) for key in shared]
        equal += [("number of resamples", *(len(cell["resampled"][name]) for cell in (a, b)))]
        for key, left, right in equal:
            if left != right:
                values = one_line(f"{left} and {right}")
                raise ValueError(f"{name}: only cells of equal {key} are compared, got {values}")
        metric, n, values = METRICS[name], of_a[name]["n"], (of_a[name]["value"], of_b[name]["value"])
        difference = values[0] - values[1]
        resampled = np.subtract(a["resampled"][name], b["resampled"][name])
        low, high = intervals.interval(difference, resampled, n if metric.is_mean else None)
        found = Comparison(difference, float(low), float(high), n, metric.better, diverged)
        compared[name] = doubted(found, name, values, (a, b))
    return compared


def index_ranges(index: np.ndarray) -> str:
    """Write sorted image indices [N] as ranges: "0-499", "0-3,7"."""
    breaks = np.flatnonzero(np.diff(index) != 1) + 1
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in np.split(index, breaks))


def _note(estimate, low, high):
    if not math.isfinite(estimate.value):
        return _joined("diverged", estimate.note)
    no_interval = "" if math.isfinite(high - low) else f"n = {estimate.n}: no interval, 2 would do"
    return _joined(no_interval, estimate.note)


def _eps_error_by_call(cell):
    trajectories = len(cell.eps_error)
    values = cell.eps_error.mean(axis=0, dtype=np.float64)  # [calls]
    resampled = intervals.resampled_means(cell.eps_error, intervals.resample_counts(trajectories))  # [R, calls]
    low, high = intervals.interval(values, resampled, trajectories)
    columns = zip(cell.timesteps.tolist(), values.tolist(), low.tolist(), high.tolist(), strict=True)
    return [
        {"call": call, "timestep": timestep, "value": value, "low": lower, "high": upper, "n": trajectories}
        for call, (timestep, value, lower, upper) in enumerate(columns)
    ]
