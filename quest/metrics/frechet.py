"""Fréchet distance between Gaussians fitted to features: FID (arXiv:1706.08500, Eq. 6) and, on spatial features, sFID.

The result equals that of the usual sqrtm implementations, but the computation avoids the matrix square root. If R is a
root of the covariance C, so that C = R R^T, then Tr (C_a C_b)^1/2 is the sum of the singular values of R_a^T R_b. There
are no complex parts, and a singular covariance needs no offset. It is also more accurate than the square roots of the
eigenvalues of C_a C_b: for Inception those span 12 orders of magnitude, and the rounding errors of the small ones add
up. The root of the reference is computed once and stored with its statistics.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from quest.runtime.files import dumps, loads, read_arrays


@dataclass(frozen=True, eq=False)
class Statistics:
    """Mean [D] and covariance [D, D] (ddof 1) of n feature vectors, in float64."""

    mean: np.ndarray
    cov: np.ndarray
    n: int

    def __post_init__(self):
        mean, cov = np.asarray(self.mean, np.float64), np.asarray(self.cov, np.float64)
        if mean.ndim != 1 or cov.shape != (mean.size, mean.size):
            raise ValueError(f"statistics need a mean [D] and a covariance [D, D], got {mean.shape} and {cov.shape}")
        object.__setattr__(self, "mean", mean)
        object.__setattr__(self, "cov", cov)
        object.__setattr__(self, "n", int(self.n))

    @classmethod
    def from_features(cls, features: np.ndarray) -> "Statistics":
        """Compute statistics of features [N, D]. Raises ValueError for another shape, N < 2 or non-finite values."""
        features = np.asarray(features)
        if features.ndim != 2 or len(features) < 2:
            raise ValueError(f"features must be [N, D] with N >= 2, got shape {features.shape}")
        if not np.isfinite(features).all():
            raise ValueError(f"features hold {int((~np.isfinite(features)).sum())} values that are not finite")
        features = features.astype(np.float64)
        mean = features.mean(axis=0)
        centred = features - mean
        return cls(mean, centred.T @ centred / (len(features) - 1), len(features))

    @property
    def singular(self) -> bool:
        """True if n <= D: the covariance has no full rank, and n determines the distance more than anything else.

        It is False for n = 0, which means an unknown n, as for published statistics.
        """
        return 0 < self.n <= self.mean.size

    @cached_property
    def root(self) -> np.ndarray:
        """R [D, D] with R R^T = covariance; it is computed once.

        It is the Cholesky factor, which at 2048 dimensions takes a thirtieth of the work of an eigendecomposition. A
        singular covariance has no such factor, so its root is the symmetric square root.
        """
        if not self.singular:
            try:
                return np.linalg.cholesky(self.cov)
            except np.linalg.LinAlgError:  # features that never vary
                pass
        values, vectors = np.linalg.eigh(self.cov)
        return (vectors * np.sqrt(np.where(values > _floor(values), values, 0))) @ vectors.T


def _floor(values: np.ndarray) -> float:
    """Return the bound below which eigenvalues (ascending) of a positive semi-definite matrix are rounding noise.

    The noise is about eps times the largest eigenvalue, and its square root would not be small.
    """
    return values[-1] * len(values) * np.finfo(np.float64).eps


def trace_sqrt(matrix: np.ndarray) -> float:
    """Return the trace of the square root of a symmetric positive semi-definite matrix [D, D]."""
    values = np.linalg.eigvalsh(matrix)
    return float(np.sqrt(values[values > _floor(values)]).sum())


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """Return |m_a - m_b|^2 + Tr(C_a + C_b - 2 (C_a C_b)^1/2). Raises ValueError if the dimensions differ."""
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"cannot compare statistics of {a.mean.size} and {b.mean.size} dimensions")
    difference = a.mean - b.mean
    cross = np.linalg.svd(a.root.T @ b.root, compute_uv=False).sum()
    return max(0.0, float(difference @ difference + np.trace(a.cov) + np.trace(b.cov) - 2 * cross))


def floor(features: np.ndarray, halvings: int = 10, seed: int = 0) -> tuple[float, float] | None:
    """Estimate how far apart two independent sets are whose images are drawn as those of features [N, D] were.

    The distance of two such sets of n images is about c / n (arXiv:1911.07023, section 3). So it is half the distance
    of two random halves of the N images. Returns its mean and standard deviation over `halvings` random halvings, or
    None if halves have no more than D images, where this does not hold.
    """
    n = len(features) // 2
    if n <= features.shape[1]:
        return None
    rng, values = np.random.default_rng(seed), []
    for _ in range(halvings):
        order = rng.permutation(len(features))
        a, b = (Statistics.from_features(features[rows]) for rows in (order[:n], order[n : 2 * n]))
        values.append(frechet_distance(a, b) / 2)
    return float(np.mean(values)), float(np.std(values, ddof=1))


def fid_infinity(features: np.ndarray, reference: Statistics, points: int = 15, seed: int = 2020) -> float:
    """Extrapolate the distance to infinitely many samples: FID_n is linear in 1/n (arXiv:1911.07023, section 3).

    As in the paper, the line is fitted to `points` random subsets of features [N, D] with evenly spaced sizes from 5000
    to N; `seed` chooses the subsets. Raises ValueError for N < 10,000, where the sizes are too close to fit a line.
    """
    n = len(features)
    if n < 10_000:
        raise ValueError(f"FID at infinity is extrapolated from 5000 images and more: at least 10000 needed, got {n}")
    rng = np.random.default_rng(seed)
    sizes = np.linspace(5000, n, points).astype(int)
    values = [
        frechet_distance(Statistics.from_features(features[rng.choice(n, size, replace=False)]), reference)
        for size in sizes
    ]
    return float(np.polynomial.Polynomial.fit(1 / sizes, values, 1)(0.0))


@dataclass(frozen=True, eq=False)
class Reference:
    """Statistics of n real images for FID (`pool`) and sFID (`spatial`), with their provenance in `metadata`.

    features: pooled features [M, D] of some of the images; precision needs them.
    """

    pool: Statistics
    spatial: Statistics
    metadata: dict
    features: np.ndarray | None = None

    def check(self, extractor: str, name: str = "reference") -> None:
        """Raise ValueError if the statistics belong to another network or protocol than `extractor`."""
        source = self.metadata.get("extractor")
        if source != extractor:
            raise ValueError(
                f"{name}: statistics of {source or 'an unnamed extractor'}, the cell has features of {extractor}; make "
                f"them with `python -m workflow.scripts.reference IMAGES --extractor {extractor} -o {name}`"
            )
        from quest.metrics import weights

        known, here = self.metadata.get("extractor_sha256"), weights.sha256(extractor)
        if known and here and known != here:
            raise ValueError(
                f"{name}: statistics of other weights of {extractor} (SHA-256 {known[:12]}..., here {here[:12]}...); "
                "make them again"
            )


def save_reference(
    path: str | Path, pool: Statistics, spatial: Statistics, metadata: dict, features: np.ndarray | None = None
) -> None:
    """Write reference statistics as .npz: pool_mean, pool_cov, spatial_mean, spatial_cov, n, metadata (json).

    features: [M, D], optional. n is 0 if the source does not state the number of images. Raises ValueError if pool and
    spatial statistics have different n.
    """
    if pool.n != spatial.n:
        raise ValueError(f"pool and spatial statistics are of {pool.n} and {spatial.n} images")
    optional = {} if features is None else {"features": np.asarray(features, np.float32)}
    np.savez(
        path,
        pool_mean=pool.mean,
        pool_cov=pool.cov,
        spatial_mean=spatial.mean,
        spatial_cov=spatial.cov,
        n=pool.n,
        metadata=dumps(metadata),
        **optional,
    )


def load_reference(path: str | Path) -> Reference:
    """Read a file of `save_reference`. Raises ValueError, which names the file, if it is anything else."""
    arrays = read_arrays(path)
    missing = {"pool_mean", "pool_cov", "spatial_mean", "spatial_cov", "n", "metadata"} - set(arrays)
    if missing:
        hint = ""
        if {"mu", "sigma"} <= set(arrays) or "arr_0" in arrays:
            hint = f"; `python -m workflow.scripts.reference {path} -o NEW.npz` makes them of it"
        raise ValueError(f"{path}: reference statistics lack {', '.join(sorted(missing))}{hint}")
    pool, spatial = (
        statistics_of(path, arrays[f"{part}_mean"], arrays[f"{part}_cov"], arrays["n"]) for part in ("pool", "spatial")
    )
    metadata, features = loads(str(arrays["metadata"]), path), arrays.get("features")
    if not isinstance(metadata, dict):
        raise ValueError(f"{path}: metadata is no mapping")
    if features is not None and (features.dtype.kind != "f" or features.shape[1:] != pool.mean.shape):
        raise ValueError(
            f"{path}: features are {features.dtype} {features.shape}; needed: [M, {pool.mean.size}] floats"
        )
    return Reference(pool, spatial, metadata, features)


def statistics_of(path: str | Path, mean: np.ndarray, cov: np.ndarray, n) -> Statistics:
    """Return statistics from a file. Raises ValueError, which names it, for non-finite values or other shapes."""
    try:
        statistics = Statistics(mean, cov, n)
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{path}: {error}") from error
    if not (np.isfinite(statistics.mean).all() and np.isfinite(statistics.cov).all() and statistics.n >= 0):
        raise ValueError(f"{path}: statistics that are not finite, or of {statistics.n} images")
    return statistics
