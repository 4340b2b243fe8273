"""Kernel distance between sets of features: KID (arXiv:1801.01401), the squared MMD of a cubic polynomial kernel.

Unlike a Fréchet distance it has no bias: for two sets from the same distribution, its expectation is 0 at every n.
"""

import numpy as np

BLOCK = 500  # images whose kernel values are in memory at once: those of 5,000 with each other would take 200 MB


def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return (x . y / D + 1)^3 [N, M] for features [N, D] and [M, D] (arXiv:1801.01401, section 4)."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def mean_of_pairs(features: np.ndarray) -> float:
    """Return the mean kernel over pairs of different rows of features [N, D]. Raises ValueError if N < 2."""
    x, _ = _checked(features, features)
    n = len(x)
    total = sum(kernel(x[rows], x).sum() for rows in _blocks(n))
    own = ((x**2).sum(axis=1) / x.shape[1] + 1) ** 3
    return float((total - own.sum()) / (n * (n - 1)))


def kernel_distance(features: np.ndarray, real: np.ndarray) -> float:
    """Return the unbiased squared MMD between features [N, D] and real features [M, D].

    Raises ValueError for other shapes, N or M below 2, or values that are not finite.
    """
    return float(resampled_kernel_distances(features, real, np.ones((1, len(features))))[0])


def resampled_kernel_distances(
    features: np.ndarray, real: np.ndarray, counts: np.ndarray, real_pairs: float | None = None
) -> np.ndarray:
    """Return the distances [R] of resamples in which row i of features [N, D] occurs counts[r, i] times.

    Only pairs of different images count: an image that was drawn twice forms no pair with itself. real_pairs: the
    result of `mean_of_pairs(real)`, if it is already known. Raises ValueError as `kernel_distance` does.
    """
    x, y = _checked(features, real)
    real_pairs = mean_of_pairs(real) if real_pairs is None else real_pairs
    counted = counts.sum(axis=1)
    cross = counts @ np.concatenate([kernel(x[rows], y).mean(axis=1) for rows in _blocks(len(x))]) / counted
    sums = np.zeros(len(counts))
    for rows in _blocks(len(x)):
        columns = kernel(x, x[rows])
        columns[np.arange(len(x))[rows], np.arange(columns.shape[1])] = 0
        sums += np.einsum("rn,rn->r", counts @ columns, counts[:, rows])
    pairs = counted**2 - (counts**2).sum(axis=1)
    # A resample of a single image has no pair. Its mean is NaN, and intervals leave it out.
    own = np.divide(sums, pairs, out=np.full(len(sums), np.nan), where=pairs > 0)
    return own + real_pairs - 2 * cross


def _blocks(n):
    return [slice(start, start + BLOCK) for start in range(0, n, BLOCK)]


def _checked(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"features must be [N, D] and [M, D] with N and M of at least 2, got {a.shape} and {b.shape}")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("features hold values that are not finite")
    return a, b
