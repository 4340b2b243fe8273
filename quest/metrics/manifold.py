"""Precision and recall of features by balls around nearest neighbours (Kynkäänniemi et al., arXiv:1904.06991).

The manifold of a set is the union of balls around its features; each ball reaches to the k-th nearest other one of the
set (section 2). Precision is the share of samples in the manifold of real images, recall the share of real images in
the manifold of samples: what a model no longer draws lowers recall.
"""

import numpy as np

NEIGHBOURS = 3
MOST = 10_000  # samples that span a manifold: the first ones, because distances of all pairs are in memory
BLOCK = 2000  # rows per block of distances: 160 MB against 10,000 real images


def inside(samples: np.ndarray, real: np.ndarray, k: int = NEIGHBOURS) -> np.ndarray:
    """Return which samples [N, D] lie in the manifold of real features [M, D], as bool [N]; precision is their mean.

    It is reported for ImageNet, because FID with strong guidance falls when quantization adds noise (arXiv:2402.03666,
    section 4). Raises ValueError unless both have D columns and M > k.
    """
    samples, real = _checked(samples, real)
    if len(real) <= k:
        raise ValueError(f"{len(real)} real images have no {k}-th neighbour each; at least {k + 1} are needed")
    # The nearest neighbour is the image itself, at distance 0, so index k is the k-th other image.
    radii = np.concatenate([np.partition(d, k, axis=1)[:, k] for d in _squared_distances(real, real)])  # [M]
    return np.concatenate([(d <= radii).any(axis=1) for d in _squared_distances(samples, real)])


def recall(samples: np.ndarray, real: np.ndarray, halves: int, k: int = NEIGHBOURS) -> tuple[float, np.ndarray]:
    """Return the share of real features [M, D] in the manifold of samples [N, D], and that for each of `halves` halves.

    A resample with replacement would hold copies, whose balls are too small. Halves of the samples are drawn without
    replacement, from the seed 0 in all cells, so that differences between methods are paired. The variance of a mean of
    n / 2 values around that of n is s^2 / n, the variance of the mean of n itself; so their spread makes the interval.
    It leaves out the choice of the real images, as all intervals do. Raises ValueError unless both have D columns and
    half of the samples are more than k.
    """
    samples, real = _checked(samples, real)
    half = len(samples) // 2
    if half <= k:
        raise ValueError(f"{len(samples)} samples: half of them have no {k}-th neighbour each; needed: {2 * k + 2}")
    own = np.concatenate([d.astype(np.float32) for d in _squared_distances(samples, samples)])  # [N, N]
    to_real = np.concatenate([d.astype(np.float32) for d in _squared_distances(real, samples)])  # [M, N]

    def share(part: np.ndarray) -> float:
        radii = np.partition(own[np.ix_(part, part)], k, axis=1)[:, k]
        return float((to_real[:, part] <= radii).any(axis=1).mean())

    draw = np.random.default_rng(0)
    values = [share(np.sort(draw.permutation(len(samples))[:half])) for _ in range(halves)]
    return share(np.arange(len(samples))), np.array(values)


def _checked(samples, real):
    samples, real = np.asarray(samples, np.float64), np.asarray(real, np.float64)
    if samples.ndim != 2 or real.ndim != 2 or samples.shape[1] != real.shape[1]:
        raise ValueError(f"samples and real features must be [N, D] and [M, D], got {samples.shape} and {real.shape}")
    return samples, real


def _squared_distances(a, b):
    """Yield the squared distances of a [N, D] to b [M, D] in blocks of rows."""
    norms = np.einsum("nd,nd->n", b, b)
    for start in range(0, len(a), BLOCK):
        rows = a[start : start + BLOCK]
        yield (np.einsum("nd,nd->n", rows, rows)[:, None] + norms - 2 * rows @ b.T).clip(0)
