"""Inception score (arXiv:1606.03498): exp of the mean KL divergence of each image's class distribution from their mean.

The classes are those of the extractor's softmax head; with another network than Inception it is a score of the same
form on another scale. Like the Fréchet distance it depends on n, so only equal n is comparable.
"""

import numpy as np
from scipy.special import log_softmax

FEW = 10  # images of a split, below which its score says nothing
SPLIT = 5000  # images of a split in the guided-diffusion evaluator


def default_splits(n: int) -> int:
    """Splits of 5000 images, at most 10, as for the usual 50,000 images; fewer images are one split."""
    return min(10, max(1, n // SPLIT))


def partition(n: int, extractor: str) -> list[np.ndarray]:
    """Which of n images make up each split under a protocol of Inception; `default_splits` even runs for any other.

    `adm`: runs of 5000, the last one shorter where 5000 does not divide n. `torch-fidelity`: 10 parts of a shuffle by
    numpy's legacy generator with seed 2020, its defaults.
    """
    order = np.arange(n)
    if extractor == "adm":
        return [order[start : start + SPLIT] for start in range(0, n, SPLIT)]
    if extractor == "torch-fidelity":
        order = np.random.RandomState(2020).permutation(n)
        parts = [order[i * n // 10 : (i + 1) * n // 10] for i in range(10)]
        return [part for part in parts if len(part)]
    return np.array_split(order, default_splits(n))


def splits_note(n: int, extractor: str) -> str:
    """What is to be said of n images: of a split of few the score is near 1, whatever the images; else nothing."""
    smallest = min(map(len, partition(n, extractor)))
    if smallest >= FEW:
        return ""
    enough = -(-n // SPLIT) * SPLIT if n > SPLIT else 10 * FEW
    of = "1 image" if smallest == 1 else f"{smallest} images"
    return f"a split of {of}, whose score is near 1 whatever is in it; n = {enough} would do"


def inception_score(logits: np.ndarray, splits: int | list[np.ndarray] | None = None) -> float:
    """Mean over splits of exp(mean_i KL(p_i || mean p)); logits [N, K].

    splits: a number of even runs of consecutive images, or the images of each, see `partition`.
    """
    return float(resampled_inception_scores(logits, np.ones((1, len(logits))), splits)[0])


def resampled_inception_scores(
    logits: np.ndarray, counts: np.ndarray, splits: int | list[np.ndarray] | None = None
) -> np.ndarray:
    """Scores [R] of resamples in which image i occurs counts[r, i] times (within its own split); counts [R, N].

    A split that has no image in a resample is left out of its mean.
    """
    logits = np.asarray(logits, np.float64)
    if logits.ndim != 2:
        raise ValueError(f"logits must be [N, K], got shape {logits.shape}")
    splits = default_splits(len(logits)) if splits is None else splits
    if isinstance(splits, int):
        if not 1 <= splits <= len(logits):
            raise ValueError(f"splits must lie between 1 and the number of images, {len(logits)}; got {splits}")
        splits = np.array_split(np.arange(len(logits)), splits)
    log_p = log_softmax(logits, axis=1)
    p = np.exp(log_p)
    negative_entropy = (p * log_p).sum(axis=1)  # [N]
    scores, present = [], []
    for part in splits:
        weight = counts[:, part]
        total = weight.sum(axis=1, keepdims=True)
        weight = weight / np.maximum(total, 1)
        mean_p = weight @ p[part]  # [R, K]
        # mean_i sum_k p_ik (log p_ik - log mean_k) = mean_i sum_k p_ik log p_ik - sum_k mean_k log mean_k
        cross = (mean_p * np.log(mean_p.clip(np.finfo(np.float64).tiny))).sum(axis=1)
        scores.append(np.exp(weight @ negative_entropy[part] - cross))
        present.append(total[:, 0] > 0)
    return np.average(scores, axis=0, weights=present)
