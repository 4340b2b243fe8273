"""Whitened components and reference statistics of real pictures: what ships, and how they are made."""

import numpy as np
import pytest
from safetensors import safe_open

from quest.diffusion.models import EMOJI_LINES, MODELS
from quest.metrics import LITE0, lite0, weights
from quest.metrics.features import extract
from quest.metrics.frechet import load_reference
from quest.runtime.download import sha256_of
from quest.zoo import picture_statistics
from quest.zoo.pictures import Pictures


def test_components_are_fitted_to_training_pictures_and_the_reference_to_others(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (90, 32, 32, 3), np.uint8)
    split = np.array(["train"] * 80 + ["reference"] * 8 + ["evaluation"] * 2)
    shown = Pictures(images, split)
    whitening, said = picture_statistics.components("photos", shown)
    assert said == "80 pictures of the training split of CIFAR-10"
    file = tmp_path / "lite0-photos.safetensors"
    whitening.save(file)
    picture_statistics.reference("photos", shown, file, tmp_path / "photos.npz")
    made = load_reference(tmp_path / "photos.npz")
    monkeypatch.setattr(lite0, "REFERENCE", tmp_path)
    made.check("lite0-photos")
    assert made.features == pytest.approx(extract(images[80:88], "lite0-photos")["pool"], abs=0.02)
    train = extract(images[:80], "lite0-photos")["pool"]
    assert np.allclose(np.cov(train.T), np.eye(64), atol=0.01)


def test_captions_to_sample_with_are_of_the_training_split_and_do_not_repeat(monkeypatch):
    monkeypatch.setattr(picture_statistics, "EMOJI_LINES", {"evaluation": (0, 4), "calibration": (4, 6)})
    captions = [f"noto emoji: {i}" for i in range(12)]
    split = np.array(["train"] * 8 + ["evaluation"] * 4)
    shown = Pictures(np.zeros((12, 64, 64, 3), np.uint8), split, captions=captions, concepts=["a"] * 6 + list("bcdefg"))
    drawn = picture_statistics.captions(shown)
    assert len(set(drawn)) == 6 and set(drawn) <= set(captions[:8])
    assert picture_statistics.captions(Pictures(shown.images, split)) == []


def test_every_split_has_captions_of_its_own():
    model = MODELS["emoji-text"]
    of = {split: model.conditions(split, range(end - start))["prompt"] for split, (start, end) in EMOJI_LINES.items()}
    assert sum(map(len, of.values())) == len(set().union(*of.values()))
    with pytest.raises(ValueError, match="'evaluation' has fewer than 2001 captions"):
        model.conditions("evaluation", [2000])


@pytest.mark.parametrize("name", LITE0)
def test_shipped_reference_belongs_to_the_shipped_components(name):
    kind = name.removeprefix("lite0-")
    made = load_reference(lite0.REFERENCE / f"{kind}.npz")
    made.check(name)
    assert made.metadata["extractor_sha256"] == weights.sha256(name) == sha256_of(lite0.components_file(kind))
    assert made.pool.n == len(made.features) >= 400 and made.features.shape[1] == lite0.COMPONENTS
    # Held-out pictures are distributed nearly as those of the training split, to which the components were fitted.
    assert 0.5 < np.trace(made.pool.cov) / lite0.COMPONENTS < 2
    with safe_open(lite0.components_file(kind), "np") as file:
        assert file.metadata()["network_sha256"] == lite0.SHA256
