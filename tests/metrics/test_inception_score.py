import numpy as np
import pytest

from quest.metrics.inception_score import default_splits, inception_score, partition, resampled_inception_scores
from quest.metrics.intervals import resample_counts


def test_one_for_images_that_say_nothing():
    assert inception_score(np.zeros((100, 48))) == pytest.approx(1, abs=1e-12)
    # Sure of the class, but always the same one.
    assert inception_score(np.tile([40.0, 0, 0, 0], (100, 1))) == pytest.approx(1, abs=1e-9)


def test_number_of_classes_for_sure_and_even_ones():
    assert inception_score(np.tile(np.eye(48) * 100, (10, 1))) == pytest.approx(48, rel=1e-9)


@pytest.mark.parametrize("splits", [1, 10])
def test_equals_torchmetrics(splits):
    torch = pytest.importorskip("torch")
    from torchmetrics.image.inception import InceptionScore

    logits = np.random.default_rng(0).normal(size=(500, 48)).astype(np.float32) * 3
    metric = InceptionScore(feature=torch.nn.Flatten(), splits=splits)
    metric.features = [torch.from_numpy(logits).double()]
    torch.manual_seed(0)
    order = torch.randperm(500)  # torchmetrics shuffles before it splits
    torch.manual_seed(0)
    assert inception_score(logits[order], splits) == pytest.approx(metric.compute()[0].item(), rel=1e-9)


def test_equals_torch_fidelity():
    fidelity = pytest.importorskip("torch_fidelity.metric_isc")
    torch = pytest.importorskip("torch")
    logits = np.random.default_rng(0).normal(size=(500, 48)) * 3
    theirs = fidelity.isc_features_to_metric(torch.from_numpy(logits), splits=10, shuffle=False)
    assert inception_score(logits, 10) == pytest.approx(theirs["inception_score_mean"], rel=1e-9)


def test_equals_torch_fidelity_as_it_shuffles():
    fidelity = pytest.importorskip("torch_fidelity.metric_isc")
    torch = pytest.importorskip("torch")
    logits = np.random.default_rng(0).normal(size=(503, 48)) * 3
    theirs = fidelity.isc_features_to_metric(torch.from_numpy(logits))  # its defaults
    ours = inception_score(logits, partition(503, "torch-fidelity"))
    assert ours == pytest.approx(theirs["inception_score_mean"], rel=1e-9)
    assert ours != pytest.approx(inception_score(logits, 10), rel=1e-6)


def test_partition_of_adm_is_runs_of_5000():
    parts = partition(12_000, "adm")
    assert [(part[0], part[-1]) for part in parts] == [(0, 4999), (5000, 9999), (10_000, 11_999)]
    assert len(partition(50_000, "adm")) == 10 and len(partition(500, "scenes")) == 1


@pytest.mark.parametrize("splits", [1, 4])
def test_resampled_scores_equal_scores_of_the_resampled_logits(splits):
    logits = np.random.default_rng(1).normal(size=(80, 6)) * 2
    counts = resample_counts(80, resamples=3)
    scores = resampled_inception_scores(logits, counts, splits)
    for weight, score in zip(counts, scores, strict=True):
        parts = [part[weight[part] > 0] for part in np.array_split(np.arange(80), splits)]
        parts = [np.repeat(part, weight[part].astype(int)) for part in parts]
        assert score == pytest.approx(np.mean([inception_score(logits[part], 1) for part in parts]), rel=1e-9)


def test_default_splits():
    assert [default_splits(n) for n in (1, 500, 9999, 10_000, 50_000, 100_000)] == [1, 1, 1, 2, 10, 10]


def test_bad_input():
    with pytest.raises(ValueError, match=r"\[N, K\], got shape \(10,\)"):
        inception_score(np.zeros(10))
    with pytest.raises(ValueError, match="between 1 and the number of images, 10; got 11"):
        inception_score(np.zeros((10, 3)), splits=11)
