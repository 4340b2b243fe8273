"""Measuring one cell (model, method, bits), and comparing two.

A cell is what one denoiser drew: images, latents and features on the evaluation seeds, and noise-prediction errors.
`measure` turns it into rows with intervals and keeps every metric's resampled values beside them. All cells resample
the same images (see intervals.py), so `compare` needs those numbers only: the spread of their differences is the
paired interval. Needs no torch.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from quest.metrics import intervals
from quest.metrics.comparison import Comparison, has_diverged
from quest.metrics.frechet import Reference, Statistics, fid_infinity, frechet_distance
from quest.metrics.inception_score import inception_score, partition, resampled_inception_scores, splits_note
from quest.metrics.per_image import NEIGHBOURS, clip_scores, inside, latent_mse, psnr
from quest.runtime.files import loads, read_arrays

FEATURES = ("pool", "spatial", "logits", "clip_image", "clip_text")
# How the protocols of Inception bring an image to 299x299, as rows say it.
RESIZE = {"adm": "TensorFlow bilinear", "torch-fidelity": "TensorFlow bilinear", "clean": "Pillow bicubic"}
INCEPTION_RESAMPLES = 100  # each takes the eigenvalues of a 2048x2048 matrix: seconds


@dataclass(frozen=True, eq=False)
class Cell:
    """Outputs of one denoiser, sorted by image index."""

    index: np.ndarray  # [N], image i has the i-th evaluation seed
    features: dict[str, np.ndarray]  # each [N, D]
    images: np.ndarray | None  # uint8 [N, H, W, 3]; a run that keeps features only has none
    latents: np.ndarray | None  # [N, ...]
    eps_error: np.ndarray | None = None  # [trajectories, calls], relative squared error of each noise prediction
    timesteps: np.ndarray | None = None  # [calls], timestep of each denoiser call; a multistep sampler may repeat one
    sampled: tuple[dict, ...] = ()  # provenance of each shard: where and with what it was drawn
    footprint: dict = field(default_factory=dict)  # size and work of the denoiser, see quest.quantization.cost

    @classmethod
    def load(cls, features: Sequence[str | Path], samples: Sequence[str | Path]) -> "Cell":
        """Join the shards of a cell, given in any order.

        Raises ValueError, naming the file, for an array that is missing, an image that occurs twice, or features and
        samples of different images.
        """
        feature_shards = [_read(path, ("index", "pool", "spatial", "logits")) for path in features]
        sample_shards = [_read(path, ("index",)) for path in samples]
        names = [name for name in FEATURES if all(name in shard for shard in feature_shards)]
        joined = _join(features, feature_shards, names)
        kept = [name for name in ("images", "latents") if all(name in shard for shard in sample_shards)]
        drawn = _join(samples, sample_shards, kept)
        if not np.array_equal(joined["index"], drawn["index"]):
            raise ValueError(f"{samples[0]} and {features[0]}: samples and features are of different images")
        metadata = [_metadata(shard, path) for shard, path in zip(sample_shards, samples, strict=True)]
        errors = next((shard for shard in feature_shards if "eps_error" in shard and "timesteps" in shard), {})
        eps_error, timesteps = errors.get("eps_error"), errors.get("timesteps")
        if eps_error is not None and (eps_error.ndim != 2 or timesteps.shape != eps_error.shape[1:]):
            raise ValueError(
                f"{features[0]}: eps_error must be [trajectories, calls] and timesteps [calls], "
                f"got {eps_error.shape} and {timesteps.shape}"
            )
        return cls(
            index=joined["index"],
            features={name: joined[name] for name in names},
            images=drawn.get("images"),
            latents=drawn.get("latents"),
            eps_error=eps_error,
            timesteps=timesteps,
            sampled=tuple(told.get("provenance", {}) for told in metadata if told),
            footprint=metadata[0].get("footprint", {}),
        )


def _read(path: str | Path, needed: Sequence[str]) -> dict[str, np.ndarray]:
    arrays = read_arrays(path)
    missing = [name for name in needed if name not in arrays]
    if missing:
        raise ValueError(f"{path}: lacks {', '.join(missing)}")
    index = arrays["index"]
    if index.ndim != 1 or index.dtype.kind not in "iu" or not len(index):
        raise ValueError(f"{path}: index is {index.dtype} {index.shape}, not whole numbers [N]")
    for name in set(arrays) - {"eps_error", "timesteps", "metadata"}:
        if len(arrays[name]) != len(arrays["index"]):
            raise ValueError(f"{path}: {name} has {len(arrays[name])} rows for {len(arrays['index'])} images")
    return arrays


def _metadata(shard, path):
    return loads(str(shard.get("metadata", "{}")), path)


def _join(paths: Sequence, shards: list[dict], names: list[str]) -> dict[str, np.ndarray]:
    index = np.concatenate([shard["index"] for shard in shards])
    order = np.argsort(index, kind="stable")
    repeated = index[order][1:][np.diff(index[order]) == 0]
    if repeated.size:
        raise ValueError(f"{paths[0]} and its other shards: image {repeated[0]} occurs more than once")
    return {"index": index[order]} | {name: np.concatenate([s[name] for s in shards])[order] for name in names}


@dataclass(frozen=True, eq=False)
class Estimate:
    """A metric's value, its values on the resamples [R], and the number of independent draws behind it."""

    value: float
    resampled: np.ndarray
    n: int
    protocol: str = ""  # what the metric itself chose, added to the model's protocol
    note: str = ""


