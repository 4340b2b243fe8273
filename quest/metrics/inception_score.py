"""Inception score (arXiv:1606.03498): exp(mean_i KL(p_i || mean p)), where p_i is the class distribution of image i.

The classes are those of the extractor's softmax head. With another network than Inception, the score has the same form
but another scale. Like the Fréchet distance it depends on n, so only scores of equal n can be compared.
"""

import numpy as np
from scipy.special import log_softmax

FEW = 10  # a split of fewer images has a meaningless score
SPLIT = 5000  # the guided-diffusion evaluator makes splits of this many images


def default_splits(n: int) -> int:
    """Return the number of splits of n images: one per 5000 images, at least 1 and at most 10."""
    return min(10, max(1, n // SPLIT))


def partition(n: int, extractor: str) -> list[np.ndarray]:
    """Return the image indices of each split of n images.

    `adm` makes runs of 5000 images; the last one may be shorter. `torch-fidelity` shuffles by numpy's legacy generator
    with seed 2020 and makes 10 parts. Any other extractor makes `default_splits` runs of equal length.
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
    """Return a note if a split has so few images that its score is near 1 for any images, otherwise ""."""
    smallest = min(map(len, partition(n, extractor)))
    if smallest >= FEW:
        return ""
    enough = -(-n // SPLIT) * SPLIT if n > SPLIT else 10 * FEW
    size = "1 image" if smallest == 1 else f"{smallest} images"
    return f"a split of {size}, whose score is near 1 whatever is in it; n = {enough} would do"


def inception_score(logits: np.ndarray, splits: int | list[np.ndarray] | None = None) -> float:
    """Return the mean over splits of exp(mean_i KL(p_i || mean p)) for logits [N, K].

    splits: the image indices of each split, see `partition`, or a number of runs of equal length. Raises ValueError for
    another shape of logits, or a number of splits outside 1 to N.
    """
    return float(resampled_inception_scores(logits, np.ones((1, len(logits))), splits)[0])


def resampled_inception_scores(
    logits: np.ndarray, counts: np.ndarray, splits: int | list[np.ndarray] | None = None
) -> np.ndarray:
    """Return the scores [R] of resamples in which image i occurs counts[r, i] times, in its own split; counts [R, N].

    If a resample has no image of some split, its mean leaves out that split. Raises ValueError as `inception_score`.
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
