"""KID: equal to torchmetrics', unbiased, and resampled as if rows were repeated."""

import numpy as np
import pytest
import torch
from torchmetrics.image.kid import poly_mmd

from quest.metrics import kernel_distance as module
from quest.metrics.intervals import resample_counts
from quest.metrics.kernel_distance import kernel_distance, mean_of_pairs, resampled_kernel_distances


def draw(seed, n, shift=0.0):
    return np.random.default_rng(seed).normal(shift, 1, (n, 8))


def test_equals_torchmetrics():
    x, y = draw(0, 50, 0.3), draw(1, 50)  # theirs needs equal sizes
    theirs = poly_mmd(torch.from_numpy(x), torch.from_numpy(y)).item()
    assert kernel_distance(x, y) == pytest.approx(theirs, rel=1e-9)


def test_mean_of_pairs_does_not_depend_on_blocks():
    x = draw(0, 1100)
    matrix = (x @ x.T / 8 + 1) ** 3
    assert mean_of_pairs(x) == pytest.approx((matrix.sum() - np.trace(matrix)) / (1100 * 1099), rel=1e-9)


def test_is_unbiased():
    values = [kernel_distance(draw(2 * s, 20), draw(2 * s + 1, 30)) for s in range(400)]
    assert abs(np.mean(values)) < 3 * np.std(values) / 20
    assert np.mean([kernel_distance(draw(2 * s, 20, 0.5), draw(2 * s + 1, 30)) for s in range(40)]) > np.std(values)


def test_resampling_counts_pairs_of_different_images_only():
    x, y = draw(0, 6), draw(1, 9)
    counts = np.array([[1, 1, 1, 1, 1, 1], [2, 0, 1, 3, 0, 0]], np.float64)
    got = resampled_kernel_distances(x, y, counts)
    assert got[0] == pytest.approx(kernel_distance(x, y))
    rows = np.repeat(np.arange(6), counts[1].astype(int))
    different = [(a, b) for i, a in enumerate(rows) for j, b in enumerate(rows) if i != j and a != b]
    pairs = np.mean([(x[a] @ x[b] / 8 + 1) ** 3 for a, b in different])
    cross = np.mean([(x[a] @ b / 8 + 1) ** 3 for a in rows for b in y])
    assert got[1] == pytest.approx(pairs + mean_of_pairs(y) - 2 * cross)


def test_distances_do_not_depend_on_blocks(monkeypatch):
    x, y, counts = draw(0, 30), draw(1, 9), resample_counts(30, 5)
    whole = resampled_kernel_distances(x, y, counts)
    monkeypatch.setattr(module, "BLOCK", 7)
    assert resampled_kernel_distances(x, y, counts) == pytest.approx(whole, rel=1e-12)


def test_spread_of_resamples_is_that_of_repeated_draws():
    y = draw(9, 400)
    repeated = np.std([kernel_distance(draw(s, 60, 0.3), y) for s in range(200)])
    resampled = [np.std(resampled_kernel_distances(draw(s, 60, 0.3), y, resample_counts(60))) for s in range(20)]
    assert 0.8 < np.mean(resampled) / repeated < 1.3


def test_bad_features():
    with pytest.raises(ValueError, match=r"at least 2, got \(1, 8\)"):
        kernel_distance(draw(0, 1), draw(1, 5))
    with pytest.raises(ValueError, match="not finite"):
        kernel_distance(draw(0, 5) * np.nan, draw(1, 5))
