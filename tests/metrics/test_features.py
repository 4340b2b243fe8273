import json

import numpy as np
import pytest
import torch

from quest.diffusion.models import ZOO
from quest.metrics import features, weights
from quest.metrics.classifier import PhotoNet
from quest.metrics.features import extract
from quest.metrics.per_image import clip_scores


class MeanColour(torch.nn.Module):
    """An extractor whose features are plain to see: the mean of each channel, in [-1, 1]."""

    def forward(self, images):
        assert images.dtype == torch.uint8
        x = images / 127.5 - 1
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


def test_pixels_reach_the_extractor_channels_first(images):
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


def test_class_logits_are_those_of_an_image_and_its_mirror_image(monkeypatch):
    torch.manual_seed(0)
    net = PhotoNet(("a", "b", "c"), widths=(8, 8, 8)).eval()
    monkeypatch.setitem(features.CLASSIFIERS, "random", lambda: net)
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), np.uint8)
    got = features.class_logits(images, "random", batch=2)
    x = torch.from_numpy(images / 127.5 - 1).float().permute(0, 3, 1, 2)
    expected = (net(x) + net(x.flip(3))) / 2
    assert got.dtype == np.float32 and got == pytest.approx(expected.detach().numpy(), abs=1e-5)
    with pytest.raises(ValueError, match="classifier: 'other' is not one of photos-classifier, random"):
        features.class_logits(images, "other")


def test_bad_input(images, monkeypatch):
    monkeypatch.setitem(features.CLIPS, "tiny", tiny_clip)
    with pytest.raises(ValueError, match="'inception' is not one of scenes, lite0-photos, .*, clean, mean-colour"):
        extract(images, "inception")
    with pytest.raises(ValueError, match="clip: 'ViT-H-14' is not one of scenes-clip, emoji-clip, ViT-B-16, tiny"):
        extract(images, "mean-colour", "ViT-H-14", ["a"] * 7)
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
    from quest.diffusion.scenes import draw

    scenes = draw("validation", 100)
    got = extract(scenes.images(), "scenes")
    assert got["pool"].shape == (100, 64) and got["spatial"].shape == (100, 112) and got["logits"].shape == (100, 48)
    assert (got["logits"].argmax(axis=1) == scenes.labels()).mean() >= 0.85


@pytest.mark.skipif(not (ZOO / "scenes-clip").is_dir(), reason="no trained image-text model in this checkout")
def test_scenes_clip_prefers_the_right_caption():
    from quest.diffusion.scenes import draw

    scenes = draw("validation", 100)
    got = extract(scenes.images(), "scenes", "scenes-clip", scenes.captions())
    right = clip_scores(got["clip_image"], got["clip_text"])
    wrong = clip_scores(got["clip_image"], np.roll(got["clip_text"], 1, axis=0))
    assert (right > wrong).mean() > 0.8


@pytest.fixture
def small_vit(tmp_path, monkeypatch):
    """A small model of ViT-B/16's kind among open_clip's configs, and its random weights."""
    import open_clip

    config = {
        "embed_dim": 16,
        "quick_gelu": True,
        "vision_cfg": {"layers": 1, "width": 64, "head_width": 32, "patch_size": 16, "image_size": 32},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    }
    (tmp_path / "small-vit.json").write_text(json.dumps(config), encoding="utf-8")
    open_clip.add_model_config(tmp_path / "small-vit.json")
    torch.manual_seed(0)
    model = open_clip.create_model("small-vit", load_weights=False).eval()
    return model, tmp_path


class Archive(torch.nn.Module):
    """Holds tensors under dotted names, as scripted models do."""

    def __init__(self, tensors):
        super().__init__()
        for name, tensor in tensors.items():
            owner, _, last = name.rpartition(".")
            module = self
            for part in filter(None, owner.split(".")):
                if part not in module._modules:
                    module.add_module(part, Archive({}))
                module = module._modules[part]
            module.register_buffer(last, tensor)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_clip_weights_of_any_kind_give_the_models_embeddings(small_vit, images):
    from safetensors.torch import save_file

    model, folder = small_vit
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "weights.safetensors")
    torch.save(state, folder / "weights.pt")
    # As OpenAI ships its models: half precision, scripted, with three settings among the tensors.
    half = {name: tensor.half() for name, tensor in state.items()} | {"context_length": torch.tensor(77)}
    torch.jit.save(torch.jit.script(Archive(half)), folder / "archive.pt")
    captions = ["a photo of a cat"] * 6 + ["two dogs"]
    monkey = pytest.MonkeyPatch()
    got = {}
    for file in ("weights.safetensors", "weights.pt", "archive.pt"):
        monkey.setitem(features.CLIPS, "small", lambda file=file: features.load_clip("small-vit", folder / file))
        got[file] = extract(images, "mean-colour", "small", captions)
    monkey.undo()
    loaded, preprocess, tokenizer = features.load_clip("small-vit", folder / "weights.pt")
    with torch.no_grad():
        text = model.encode_text(tokenizer(captions), normalize=True)
    assert got["weights.pt"]["clip_text"] == pytest.approx(text.numpy(), abs=1e-6)
    assert np.array_equal(got["weights.pt"]["clip_image"], got["weights.safetensors"]["clip_image"])
    assert got["archive.pt"]["clip_image"] == pytest.approx(got["weights.pt"]["clip_image"], abs=5e-3)
    # Preprocessing is OpenAI's: bicubic to the model's size, their mean and deviation.
    assert "bicubic" in str(preprocess) and "0.48145466" in str(preprocess)


def test_clip_weights_that_are_none(small_vit):
    model, folder = small_vit
    (folder / "text.pt").write_text("hello", encoding="utf-8")
    with pytest.raises(ValueError, match="text.pt: neither tensors nor a TorchScript archive"):
        features.load_clip("small-vit", folder / "text.pt")
    torch.save({"visual.proj": torch.zeros(64, 16)}, folder / "part.pt")
    with pytest.raises(ValueError, match="part.pt: not weights of small-vit: .*Missing key"):
        features.load_clip("small-vit", folder / "part.pt")


def test_without_weights_the_error_says_what_to_put_where(images, tmp_path, monkeypatch):
    def refused(url, *_, **__):
        raise OSError("no route to host")

    monkeypatch.setenv("QUEST_WEIGHTS", str(tmp_path))
    monkeypatch.setattr("quest.runtime.download.urllib.request.urlopen", refused)
    monkeypatch.setattr("quest.runtime.download.time.sleep", lambda seconds: None)
    with pytest.raises(OSError, match=rf"no route.*put it at {tmp_path}/weights-inception-2015-12-05-6726825d.pth"):
        extract(images, "adm")
    with pytest.raises(OSError, match=rf"put it at {tmp_path}/ViT-B-16.pt \(SHA-256 5806e77c"):
        extract(images, "mean-colour", "ViT-B-16", ["a"] * 7)
    (tmp_path / "weights-inception-2015-12-05-6726825d.pth").write_bytes(b"half of it")
    with pytest.raises(ValueError, match=r"6726825d.pth \(10 bytes\): SHA-256 is .*truncated or another file"):
        extract(images, "adm")


def test_hashes_of_networks():
    assert weights.sha256("ViT-B-16").startswith("5806e77c") and weights.sha256(None) is None
    assert len(weights.sha256("scenes")) == 64 and weights.sha256("adm") == weights.sha256("clean")
    assert weights.sha256("adm").startswith("6726825d")
    assert weights.sha256("photos-classifier") == weights.sha256_of(ZOO / "photos-classifier" / "model.safetensors")
