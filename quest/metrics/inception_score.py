"""Inception score (arXiv:1606.03498): exp of the mean KL divergence of each image's class distribution from their mean.

The classes are those of the extractor's softmax head; with another network than Inception it is a score of the same
form on another scale. Like the Fréchet distance it depends on n, so only equal n is comparable.
"""

import numpy as np
from scipy.special import log_softmax


def default_splits(n: int) -> int:
    """Splits of 5000 images, at most 10, as for the usual 50,000 images; fewer images are one split."""
    return min(10, max(1, n // 5000))


def inception_score(logits: np.ndarray, splits: int | None = None) -> float:
    """Mean over `splits` runs of consecutive images of exp(mean_i KL(p_i || mean p)); logits [N, K]."""
    return float(resampled_inception_scores(logits, np.ones((1, len(logits))), splits)[0])


def resampled_inception_scores(logits: np.ndarray, counts: np.ndarray, splits: int | None = None) -> np.ndarray:
    """Scores [R] of resamples in which image i occurs counts[r, i] times (within its own split); counts [R, N]."""
    logits = np.asarray(logits, np.float64)
    if logits.ndim != 2:
        raise ValueError(f"logits must be [N, K], got shape {logits.shape}")
    splits = default_splits(len(logits)) if splits is None else splits
    if not 1 <= splits <= len(logits):
        raise ValueError(f"splits must lie between 1 and the number of images, {len(logits)}; got {splits}")
    log_p = log_softmax(logits, axis=1)
    p = np.exp(log_p)
    negative_entropy = (p * log_p).sum(axis=1)  # [N]
    scores = []
    for part in np.array_split(np.arange(len(logits)), splits):
        weight = counts[:, part]
        weight = weight / weight.sum(axis=1, keepdims=True)
        mean_p = weight @ p[part]  # [R, K]
        # mean_i sum_k p_ik (log p_ik - log mean_k) = mean_i sum_k p_ik log p_ik - sum_k mean_k log mean_k
        cross = (mean_p * np.log(mean_p.clip(np.finfo(np.float64).tiny))).sum(axis=1)
        scores.append(np.exp(weight @ negative_entropy[part] - cross))
    return np.mean(scores, axis=0)
