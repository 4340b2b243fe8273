"""Fréchet distance between Gaussians fitted to features: FID (arXiv:1706.08500, Eq. 6) and, on spatial features, sFID.

Equal to the usual sqrtm implementations on the same features. The trace of the matrix square root is taken as
Tr (S C)^1/2 = Tr (S^1/2 C S^1/2)^1/2, which needs symmetric eigenvalues only: no complex parts, no offset for singular
covariances, and S^1/2 of a fixed reference is computed once however many distances are taken to it.
"""

import json
import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np


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
        """Statistics of features [N, D]; ValueError for another shape, N < 2, or values that are not finite."""
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
        """True where n <= D: the covariance has no full rank, and the distance depends on n more than on anything."""
        return self.n <= self.mean.size

    @cached_property
    def sqrt_cov(self) -> np.ndarray:
        """The symmetric square root of the covariance, [D, D]."""
        values, vectors = np.linalg.eigh(self.cov)
        return (vectors * np.sqrt(values.clip(0))) @ vectors.T


def trace_sqrt(matrix: np.ndarray) -> float:
    """Trace of the square root of a symmetric positive semi-definite matrix [D, D]."""
    values = np.linalg.eigvalsh(matrix)
    # A zero eigenvalue comes out as rounding noise of about eps * the largest one; its square root would not be small.
    floor = values[-1] * len(values) * np.finfo(np.float64).eps
    return float(np.sqrt(values[values > floor]).sum())


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """|m_a - m_b|^2 + Tr(C_a + C_b - 2 (C_a C_b)^1/2). Pass the fixed reference as `b`: its square root is kept."""
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"cannot compare statistics of {a.mean.size} and {b.mean.size} dimensions")
    difference = a.mean - b.mean
    cross = trace_sqrt(b.sqrt_cov @ a.cov @ b.sqrt_cov)
    return max(0.0, float(difference @ difference + np.trace(a.cov) + np.trace(b.cov) - 2 * cross))


@dataclass(frozen=True, eq=False)
class Reference:
    """Statistics of n real images, for FID (`pool`) and sFID (`spatial`), and where they come from."""

    pool: Statistics
    spatial: Statistics
    metadata: dict


def save_reference(path: str | Path, pool: Statistics, spatial: Statistics, metadata: dict) -> None:
    """Write reference statistics as .npz (pool_mean, pool_cov, spatial_mean, spatial_cov, n, metadata as json)."""
    if pool.n != spatial.n:
        raise ValueError(f"pool and spatial statistics are of {pool.n} and {spatial.n} images")
    np.savez(
        path,
        pool_mean=pool.mean,
        pool_cov=pool.cov,
        spatial_mean=spatial.mean,
        spatial_cov=spatial.cov,
        n=pool.n,
        metadata=json.dumps(metadata),
    )


def load_reference(path: str | Path) -> Reference:
    """Read what `save_reference` wrote; ValueError naming the file where it is something else."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
    except (ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: not an .npz file of reference statistics") from error
    missing = {"pool_mean", "pool_cov", "spatial_mean", "spatial_cov", "n", "metadata"} - set(arrays)
    if missing:
        raise ValueError(f"{path}: reference statistics lack {', '.join(sorted(missing))}")
    n = int(arrays["n"])
    return Reference(
        pool=Statistics(arrays["pool_mean"], arrays["pool_cov"], n),
        spatial=Statistics(arrays["spatial_mean"], arrays["spatial_cov"], n),
        metadata=json.loads(str(arrays["metadata"])),
    )
