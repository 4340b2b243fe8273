"""Coverage is tested where the truth is known; its tolerances are about three binomial standard deviations."""

import numpy as np
import pytest

from quest.metrics import intervals
from quest.metrics.frechet import Statistics, frechet_distance


def covers(interval, truth):
    return interval[0] <= truth <= interval[1]


@pytest.fixture(scope="module")
def gaussian():
    """A Gaussian with falling variances, a reference beside it, and a function that draws n features from the first."""
    d = 12
    scales = np.exp(-np.arange(d) / 4)
    reference = Statistics(np.zeros(d), np.diag((1.2 * scales) ** 2), 10**6)

    def draw(n, rng, shift=0.05):
        return rng.normal(size=(n, d)) * scales + shift

    return draw, reference


def test_counts_are_resamples_with_replacement():
    counts = intervals.resample_counts(50, resamples=400)
    assert counts.shape == (400, 50) and (counts.sum(axis=1) == 50).all()
    assert np.array_equal(counts, intervals.resample_counts(50, resamples=400))
    assert not np.array_equal(counts, intervals.resample_counts(50, resamples=400, seed=1))
    assert counts.mean(axis=0) == pytest.approx(1, abs=0.2)
    # An image is left out of a resample with probability (1 - 1/n)^n.
    assert (counts == 0).mean() == pytest.approx((1 - 1 / 50) ** 50, abs=0.01)


def test_resampled_distances_equal_distances_of_the_resampled_features(gaussian):
    draw, reference = gaussian
    rng = np.random.default_rng(0)
    a, b = draw(80, rng), draw(80, rng, shift=0.2)
    counts = intervals.resample_counts(80, resamples=3)
    to_reference = intervals.resampled_frechet(a, reference, counts)
    between = intervals.resampled_frechet_between(a, b, counts)
    for weight, one, two in zip(counts, to_reference, between, strict=True):
        picked = np.repeat(np.arange(80), weight.astype(int))
        resampled_a, resampled_b = Statistics.from_features(a[picked]), Statistics.from_features(b[picked])
        assert one == pytest.approx(frechet_distance(resampled_a, reference), rel=1e-9)
        assert two == pytest.approx(frechet_distance(resampled_a, resampled_b), rel=1e-9)


def test_frechet_interval_covers_the_expected_distance_at_n(gaussian):
    draw, reference = gaussian
    n, rng = 200, np.random.default_rng(1)
    expected = np.mean([frechet_distance(Statistics.from_features(draw(n, rng)), reference) for _ in range(1500)])
    hits, above = [], []
    for _ in range(200):
        features = draw(n, rng)
        value = frechet_distance(Statistics.from_features(features), reference)
        resampled = intervals.resampled_frechet(features, reference, intervals.resample_counts(n, resamples=100))
        hits.append(covers(intervals.interval(value, resampled), expected))
        above.append(np.mean(resampled) > value)
    assert np.mean(hits) >= 0.91
    # What the module says of percentiles: resampled distances lie above the estimate they come from.
    assert np.mean(above) > 0.99


def test_frechet_interval_is_not_much_too_wide(gaussian):
    draw, reference = gaussian
    n, rng = 200, np.random.default_rng(2)
    values = [frechet_distance(Statistics.from_features(draw(n, rng)), reference) for _ in range(500)]
    resampled = intervals.resampled_frechet(draw(n, rng), reference, intervals.resample_counts(n))
    assert 0.8 < np.std(resampled) / np.std(values) < 1.5


def test_paired_frechet_difference_covers_zero_and_sees_a_shift(gaussian):
    draw, reference = gaussian
    n, rng = 200, np.random.default_rng(3)
    counts = intervals.resample_counts(n, resamples=100)

    def difference(shift):
        common = draw(n, rng)  # what two methods share on the same seeds
        a, b = (common + 0.3 * draw(n, rng, shift=0) for _ in range(2))
        a = a + shift
        value = np.subtract(*(frechet_distance(Statistics.from_features(x), reference) for x in (a, b)))
        resampled = [intervals.resampled_frechet(x, reference, counts) for x in (a, b)]
        paired = intervals.interval(value, resampled[0] - resampled[1])
        unpaired = 1.96 * np.hypot(*np.std(resampled, axis=1, ddof=1))
        return paired, unpaired

    same = [difference(0.0) for _ in range(100)]
    assert np.mean([covers(paired, 0) for paired, _ in same]) >= 0.9
    # Joint resampling is what makes the comparison sharp.
    assert all((paired[1] - paired[0]) / 2 < 0.8 * unpaired for paired, unpaired in same)
    shifted = [difference(0.1)[0] for _ in range(20)]
    assert np.mean([low > 0 for low, _ in shifted]) >= 0.95


@pytest.mark.parametrize("n", [8, 300])
def test_interval_of_a_mean_covers_at_95_percent(n):
    rng = np.random.default_rng(4)
    counts = intervals.resample_counts(n, resamples=400)
    hits = []
    for _ in range(1000):
        values = rng.normal(3, 2, size=n)
        hits.append(covers(intervals.interval(values.mean(), intervals.resampled_means(values, counts), n), 3))
    assert np.mean(hits) == pytest.approx(0.95, abs=0.025)


def test_interval_of_a_mean_of_columns_equals_that_of_each():
    rng = np.random.default_rng(5)
    values, counts = rng.normal(size=(20, 3)), intervals.resample_counts(20)
    low, high = intervals.interval(values.mean(axis=0), intervals.resampled_means(values, counts), 20)
    for column in range(3):
        one = intervals.interval(values[:, column].mean(), intervals.resampled_means(values[:, column], counts), 20)
        assert (low[column], high[column]) == pytest.approx(one)
