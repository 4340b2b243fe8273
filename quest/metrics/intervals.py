"""95 % intervals by the bootstrap over images.

A resample draws n of the n images with replacement. It is stored as counts: row r of counts [R, N] says how often each
image occurs in resample r. For n = 4, the counts [2, 0, 1, 1] mean that image 0 was drawn twice and image 1 not at all,
and the mean of values v in this resample is (2 v_0 + v_2 + v_3) / 4.

All cells use the same counts, so they are resampled *jointly*. Every method draws image i from the same noise, and most
of the variation between images is common to two methods. It cancels in the difference of their resampled values, and
the standard deviation of these differences gives the paired interval.

An interval is the estimate ± 1.96 standard deviations of the resampled values; percentiles would be wrong. A Fréchet
distance of n samples has a bias of about c / n, and a resample adds this bias a second time. Resampled values therefore
scatter around the estimate + c / n, and their percentiles may exclude the estimate, but their spread is not shifted.
The interval of a single distance is too wide if n is near the number of feature dimensions: at n = 500 by a tenth for
16 dimensions and by a third to two thirds for 64. It covers the expected distance at this n, E[FID_n], in at least 95 %
of cases. In the paired difference of two sets of similar images the excess cancels: over 100 trials of 500 images, the
bootstrap's standard deviation was 0.92 to 0.98 of the true one, and 94 to 96 % of the intervals covered the true
difference. An interval contains neither the bias, so only distances of equal n can be compared, nor the choice of
the reference images, which all cells share.
"""

import numpy as np
from scipy.special import stdtrit

from quest.metrics.frechet import Statistics, frechet_distance, trace_sqrt

RESAMPLES = 200


def resample_counts(n: int, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Return how often each of n images occurs in each resample: counts [R, N], whose rows sum to n."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples).astype(np.float64)


def half_width(resampled: np.ndarray, n: int | None = None) -> np.ndarray:
    """Return half of the interval of a metric with resampled values [R], or of S metrics with values [R, S].

    n: for a mean, the number of its values. A mean uses Student's factor instead of 1.96, which matters for a few
    dozen values, and corrects the bootstrap's variance, which is (n - 1) / n of the unbiased one. One value has no
    interval: NaN.
    """
    if n is None:
        return 1.96 * spread(resampled)
    if n < 2:
        return np.full(np.shape(resampled)[1:], np.nan)
    return stdtrit(n - 1, 0.975) * np.sqrt(n / (n - 1)) * spread(resampled)


def interval(value, resampled: np.ndarray, n: int | None = None) -> tuple:
    """Return (low, high), `value` minus and plus `half_width`; value is a number, or an array [S]."""
    half = half_width(resampled, n)
    return value - half, value + half


def spread(resampled: np.ndarray) -> np.ndarray:
    """Return the standard deviation of the finite resampled values [R] or [R, S]; NaN if there are fewer than two."""
    resampled = np.asarray(resampled, np.float64)
    finite = np.isfinite(resampled)
    if finite.all():
        return np.std(resampled, axis=0, ddof=1)
    count, kept = finite.sum(axis=0), np.where(finite, resampled, 0.0)
    enough = count > 1
    centred = np.where(finite, kept - kept.sum(axis=0) / np.maximum(count, 1), 0.0)
    return np.where(enough, np.sqrt((centred**2).sum(axis=0) / np.where(enough, count - 1, 1)), np.nan)


def student(values) -> tuple[float, float, float]:
    """Return the mean of independent values [n] and its 95 % interval (low, high) by Student's t.

    For example, student([1.0, 2.0, 3.0]) is (2.0, -0.48, 4.48). Raises ValueError for fewer than two values.
    """
    values = np.asarray(values, np.float64)
    if len(values) < 2:
        raise ValueError(f"an interval needs two values or more, got {len(values)}")
    mean = values.mean()
    half = stdtrit(len(values) - 1, 0.975) * values.std(ddof=1) / np.sqrt(len(values))
    return float(mean), float(mean - half), float(mean + half)


def resampled_means(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return the means [R] (or [R, S]) of values [N] (or [N, S]) on the resamples."""
    return counts @ np.asarray(values, np.float64) / counts.shape[1]


def resampled_frechet(features: np.ndarray, reference: Statistics, counts: np.ndarray) -> np.ndarray:
    """Return the Fréchet distances [R] of resampled features [N, D] to fixed statistics.

    With the root S = R R^T of the reference covariance, R^T C R has the eigenvalues of S C. The features are multiplied
    by R once. Each resample then needs one weighted covariance of the 63 % of rows that occur in it, and its
    eigenvalues.
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
    """Return the scatter matrix [D, D] of features [N, D] with these weights [N] and this weighted mean [D]."""
    nonzero = np.flatnonzero(weight)
    rows = features[nonzero]
    rows *= np.sqrt(weight[nonzero])[:, None]
    return rows.T @ rows - weight.sum() * np.outer(mean, mean)  # for rows.T @ rows, BLAS computes one triangle only


def resampled_frechet_between(a: np.ndarray, b: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return the Fréchet distances [R] between features a and b [N, D]; row i of both has the same seed and weight."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.array([frechet_distance(_weighted(a, weight), _weighted(b, weight)) for weight in counts])


def _weighted(features: np.ndarray, weight: np.ndarray) -> Statistics:
    """Return the statistics of features [N, D] in which row i occurs weight[i] times."""
    n = len(features)
    mean = weight @ features / n
    return Statistics(mean, _scatter(features - mean, weight, np.zeros_like(mean)) / (n - 1), n)
