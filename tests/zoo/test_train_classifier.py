"""The classifier of photographs: it learns, and a stopped run resumes to the same weights."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from quest.metrics import classifier
from quest.zoo import train_classifier
from quest.zoo.pictures import Pictures


@pytest.fixture
def shown(monkeypatch):
    """Photographs of two classes: bright at the top, or at the bottom."""
    rng = np.random.default_rng(0)
    labels = np.arange(160) % 2
    images = rng.integers(0, 100, (160, 32, 32, 3))
    images[labels == 0, :16] += 120
    images[labels == 1, 16:] += 120
    split = np.array(["train"] * 120 + ["reference"] * 20 + ["evaluation"] * 20)
    shown = Pictures(images.astype(np.uint8), split, labels=labels, classes=("top", "bottom"))
    monkeypatch.setattr(train_classifier, "photographs", lambda data: shown)
    return shown


def test_it_learns_and_resumes_to_the_same_weights(shown, tmp_path, monkeypatch):
    assert train_classifier.train(None, tmp_path / "whole", 2, batch=40, save_every=2) == 1
    with monkeypatch.context() as patch:
        save = train_classifier.save_checkpoint

        def stop(*arguments):
            save(*arguments)
            raise KeyboardInterrupt

        patch.setattr(train_classifier, "save_checkpoint", stop)
        with pytest.raises(KeyboardInterrupt):
            train_classifier.train(None, tmp_path / "resumed", 2, batch=40, save_every=2)
    train_classifier.train(None, tmp_path / "resumed", 2, batch=40, save_every=2)
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "resumed"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    net = classifier.load(tmp_path / "whole")
    images = torch.from_numpy(shown.images[120:]).permute(0, 3, 1, 2)
    assert classifier.logits(net, images).argmax(1).tolist() == shown.labels[120:].tolist()
    for filter in (p for p in net.groups.parameters() if p.ndim == 4):  # Muon moves a filter of norm sqrt(O)
        assert filter.norm() == pytest.approx(len(filter) ** 0.5, rel=0.5)


def test_moved_images_are_parts_of_the_padded_ones():
    padded = torch.arange(2 * 3 * 40 * 40).reshape(2, 3, 40, 40)
    cut = train_classifier.moved(padded, torch.Generator().manual_seed(0))
    for image, whole in zip(cut, padded, strict=True):
        places = [(y, x) for y in range(9) for x in range(9) if torch.equal(whole[:, y : y + 32, x : x + 32], image)]
        assert len(places) == 1


def test_a_square_of_each_image_is_lost():
    images = torch.ones(40, 3, 32, 32)
    lost = train_classifier.with_hole(images, torch.Generator().manual_seed(0)) == 0
    assert (lost.sum((1, 2, 3)) == 3 * 12 * 12).all()
    assert all((one.sum(0) == 12).sum() == 12 and (one.sum(1) == 12).sum() == 12 for one in lost[:, 0])
    assert len({tuple(one.flatten().tolist()) for one in lost[:, 0]}) > 30  # at places of their own


def test_whitened_patches_have_unit_covariance(shown):
    net = classifier.PhotoNet(("top", "bottom"))
    x = torch.from_numpy(shown.images).permute(0, 3, 1, 2).float() / 127.5 - 1
    train_classifier.initialize(net, x)
    with torch.no_grad():
        whitened = net.whiten(x)[:, :12].permute(1, 0, 2, 3).flatten(1)
    assert torch.allclose(torch.cov(whitened), torch.eye(12), atol=0.05)


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match="PhotoNet takes"):
        classifier.PhotoNet(("a", "b"))(torch.zeros(1, 3, 64, 64))
