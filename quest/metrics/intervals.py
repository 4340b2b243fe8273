"""95 % intervals by the bootstrap over images.

A resample draws n of the n images with replacement and is held as counts [R, N]: a metric that weighs image i by
counts[r, i] is a metric of resample r. Cells that use the same counts are resampled *jointly*, image by image. Since
every method draws image i from the same seed, most of the noise is common to two methods and cancels in the difference
of their resampled values, whose spread is the paired interval.

Intervals are the point estimate ± 1.96 standard deviations of the resampled values, not their percentiles. A Fréchet
distance of n samples lies above that of infinitely many by a bias of about c / n. A resample has that bias once more,
so that resampled values scatter around the estimate + c / n and their percentiles may exclude the estimate itself.
Their spread is not shifted. For a single distance it is rather too wide, the more so the nearer n comes to the feature
dimension: at n = 500 by a tenth for 16 dimensions and by a third to two thirds for 64. Such an interval covers the
expected distance at this n, E[FID_n], in at least 95 % of cases. For the paired difference of two sets of similar
images the excess cancels: over 100 trials of 500 images the bootstrap's standard deviation was 0.92 to 0.98 of the true
one, and 94 to 96 % of the intervals held the true difference. The interval says nothing of the bias, so only distances
of equal n are comparable, and nothing of the choice of the reference images, which is common to all cells.
"""

import numpy as np
from scipy.special import stdtrit

from quest.metrics.frechet import Statistics, frechet_distance, trace_sqrt

RESAMPLES = 200


def resample_counts(n: int, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """How often each of n images is in each resample: [R, N], rows sum to n. A function of its arguments only."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples).astype(np.float64)


def interval(value: float, resampled: np.ndarray) -> tuple[float, float]:
    """`value` ± 1.96 standard deviations of `resampled` [R], those left out that are not finite."""
    half = 1.96 * spread(resampled)
    return value - half, value + half


def spread(resampled: np.ndarray) -> np.ndarray:
    """Standard deviation over the finite ones of resampled values [R] or [R, S]; NaN where there are fewer than two."""
    resampled = np.asarray(resampled, np.float64)
    finite = np.isfinite(resampled)
    if finite.all():
        return np.std(resampled, axis=0, ddof=1)
    count, kept = finite.sum(axis=0), np.where(finite, resampled, 0.0)
    enough = count > 1
    centred = np.where(finite, kept - kept.sum(axis=0) / np.maximum(count, 1), 0.0)
    return np.where(enough, np.sqrt((centred**2).sum(axis=0) / np.where(enough, count - 1, 1)), np.nan)


def mean_interval(value, resampled: np.ndarray, n: int) -> tuple:
    """Interval of a mean over n values (or of S means, resampled [R, S]): as `interval`, for small n as well.

    Where n is a few dozen, a mean takes Student's factor instead of 1.96, and the bootstrap's variance, (n - 1) / n of
    the unbiased one, is corrected. One value has no interval: NaN.
    """
    half = stdtrit(n - 1, 0.975) * np.sqrt(n / (n - 1)) * spread(resampled) if n > 1 else np.full_like(value, np.nan)
    return value - half, value + half


def student(values) -> tuple[float, float, float]:
    """Mean of n independent values and its 95 % interval by Student's t. Raises ValueError for fewer than two."""
    values = np.asarray(values, np.float64)
    if len(values) < 2:
        raise ValueError(f"an interval needs two values or more, got {len(values)}")
    mean = values.mean()
    half = stdtrit(len(values) - 1, 0.975) * values.std(ddof=1) / np.sqrt(len(values))
    return float(mean), float(mean - half), float(mean + half)


def resampled_means(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Means [R] (or [R, S]) of resampled values [N] (or [N, S])."""
    return counts @ np.asarray(values, np.float64) / counts.shape[1]


def resampled_frechet(features: np.ndarray, reference: Statistics, counts: np.ndarray) -> np.ndarray:
    """Fréchet distances [R] of resampled features [N, D] to fixed statistics.

    The features are multiplied by the root of the reference covariance once, so that each resample takes one weighted
    covariance, of the 63 % of rows that occur in it, and its eigenvalues: with S = R R^T, R^T C R has those of S C.
    """
    n = counts.shape[1]
    centred = np.asarray(features, np.float64) - reference.mean  # [N, D]
    shifts = counts @ centred / n  # [R, D]
    traces = counts @ np.einsum("nd,nd->n", centred, centred) - n * (shifts**2).sum(axis=1)
    rooted, rooted_shifts = centred @ reference.root, shifts @ reference.root
    del centred  # as large as the features in float64, 0.8 GB for 50,000 images
    cross = [trace_sqrt(_scatter(rooted, w, s) / (n - 1)) for w, s in zip(counts, rooted_shifts, strict=True)]
    return (shifts**2).sum(axis=1) + traces / (n - 1) + np.trace(reference.cov) - 2 * np.array(cross)


def _scatter(features: np.ndarray, weight: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Sum over rows of weight times the outer product of a row's deviation from the weighted mean, [D, D]."""
    drawn = np.flatnonzero(weight)
    rows = features[drawn]
    rows *= np.sqrt(weight[drawn])[:, None]
    return rows.T @ rows - weight.sum() * np.outer(mean, mean)  # a matrix with itself: BLAS computes one triangle


def resampled_frechet_between(a: np.ndarray, b: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Fréchet distances [R] between two sets of features [N, D] whose rows belong together and are resampled alike."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.array([frechet_distance(_weighted(a, weight), _weighted(b, weight)) for weight in counts])


def _weighted(features: np.ndarray, weight: np.ndarray) -> Statistics:
    """Statistics of features [N, D] in which row i occurs weight[i] times."""
    n = len(features)
    mean = weight @ features / n
    return Statistics(mean, _scatter(features - mean, weight, np.zeros_like(mean)) / (n - 1), n)
