"""The shipped weights do what their READMEs say, on scenes they were not trained on."""

import dataclasses
import hashlib

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from quest.diffusion import scenes
from quest.diffusion.models import MODELS, ZOO
from quest.diffusion.sampling import generate
from quest.metrics import clip, extractor
from quest.metrics.features import class_logits
from quest.metrics.frechet import Statistics, frechet_distance, load_reference
from quest.zoo.latents import posterior_means
from quest.zoo.train_autoencoder import to_tensor
from quest.zoo.train_extractor import accuracy, reconstruct

DENOISERS = ["scenes-text", "scenes-class", "scenes-uncond"]


@pytest.fixture(scope="module")
def pipelines():
    return {name: MODELS[name].load() for name in DENOISERS}


@pytest.fixture(scope="module")
def unseen():
    drawn = scenes.draw("validation", 300, start=5000)
    return drawn, drawn.images()


@pytest.fixture(scope="module")
def net():
    return extractor.load()


def test_weights_are_small_and_half_precision():
    assert sum(f.lstat().st_size for f in ZOO.parent.rglob("*") if f.is_file()) < 80e6  # a link takes nothing
    for file in ZOO.rglob("*.safetensors"):
        assert {x.dtype for x in load_file(file).values() if x.is_floating_point()} == {torch.float16}, file


def test_denoisers_share_one_autoencoder():
    files = {(ZOO / name / "vae" / "diffusion_pytorch_model.safetensors").resolve() for name in DENOISERS}
    assert len(files) == 1  # the others are links


def test_latents_have_zero_mean_and_unit_variance(pipelines, unseen):
    vae = pipelines["scenes-text"].vae
    z = posterior_means(vae, unseen[1])
    assert vae.config.scaling_factor == 1.0
    assert z.mean((0, 2, 3)).abs().max() < 0.15 and (z.std((0, 2, 3)) - 1).abs().max() < 0.15


def test_extractor_knows_unseen_scenes(net, unseen, pipelines):
    drawn, images = unseen
    wanted = extractor.targets(drawn)
    assert accuracy(net, images, wanted)["logits"] >= 0.9
    assert accuracy(net, reconstruct(pipelines["scenes-text"].vae, images), wanted)["logits"] >= 0.8


def test_reference_belongs_to_the_extractor(net):
    reference = load_reference(MODELS["scenes-text"].reference)
    assert reference.pool.n >= 10_000
    weights = (ZOO / "scenes-extractor" / "model.safetensors").read_bytes()
    assert reference.metadata["extractor_sha256"] == hashlib.sha256(weights).hexdigest()
    real = scenes.draw("evaluation", 500)
    pool = extractor.outputs(net, to_tensor(real.images()))["pool"].numpy()
    one_kind = pool[real.kind[:, 0] == 0]
    near = frechet_distance(Statistics.from_features(pool), reference.pool)
    assert frechet_distance(Statistics.from_features(one_kind), reference.pool) > 3 * near


@torch.no_grad()
def test_clip_score_tells_captions_apart(unseen):
    model, preprocess, tokenizer = clip.load(ZOO / "scenes-clip")
    drawn, images = unseen[0][:100], unseen[1][:100]
    image = model.encode_image(torch.stack([preprocess(Image.fromarray(i)) for i in images]), normalize=True)
    text = model.encode_text(tokenizer(drawn.captions()), normalize=True)
    scores = (100 * image @ text.T).numpy()
    other = scores[~np.eye(100, dtype=bool)]
    assert scores.diagonal().mean() > other.mean() + 3 * other.std()
    assert (scores.argmax(1) == np.arange(100)).mean() > 0.8


def test_preprocessing_of_clip_is_that_of_training(unseen):
    _, preprocess, _ = clip.load(ZOO / "scenes-clip")
    assert torch.allclose(preprocess(Image.fromarray(unseen[1][0])), to_tensor(unseen[1][:1])[0], atol=1e-5)


@pytest.mark.parametrize("name", ["scenes-text", "scenes-class"])
def test_samples_obey(name, pipelines, net):
    n = MODELS[name].batch_size // 2
    images = next(generate(pipelines[name], MODELS[name], "validation", n))[2]
    assert accuracy(net, images, extractor.targets(scenes.draw("validation", n)))["logits"] >= 0.7


def test_unconditional_samples_are_scenes(pipelines, net):
    _, latents, images = next(generate(pipelines["scenes-uncond"], MODELS["scenes-uncond"], "validation", 16))
    assert torch.isfinite(latents).all() and len({image.tobytes() for image in images}) == 16
    sure = extractor.outputs(net, to_tensor(images))["logits"].softmax(1).amax(1)
    assert sure.mean() > 0.7


def test_photographs_show_their_classes():
    model = MODELS["photos-class"]
    index, images = next((batch[0], batch[2]) for batch in generate(model.load(), model, "validation", 20))
    labels = np.array(model.conditions("validation", list(index))["class_labels"])
    right = class_logits(images, model.classifier).argmax(1) == labels
    assert right.mean() >= 0.7  # 0.1 by chance


def test_emoji_show_their_captions():
    """Of 100 captions, the image-text model ranks the caption of most samples first; chance is 1 in 100."""
    model, n = dataclasses.replace(MODELS["emoji-text"], batch_size=12), 12
    images = np.concatenate([batch[2] for batch in generate(model.load(), model, "evaluation", n)])
    captions = model.conditions("evaluation", range(100))["prompt"]
    judge, _, tokenizer = clip.load(ZOO / "emoji-clip")
    with torch.no_grad():
        shown = judge.encode_image(to_tensor(images), normalize=True)
        said = judge.encode_text(tokenizer(captions), normalize=True)
    assert ((shown @ said.T).argmax(1) == torch.arange(n)).float().mean() > 0.6
