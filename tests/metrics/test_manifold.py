"""Precision and recall by balls around nearest neighbours."""

import numpy as np
import pytest

from quest.metrics import manifold
from quest.metrics.manifold import inside, recall


def features(n, seed, shift=0.0, columns=6):
    return np.random.default_rng(seed).normal(size=(n, columns)) + shift


def test_precision_counts_balls_of_known_points():
    real = np.array([[0.0], [1.0], [3.0]])  # with k = 1, radii 1, 1, 2
    samples = np.array([[-1.0], [-1.1], [4.9], [5.1], [2.05]])
    assert inside(samples, real, k=1).tolist() == [True, False, True, False, True]


def test_recall_counts_balls_around_samples():
    samples, real = np.array([[0.0], [1.0], [3.0], [10.0]]), np.array([[-1.1], [-0.9], [4.9], [5.1], [2.05]])
    value, halves = recall(samples, real, halves=30, k=1)  # radii 1, 1, 2, 7
    assert value == 0.8 and len(halves) == 30
    # Half of them: two samples, each with a ball to the other one.
    pairs = [(0, 1), (0, 3), (0, 10), (1, 3), (1, 10), (3, 10)]
    possible = {float(np.mean([min(abs(x - a), abs(x - b)) <= b - a for x in real[:, 0]])) for a, b in pairs}
    assert set(halves) <= possible and len(set(halves)) > 1


def test_precision_and_recall_equal_torch_fidelity(monkeypatch):
    fidelity = pytest.importorskip("torch_fidelity.metric_prc")
    torch = pytest.importorskip("torch")
    samples, real = features(150, 1, shift=0.8), features(200, 2)
    theirs = fidelity.calculate_precision_recall_full(torch.from_numpy(samples), torch.from_numpy(real))
    ours = inside(samples, real).mean(), recall(samples, real, halves=2)[0]
    assert 0.05 < min(ours) and max(ours) < 0.95 and ours == pytest.approx(theirs[:2], rel=1e-6)
    monkeypatch.setattr(manifold, "BLOCK", 37)
    assert (inside(samples, real).mean(), recall(samples, real, halves=2)[0]) == ours


def test_the_spread_of_halves_is_that_of_the_value_over_new_samples():
    real = features(300, 0, columns=3)
    found = [recall(features(200, seed, 0.7, columns=3), real, halves=40) for seed in range(1, 41)]
    true = np.std([value for value, _ in found], ddof=1)
    estimated = np.mean([np.std(halves, ddof=1) for _, halves in found])
    assert 0.75 < estimated / true < 1.6, (estimated, true)


def test_bad_features():
    with pytest.raises(ValueError, match=r"\[N, D\] and \[M, D\], got \(4, 6\) and \(4, 5\)"):
        inside(features(4, 0), features(4, 0)[:, :5])
    with pytest.raises(ValueError, match="3 real images have no 3-th neighbour each; at least 4"):
        inside(features(4, 0), features(3, 0))
    with pytest.raises(ValueError, match="7 samples: half of them have no 3-th neighbour each; needed: 8"):
        recall(features(7, 0), features(9, 0), halves=2)
