"""Acceptance of a model of real pictures: neighbours, what is asked for, and that copies are noticed."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from quest.metrics import lite0
from quest.zoo import acceptance, neighbours, picture_statistics, pictures


@pytest.fixture(scope="module")
def shown():
    """230 smooth random photographs of three classes, most of them held out."""
    rng = np.random.default_rng(0)
    coarse = torch.from_numpy(rng.random((230, 3, 4, 4), np.float32))
    images = torch.nn.functional.interpolate(coarse, (32, 32), mode="bicubic").clamp(0, 1)
    images = (255 * images).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    split = np.array(["train"] * 90 + ["reference"] * 70 + ["evaluation"] * 70)
    return pictures.Pictures(images, split, labels=np.arange(230) % 3, classes=("cat", "dog", "ship"))


def test_nearest_picture_is_found_also_if_it_is_mirrored(shown):
    training = shown.images[:50]
    asked = np.stack([training[7], training[9][:, ::-1], shown.images[120]])
    distance, index = neighbours.nearest_rms(asked, training, flips=True)
    assert index[:2].tolist() == [7, 9] and distance[:2].max() < 1e-3 < distance[2]
    pixels = asked[2].reshape(16, 2, 16, 2, 3).mean((1, 3)) / 255
    others = [t.reshape(16, 2, 16, 2, 3).mean((1, 3)) / 255 for x in training for t in (x, x[:, ::-1])]
    assert distance[2] == pytest.approx(min(np.sqrt(((pixels - t) ** 2).mean()) for t in others), rel=1e-4)
    assert neighbours.nearest_rms(asked, training)[0][1] > 1e-3


def test_nearest_cosine_does_not_depend_on_length():
    training = np.random.default_rng(0).normal(size=(20, 8))
    cosine, index = neighbours.nearest_cosine(3 * training[[4, 2]], training)
    assert index.tolist() == [4, 2] and cosine == pytest.approx(1)


def test_copies_of_training_pictures_are_noticed(shown, tmp_path, monkeypatch):
    components, _ = picture_statistics.components("photos", shown)
    components.save(tmp_path / "lite0-photos.safetensors")
    picture_statistics.reference("photos", shown, tmp_path / "lite0-photos.safetensors", tmp_path / "photos.npz")
    for module in (lite0, acceptance):
        monkeypatch.setattr(module, "REFERENCE", tmp_path)
    monkeypatch.setattr(pictures, "load", lambda kind, data: shown)
    monkeypatch.setattr(acceptance, "load_pipeline", lambda folder: SimpleNamespace(vae=None))
    monkeypatch.setattr(acceptance, "reconstruct", lambda vae, images: images)
    copies = shown.images[:70]
    monkeypatch.setattr(acceptance, "generate", lambda *arguments: [(None, None, copies)])
    right = iter([np.arange(70) % 2 == 0, np.ones(70, bool), np.ones(70, bool)])
    monkeypatch.setattr(acceptance, "shows", lambda images, asked, judge: next(right))
    numbers, images = acceptance.measure("photos-class", "folder", "data", n=70, judge="folder")
    assert np.array_equal(images, copies) and numbers["protocol"] == "ddim 20, eta 0, guidance 3"
    near = numbers["nearest training pictures"]
    assert near["rms"]["share"] == near["cosine"]["share"] == 1 and near["rms"]["samples"]["nearest"] == 0
    assert near["rms"]["held out"]["nearest"] > 0.01
    assert numbers["distances"]["reconstructions"] == numbers["distances"]["held out"]
    assert numbers["shows what was asked"]["all"] == 0.5 and numbers["good enough"]["class"] is False
    assert set(numbers["shows what was asked"]) == {"all", "cat", "dog", "ship"}
    with pytest.raises(ValueError, match="n: 64; at least 65"):
        acceptance.measure("photos-class", "folder", "data", n=64)
    with pytest.raises(ValueError, match="scenes-text: a model of scenes; this measures models of photos, emoji"):
        acceptance.measure("scenes-text", "folder", "data")


def test_captions_are_trained_ones_and_held_out_ones():
    split = np.array(["train", "train", "evaluation", "evaluation", "reference", "reference"])
    held_out = np.array(["", "", "style", "concept", "style", "concept"])
    captions = ["a", "b", "style", "concept", "never", "never"]
    shown = pictures.Pictures(np.zeros((6, 64, 64, 3), np.uint8), split, captions=captions, held_out=held_out)
    asked, groups = acceptance.conditions(shown, "text", 10)
    assert set(asked[:6]) == {"a", "b"} and asked[6:] == ["style"] * 2 + ["concept"] * 2
    assert groups.tolist() == ["trained"] * 6 + ["held-out style"] * 2 + ["held-out concept"] * 2
