import numpy as np
import pytest

from quest.diffusion.models import SCENES
from quest.metrics.frechet import (
    Reference,
    Statistics,
    fid_infinity,
    floor,
    frechet_distance,
    load_reference,
    save_reference,
)


def features(n, d, seed=0, shift=0.0):
    """Correlated, skewed, non-negative features such as average pooling after a ReLU gives."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).normal(size=(d, d)) / np.sqrt(d)
    return np.maximum(rng.normal(size=(n, d)) @ mixing + 0.3 + shift, 0).astype(np.float32)


def test_distance_of_a_set_to_itself_is_zero():
    a = Statistics.from_features(features(500, 64))
    assert frechet_distance(a, a) < 1e-9 * np.trace(a.cov)


def test_known_gaussians():
    d, n = 8, 1000
    narrow = Statistics(np.zeros(d), np.diag(np.arange(1, d + 1) ** 2), n)
    wide = Statistics(np.full(d, 0.5), np.diag((np.arange(1, d + 1) + 3) ** 2), n)
    # Diagonal covariances: |mean difference|^2 + sum of (standard deviation difference)^2.
    assert frechet_distance(narrow, wide) == pytest.approx(d * 0.25 + d * 9, rel=1e-12)
    assert frechet_distance(wide, narrow) == pytest.approx(frechet_distance(narrow, wide), rel=1e-12)


def test_rotating_both_sets_changes_nothing():
    a, b = features(300, 16, 1), features(300, 16, 2, shift=0.2)
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(16, 16)))[0]
    turned = frechet_distance(Statistics.from_features(a @ rotation), Statistics.from_features(b @ rotation))
    assert turned == pytest.approx(frechet_distance(*map(Statistics.from_features, (a, b))), rel=1e-6)


@pytest.mark.parametrize("n, d", [(500, 64), (500, 112), (2000, 7)])
def test_equals_clean_fid_and_torchmetrics(n, d):
    fid = pytest.importorskip("cleanfid.fid")
    torch = pytest.importorskip("torch")
    from torchmetrics.image.fid import _compute_fid

    a, b = Statistics.from_features(features(n, d, 1)), Statistics.from_features(features(2 * n, d, 2, shift=0.1))
    ours = frechet_distance(a, b)
    assert ours == pytest.approx(fid.frechet_distance(a.mean, a.cov, b.mean, b.cov), rel=1e-6)
    theirs = _compute_fid(*(torch.from_numpy(x) for x in (a.mean, a.cov, b.mean, b.cov)))
    assert ours == pytest.approx(theirs.item(), rel=1e-6)


@pytest.mark.parametrize("n", [300, 40])
def test_equals_torch_fidelity(n):
    fidelity = pytest.importorskip("torch_fidelity.metric_fid")
    torch = pytest.importorskip("torch")
    a, b = features(n, 64, 1), features(900, 64, 2, shift=0.1)
    theirs = [fidelity.fid_features_to_statistics(torch.from_numpy(x.astype(np.float64))) for x in (a, b)]
    theirs = fidelity.fid_statistics_to_metric(*theirs, verbose=False)["frechet_inception_distance"]
    assert frechet_distance(*map(Statistics.from_features, (a, b))) == pytest.approx(theirs, rel=1e-6)


def test_any_root_gives_the_same_distance():
    a, b = Statistics.from_features(features(300, 32, 1)), Statistics.from_features(features(300, 32, 2, shift=0.1))
    values, vectors = np.linalg.eigh(b.cov)
    symmetric = Statistics(b.mean, b.cov, b.n)
    object.__setattr__(symmetric, "root", (vectors * np.sqrt(values)) @ vectors.T)
    assert np.tril(b.root).tolist() == b.root.tolist() and b.root is b.root
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(a, symmetric), rel=1e-10)


def test_small_variances_count():
    # Commuting covariances whose product spans 24 orders of magnitude: the distance is known in closed form.
    d = 400
    scales = np.logspace(0, -6, d)
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(d, d)))[0]
    a, b = (Statistics(np.zeros(d), (rotation * s**2) @ rotation.T, 10**6) for s in (scales, 1.1 * scales))
    assert frechet_distance(a, b) == pytest.approx(((0.1 * scales) ** 2).sum(), rel=1e-9)


def test_infinity_takes_the_bias_of_n_off():
    d = 8
    reference = Statistics(np.zeros(d), np.eye(d), 10**6)
    drawn = np.random.default_rng(0).normal(size=(20_000, d)) * 1.1  # the distance of the truth is d * 0.01
    finite = frechet_distance(Statistics.from_features(drawn), reference)
    infinite = fid_infinity(drawn, reference)
    assert infinite == fid_infinity(drawn, reference)
    # On a line a + c / n, the distance at n lies above its end by c / n; c is taken from a second point.
    at_5000 = np.mean([frechet_distance(Statistics.from_features(p), reference) for p in np.split(drawn, 4)])
    assert infinite == pytest.approx(finite - (at_5000 - finite) / 3, abs=3e-3) and infinite < finite < at_5000
    with pytest.raises(ValueError, match="at least 10000 needed, got 9999"):
        fid_infinity(drawn[:9999], reference)


def test_covariance_is_the_unbiased_one():
    x = features(50, 5)
    statistics = Statistics.from_features(x)
    np.testing.assert_allclose(statistics.cov, np.cov(x.astype(np.float64), rowvar=False), rtol=1e-12)
    assert statistics.cov.dtype == np.float64 and statistics.n == 50


def test_fewer_images_than_dimensions_is_flagged_and_still_computed():
    few, many = Statistics.from_features(features(40, 64)), Statistics.from_features(features(65, 64))
    assert few.singular and not many.singular
    # Dead features (a constant channel) and missing rank give no NaN and no spurious distance.
    assert frechet_distance(few, few) < 1e-9 * np.trace(few.cov)
    dead = features(100, 64)
    dead[:, :10] = 0
    assert frechet_distance(*[Statistics.from_features(dead)] * 2) < 1e-9 * np.trace(many.cov)


def test_reference_round_trip(tmp_path):
    pool, spatial = Statistics.from_features(features(200, 6)), Statistics.from_features(features(200, 9))
    save_reference(tmp_path / "reference.npz", pool, spatial, {"split": "reference", "start": 0})
    loaded = load_reference(tmp_path / "reference.npz")
    assert np.array_equal(loaded.pool.mean, pool.mean) and np.array_equal(loaded.spatial.cov, spatial.cov)
    assert loaded.pool.n == 200 and loaded.metadata == {"split": "reference", "start": 0}


def test_reference_of_another_extractor_is_refused(tmp_path):
    pool, spatial = Statistics.from_features(features(200, 6)), Statistics.from_features(features(200, 9))
    save_reference(tmp_path / "bedrooms.npz", pool, spatial, {"extractor": "clean"}, features(50, 6))
    loaded = load_reference(tmp_path / "bedrooms.npz")
    assert np.array_equal(loaded.features, features(50, 6))
    loaded.check("clean")
    with pytest.raises(ValueError, match="bedrooms.npz: statistics of clean, the cell has features of adm; make them"):
        loaded.check("adm", "bedrooms.npz")
    save_reference(tmp_path / "bedrooms.npz", pool, spatial, {})
    with pytest.raises(ValueError, match="reference: statistics of an unnamed extractor"):
        load_reference(tmp_path / "bedrooms.npz").check("adm")


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match=r"\[N, D\] with N >= 2.*\(1, 4\)"):
        Statistics.from_features(np.zeros((1, 4)))
    with pytest.raises(ValueError, match="1 values that are not finite"):
        Statistics.from_features(np.array([[0.0, np.nan], [0.0, 1.0]]))
    a, b = Statistics.from_features(features(20, 4)), Statistics.from_features(features(20, 5))
    with pytest.raises(ValueError, match="4 and 5 dimensions"):
        frechet_distance(a, b)
    np.savez(tmp_path / "other.npz", pool_mean=np.zeros(3), n=3)
    with pytest.raises(ValueError, match=r"other.npz: .* lack metadata, pool_cov, spatial_cov, spatial_mean"):
        load_reference(tmp_path / "other.npz")
    np.savez(tmp_path / "adm.npz", mu=np.zeros(3), sigma=np.eye(3))  # as the guided-diffusion evaluator publishes them
    with pytest.raises(ValueError, match="adm.npz: .* lack .*; `python -m workflow.scripts.reference .*adm.npz -o NEW"):
        load_reference(tmp_path / "adm.npz")
    (tmp_path / "text.npz").write_text("hello", encoding="utf-8")
    with pytest.raises(ValueError, match="text.npz: not an .npz file"):
        load_reference(tmp_path / "text.npz")


def test_statistics_of_other_weights_of_a_network_are_refused():
    shipped = load_reference(SCENES)
    shipped.check("scenes")
    other = Reference(shipped.pool, shipped.spatial, shipped.metadata | {"extractor_sha256": "0" * 64})
    with pytest.raises(ValueError, match="scenes.npz: statistics of other weights of scenes"):
        other.check("scenes", "scenes.npz")


def test_the_floor_is_the_distance_of_two_independent_sets():
    rng = np.random.default_rng(0)
    scales = np.linspace(1, 3, 16)

    def draw():
        return rng.normal(size=(400, 16)) * scales

    apart = [frechet_distance(Statistics.from_features(draw()), Statistics.from_features(draw())) for _ in range(40)]
    mean, deviation = floor(draw())
    assert mean == pytest.approx(np.mean(apart), rel=0.2) and 0 < deviation < mean
    assert floor(draw()[:33]) is None  # halves of 16 images have no covariance of full rank