@dataclass(frozen=True)
class Metric:
    """One row of METRICS: what tables call it, which way is better, and how it is estimated."""

    label: str
    better: str  # "lower" or "higher"
    # (cell, full-precision cell, reference, counts [R, N], extractor) -> Estimate, or None where the cell lacks what
    # it needs
    estimate: Callable[[Cell, Cell | None, Reference | None, np.ndarray, str], Estimate | None]
    is_mean: bool = False  # a mean over n draws, whose interval takes Student's factor
    paired: bool = False  # measured against full precision, which has no such row itself
    network: str | None = None  # the network that is named beside it: "extractor", "clip" or None
    real: bool = False  # measured against real images, whose file is named in the row


def _fid(cell, fp, reference, counts, extractor):
    return _frechet(cell.features["pool"], reference.pool, counts, extractor)


def _fid_infinity(cell, fp, reference, counts, extractor):
    if extractor not in RESIZE or len(cell.index) < 10_000:
        return None
    value = fid_infinity(cell.features["pool"], reference.pool)
    return Estimate(value, np.array([]), len(cell.index), _resized(extractor), "interval: that of FID, moved")


def _precision(cell, fp, reference, counts, extractor):
    if reference.features is None or len(reference.features) <= NEIGHBOURS:
        return None
    samples = inside(cell.features["pool"], reference.features)
    protocol = f"k = {NEIGHBOURS}, {len(reference.features)} real images"
    return _mean(samples, counts, protocol="; ".join(filter(None, [_resized(extractor), protocol])))


def _sfid(cell, fp, reference, counts, extractor):
    return _frechet(cell.features["spatial"], reference.spatial, counts, extractor)


def _frechet(features, reference, counts, extractor):
    drawn = Statistics.from_features(features)
    resampled = intervals.resampled_frechet(features, reference, counts)
    value = frechet_distance(drawn, reference)
    return Estimate(value, resampled, drawn.n, protocol=_resized(extractor), note=_rank_note(drawn))


def _resized(extractor):
    return f"resize {RESIZE[extractor]}" if extractor in RESIZE else ""


def _rank_note(statistics):
    dimensions = statistics.mean.size
    return f"n = {statistics.n} <= {dimensions} dimensions: singular covariance" if statistics.singular else ""


def _inception_score(cell, fp, reference, counts, extractor):
    if extractor == "clean":  # defines none
        return None
    logits = cell.features["logits"]
    splits = partition(len(logits), extractor)
    resampled = resampled_inception_scores(logits, counts, splits)
    shuffled = " of shuffled images" if extractor == "torch-fidelity" else ""
    protocol = f"{len(splits)} split{'s' if len(splits) > 1 else ''}{shuffled}"
    protocol = "; ".join(filter(None, [_resized(extractor), protocol]))
    note = splits_note(len(logits), extractor)
    return Estimate(inception_score(logits, splits), resampled, len(logits), protocol=protocol, note=note)


