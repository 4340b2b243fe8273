import numpy as np
import pytest

from quest.metrics import precision
from quest.metrics.precision import inside


def features(n, seed, shift=0.0):
    return np.random.default_rng(seed).normal(size=(n, 6)) + shift


def test_balls_of_known_points():
    real = np.array([[0.0], [1.0], [3.0]])  # with k = 1, radii 1, 1, 2
    samples = np.array([[-1.0], [-1.1], [4.9], [5.1], [2.05]])
    assert inside(samples, real, k=1).tolist() == [True, False, True, False, True]


def test_equals_torch_fidelity(monkeypatch):
    fidelity = pytest.importorskip("torch_fidelity.metric_prc")
    torch = pytest.importorskip("torch")
    samples, real = features(150, 1, shift=0.8), features(200, 2)
    theirs, _ = fidelity.calculate_precision_recall_full(torch.from_numpy(samples), torch.from_numpy(real))
    ours = inside(samples, real).mean()
    assert 0.05 < ours < 0.95 and ours == pytest.approx(theirs, rel=1e-6)
    monkeypatch.setattr(precision, "BLOCK", 37)
    assert inside(samples, real).mean() == ours


def test_bad_input():
    with pytest.raises(ValueError, match=r"\[N, D\] and \[M, D\], got \(4, 6\) and \(4, 5\)"):
        inside(features(4, 0), features(4, 0)[:, :5])
    with pytest.raises(ValueError, match="3 real images have no 3-th neighbour each; at least 4"):
        inside(features(4, 0), features(3, 0))
