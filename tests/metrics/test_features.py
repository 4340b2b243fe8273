import numpy as np
import pytest
import torch

from quest.metrics import features
from quest.metrics.clip_score import clip_scores
from quest.metrics.features import extract
from quest.zoo import ZOO


class MeanColour(torch.nn.Module):
    """An extractor whose features are plain to see: the mean of each channel, in [-1, 1]."""

    def forward(self, x):
        mean = x.mean(dim=(2, 3))
        return {"pool": mean, "spatial": x[:, 0, :2, :2].flatten(1), "logits": 2 * mean, "size": mean}


@pytest.fixture(autouse=True)
def mean_colour(monkeypatch):
    monkeypatch.setitem(features.EXTRACTORS, "mean-colour", MeanColour)


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, size=(7, 16, 16, 3), dtype=np.uint8)


def tiny_clip():
    """open_clip's own model class and preprocessing, with random weights and a tokenizer of single letters."""
    import open_clip
    from open_clip.transform import image_transform

    torch.manual_seed(0)
    vision = open_clip.CLIPVisionCfg(layers=1, width=64, head_width=32, patch_size=8, image_size=16)
    text = open_clip.CLIPTextCfg(context_length=8, vocab_size=128, width=32, heads=2, layers=1)
    model = open_clip.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text).eval()

    def tokenizer(captions):
        codes = [[min(ord(letter), 126) for letter in caption[:7]] for caption in captions]
        return torch.tensor([row + [127] + [0] * (7 - len(row)) for row in codes])

    return model, image_transform(16, is_train=False), tokenizer


def test_pixels_reach_the_extractor_in_minus_one_to_one(images):
    got = extract(images, "mean-colour")
    assert set(got) == {"pool", "spatial", "logits"}
    assert all(value.dtype == np.float32 for value in got.values())
    expected = images.astype(np.float64).mean(axis=(1, 2)) / 127.5 - 1
    assert got["pool"] == pytest.approx(expected, abs=1e-6) and got["logits"] == pytest.approx(2 * expected, abs=1e-6)
    extremes = np.stack([np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 255, np.uint8)])
    assert extract(extremes, "mean-colour")["pool"][:, 0].tolist() == [-1, 1]


def test_batches_change_nothing(images, monkeypatch):
    monkeypatch.setitem(features.CLIPS, "tiny", tiny_clip)
    captions = list("abcdefg")
    whole = extract(images, "mean-colour", "tiny", captions)
    monkeypatch.setattr(features, "BATCH", 3)
    for name, value in extract(images, "mean-colour", "tiny", captions).items():
        assert value == pytest.approx(whole[name], abs=1e-5), name


def test_clip_features_are_normalised_and_those_of_each_image_and_caption(images, monkeypatch):
    monkeypatch.setitem(features.CLIPS, "tiny", tiny_clip)
    captions = ["a red disc", "b", "c", "d", "e", "f", "a blue star"]
    got = extract(images, "mean-colour", "tiny", captions)
    assert got["clip_image"].shape == got["clip_text"].shape == (7, 16)
    assert np.linalg.norm(got["clip_image"], axis=1) == pytest.approx(np.ones(7), abs=1e-5)
    assert np.linalg.norm(got["clip_text"], axis=1) == pytest.approx(np.ones(7), abs=1e-5)
    last = extract(images[6:], "mean-colour", "tiny", captions[6:])
    assert last["clip_image"][0] == pytest.approx(got["clip_image"][6], abs=1e-5)
    assert last["clip_text"][0] == pytest.approx(got["clip_text"][6], abs=1e-5)


def test_bad_input(images, monkeypatch):
    monkeypatch.setitem(features.CLIPS, "tiny", tiny_clip)
    with pytest.raises(ValueError, match="extractor: 'inception' is not one of scenes, mean-colour"):
        extract(images, "inception")
    with pytest.raises(ValueError, match="clip: 'ViT-B-16' is not one of scenes-clip, tiny"):
        extract(images, "mean-colour", "ViT-B-16", ["a"] * 7)
    with pytest.raises(ValueError, match=r"uint8 array \[N, H, W, 3\], got float32 \(7, 16, 16, 3\)"):
        extract(images.astype(np.float32), "mean-colour")
    with pytest.raises(ValueError, match=r"got uint8 \(7, 3, 16, 16\)"):
        extract(images.transpose(0, 3, 1, 2), "mean-colour")
    with pytest.raises(ValueError, match="6 captions for 7 images"):
        extract(images, "mean-colour", "tiny", ["a"] * 6)
    with pytest.raises(ValueError, match="0 captions for 7 images"):
        extract(images, "mean-colour", "tiny")


@pytest.mark.skipif(not (ZOO / "scenes-extractor").is_dir(), reason="no trained extractor in this checkout")
def test_scenes_extractor_sees_what_is_drawn():
    from quest.zoo.scenes import draw

    scenes = draw("validation", 100)
    got = extract(scenes.images(), "scenes")
    assert got["pool"].shape == (100, 64) and got["spatial"].shape == (100, 112) and got["logits"].shape == (100, 48)
    assert (got["logits"].argmax(axis=1) == scenes.labels()).mean() >= 0.85


@pytest.mark.skipif(not (ZOO / "scenes-clip").is_dir(), reason="no trained image-text model in this checkout")
def test_scenes_clip_prefers_the_right_caption():
    from quest.zoo.scenes import draw

    scenes = draw("validation", 100)
    got = extract(scenes.images(), "scenes", "scenes-clip", scenes.captions())
    right = clip_scores(got["clip_image"], got["clip_text"])
    wrong = clip_scores(got["clip_image"], np.roll(got["clip_text"], 1, axis=0))
    assert (right > wrong).mean() > 0.8