def _clip(cell, fp, reference, counts, extractor):
    if "clip_image" not in cell.features or "clip_text" not in cell.features:
        return None
    return _mean(clip_scores(cell.features["clip_image"], cell.features["clip_text"]), counts)


def _mean(values, counts, note="", protocol=""):
    resampled = intervals.resampled_means(values, counts)
    return Estimate(float(np.mean(values)), resampled, len(values), protocol=protocol, note=note)


def _psnr(cell, fp, reference, counts, extractor):
    if cell.images is None or fp.images is None:
        return None
    identical = int((cell.images == fp.images).all(axis=(1, 2, 3)).sum())
    note = f"{identical} of {len(cell.images)} images identical, counted as one level apart" if identical else ""
    return _mean(psnr(cell.images, fp.images), counts, note)


def _latent_mse(cell, fp, reference, counts, extractor):
    if cell.latents is None or fp.latents is None:
        return None
    return _mean(latent_mse(cell.latents, fp.latents), counts, _broken_note(cell.latents, "latents"))


def _broken_note(values, what):
    broken = int((~np.isfinite(values.reshape(len(values), -1))).any(axis=1).sum())
    return f"{broken} of {len(values)} {what} not finite" if broken else ""


def _fid_to_fp(cell, fp, reference, counts, extractor):
    drawn, target = cell.features["pool"], fp.features["pool"]
    statistics = Statistics.from_features(drawn)
    value = frechet_distance(statistics, Statistics.from_features(target))
    resampled = intervals.resampled_frechet_between(drawn, target, counts)
    return Estimate(value, resampled, statistics.n, note=_rank_note(statistics))


def _eps_error(cell, fp, reference, counts, extractor):
    # Trajectories are what is resampled: the calls of one trajectory are not independent.
    counts = intervals.resample_counts(len(cell.eps_error), len(counts))
    return _mean(cell.eps_error.mean(axis=1, dtype=np.float64), counts, _broken_note(cell.eps_error, "trajectories"))


METRICS = {
    "fid": Metric("FID", "lower", _fid, network="extractor", real=True),
    "sfid": Metric("sFID", "lower", _sfid, network="extractor", real=True),
    "is": Metric("IS", "higher", _inception_score, network="extractor"),
    "precision": Metric("precision", "higher", _precision, is_mean=True, network="extractor", real=True),
    "fid_infinity": Metric("FID at infinity", "lower", _fid_infinity, network="extractor", real=True),
    "clip": Metric("CLIP score", "higher", _clip, is_mean=True, network="clip"),
    "psnr": Metric("PSNR to FP [dB]", "higher", _psnr, is_mean=True, paired=True),
    "latent_mse": Metric("latent MSE to FP", "lower", _latent_mse, is_mean=True, paired=True),
    "fid_to_fp": Metric("FID to FP", "lower", _fid_to_fp, paired=True, network="extractor"),
    "eps_error": Metric("noise-prediction error", "lower", _eps_error, is_mean=True, paired=True),
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
    """Every metric of a cell; `fp` is the full-precision cell of the same seeds, or None for that cell itself.

    Without `reference`, none that is measured against real images.

    Returns, fit for JSON: "rows" [{metric, value, low, high, n, extractor, protocol, reference, note}], where
    `reference` is the beginning of the hash of the file of real images' statistics, if the metric has one; "eps_error",
    one row per denoiser call [{call, timestep, value, low, high, n}]; "resampled" {metric: [R values]}; "drawn", what
    two cells must share to be compared: images, trajectories, timesteps; "sampled", the provenance of each shard; and
    "footprint", size and work of the denoiser.

    A row without an interval says why in its note: "diverged", or how many draws there would have to be.

    Raises ValueError where cell and full precision are of different images, the cell has no eps_error to measure, or
    a single image.
    """
    if len(cell.index) < 2:
        raise ValueError(f"{len(cell.index)} image: metrics have an interval, which needs 2 or more")
    if fp is not None and not np.array_equal(cell.index, fp.index):
        ours, theirs = index_ranges(cell.index), index_ranges(fp.index)
        raise ValueError(f"only the same images are compared: the cell has {ours}, full precision {theirs}")
    if fp is not None and cell.eps_error is None:
        raise ValueError("the cell has no eps_error; it belongs into the first feature shard")
    resamples = INCEPTION_RESAMPLES if extractor in RESIZE else intervals.RESAMPLES
    counts = intervals.resample_counts(len(cell.index), resamples)
    rows, resampled, values = [], {}, {}
    for name, metric in METRICS.items():
        lacking = metric.paired and fp is None or metric.real and reference is None
        estimate = None if lacking else metric.estimate(cell, fp, reference, counts, extractor)
        if estimate is None:
            continue
        draws = estimate.resampled
        if name == "fid_infinity":
            # The bias taken off is one number for all resamples, and its own spread is left out.
            draws = np.array(resampled["fid"]) + (estimate.value - values["fid"])
        values[name], resampled[name] = estimate.value, draws.tolist()
        low, high = _interval(metric, estimate.value, draws, estimate.n)
        rows.append(
            {
                "metric": name,
                "value": estimate.value,
                "low": low,
                "high": high,
                "n": estimate.n,
                "extractor": {"extractor": extractor, "clip": clip, None: ""}[metric.network],
                "protocol": "; ".join(filter(None, [protocol, estimate.protocol])),
                "reference": reference_sha256[:12] if metric.real else "",
                "note": _note(estimate, low, high),
            }
        )
    return {
        "rows": rows,
        "eps_error": [] if fp is None else _eps_error_by_call(cell),
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
    """Paired comparison, a minus b, of two cells as `measure` returned them, by every metric that both have.

    Raises ValueError where the two are not of the same images, networks and protocol, or their noise-prediction errors
    not of the same trajectories.
    """
    of_a, of_b = ({row["metric"]: row for row in cell["rows"]} for cell in (a, b))
    diverged = has_diverged(a), has_diverged(b)
    compared = {}
    for name in (name for name in METRICS if name in of_a and name in of_b):
        keys = ("images", "trajectories", "timesteps") if name == "eps_error" else ("images",)
        for key, left, right in [(key, a["drawn"][key], b["drawn"][key]) for key in keys] + [
            (key, of_a[name].get(key), of_b[name].get(key)) for key in ("n", "extractor", "protocol", "reference")
        ]:
            if left != right:
                raise ValueError(f"{name}: only cells of equal {key} are compared, got {left} and {right}")
        n, difference = of_a[name]["n"], of_a[name]["value"] - of_b[name]["value"]
        low, high = _interval(METRICS[name], difference, np.subtract(a["resampled"][name], b["resampled"][name]), n)
        compared[name] = Comparison(difference, low, high, n, METRICS[name].better, diverged)
    return compared


def index_ranges(index: np.ndarray) -> str:
    """Sorted image indices as a person writes them: "0-499", "0-3,7"."""
    breaks = np.flatnonzero(np.diff(index) != 1) + 1
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in np.split(index, breaks))


def _note(estimate, low, high):
    if not math.isfinite(estimate.value):
        return "; ".join(filter(None, ["diverged", estimate.note]))
    if not math.isfinite(high - low):
        return "; ".join(filter(None, [f"n = {estimate.n}: no interval, 2 would do", estimate.note]))
    return estimate.note


def _interval(metric, value, resampled, n):
    low, high = intervals.mean_interval(value, resampled, n) if metric.is_mean else intervals.interval(value, resampled)
    return float(low), float(high)


def _eps_error_by_call(cell):
    trajectories = len(cell.eps_error)
    values = cell.eps_error.mean(axis=0, dtype=np.float64)  # [calls]
    resampled = intervals.resampled_means(cell.eps_error, intervals.resample_counts(trajectories))  # [R, calls]
    low, high = intervals.mean_interval(values, resampled, trajectories)
    columns = zip(cell.timesteps.tolist(), values.tolist(), low.tolist(), high.tolist(), strict=True)
    return [
        {"call": call, "timestep": timestep, "value": value, "low": lower, "high": upper, "n": trajectories}
        for call, (timestep, value, lower, upper) in enumerate(columns)
    ]
