"""Photographs and emoji: decoding, names, concepts, splits that do not leak, and training on them."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from quest.diffusion.loading import load_pipeline
from quest.metrics import clip
from quest.metrics.features import clip_features
from quest.zoo import emoji_data, latents, pictures, train_autoencoder, train_clip, train_denoiser
from quest.zoo.architectures import build_denoiser
from quest.zoo.vocabulary import MAX_LENGTH, build_tokenizer, caption_words, encode

STYLES = ("noto", "twemoji", "fluent flat", "fluent modern")


def write(path, images, **columns):
    encoded = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        encoded.append(np.frombuffer(buffer.getvalue(), np.uint8))
    offsets = np.cumsum([0, *map(len, encoded)])
    np.savez(path, data=np.concatenate(encoded), offsets=offsets, **columns)
    return path


@pytest.fixture(scope="module")
def emoji(tmp_path_factory):
    """200 concepts in four styles, 64x64."""
    rng = np.random.default_rng(0)
    names = [f"thing {n}" for n in range(200) for _ in STYLES]
    images = rng.integers(0, 256, (800, 64, 64, 3), np.uint8)
    return write(tmp_path_factory.mktemp("data") / "emoji.npz", images, name=names, style=list(STYLES) * 200)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (pictures.EVALUATION + pictures.REFERENCE + 40, 32, 32, 3), np.uint8)
    labels = rng.integers(0, 3, len(images)).astype(np.uint8)
    path = tmp_path_factory.mktemp("data") / "photos.npz"
    return write(path, images, labels=labels, classes=["cat", "dog", "ship"])


def test_photographs_are_split_at_random_and_once_for_all(photos):
    shown = pictures.photographs(photos)
    counts = {split: len(shown.rows(split)) for split in pictures.SPLITS}
    assert counts == {"train": 40, "reference": pictures.REFERENCE, "evaluation": pictures.EVALUATION}
    assert shown.images.shape[1:] == (32, 32, 3) and shown.classes == ("cat", "dog", "ship")
    assert (pictures.photographs(photos).split == shown.split).all()


def test_no_concept_leaks_out_of_what_is_held_out(emoji):
    shown = pictures.emoji(emoji)
    training = {shown.concepts[i] for i in shown.rows("train")}
    unseen = [c for c, why in zip(shown.concepts, shown.held_out, strict=True) if why == "concept"]
    assert unseen and not training & set(unseen)
    assert all(unseen.count(c) == len(STYLES) for c in unseen)  # in every style
    pairs = [shown.captions[i] for i in np.flatnonzero(shown.held_out == "style")]
    assert pairs and not set(pairs) & {shown.captions[i] for i in shown.rows("train")}
    reference, evaluation = ({shown.concepts[i] for i in shown.rows(s)} for s in ("reference", "evaluation"))
    assert reference and evaluation and not reference & evaluation


def test_names_are_spelt_in_one_way():
    names = ["Student medium dark", "student default", "vertical traffic light", "student", "red apple"]
    assert pictures.clean_names(names) == [
        "student, medium-dark skin tone",
        "student",
        "vertical traffic light",
        "student",
        "red apple",
    ]


@pytest.mark.parametrize(
    ("name", "concept"),
    [
        ("woman teacher, medium-dark skin tone", "teacher"),
        ("teacher", "teacher"),
        ("sun behind cloud", "behind cloud sun"),
        ("man", "man"),
    ],
)
def test_concepts(name, concept):
    assert pictures.concept(name) == concept


def test_a_concept_counts_as_the_root_of_its_pictures():
    weights = pictures.concept_weights(["kiss"] * 16 + ["taco"] * 4 + ["clock"])
    assert weights.sum() == pytest.approx(1)
    assert weights[:16].sum() / weights[20] == pytest.approx(4) and weights[16:20].sum() / weights[20] == pytest.approx(
        2
    )


def test_bad_data_is_named(emoji, tmp_path):
    with pytest.raises(ValueError, match="no pictures 'cats'; there are photos, emoji"):
        pictures.load("cats", emoji)
    with pytest.raises(ValueError, match="split: 'test' is not one of train"):
        pictures.emoji(emoji).rows("test")
    mixed = [np.zeros((8, 8, 3), np.uint8), np.zeros((9, 8, 3), np.uint8)]
    with pytest.raises(ValueError, match="mixed.npz: its pictures are not all of one size"):
        pictures.emoji(write(tmp_path / "mixed.npz", mixed, name=["a", "b"], style=["noto", "noto"]))


def test_rare_words_are_spelt():
    captions = ["noto emoji: red apple", "noto emoji: green apple", "noto emoji: red heart"]
    assert caption_words(captions) == [":", "apple", "emoji", "noto", "red"]
    tokenizer = build_tokenizer(caption_words(captions), 12)
    ids = encode(tokenizer, ["noto emoji: red apple", "heart"])
    assert ids.shape == (2, 12)
    tokens = tokenizer.convert_ids_to_tokens(ids[0].tolist())
    assert tokens[1:6] == ["noto</w>", "emoji</w>", ":</w>", "red</w>", "apple</w>"]
    assert tokenizer.decode(ids[1], skip_special_tokens=True).strip() == "heart"


@pytest.fixture(scope="module")
def latent_file(photos):
    folder = photos.with_name("autoencoder")
    train_autoencoder.train(folder, 2, batch_size=2, images=None, held_out=16, name="photos", data=photos)
    latents.compute(folder, photos.with_name("latents.safetensors"), name="photos", data=photos)
    return photos.with_name("latents.safetensors")


def test_flipped_photographs_follow_the_others_with_their_labels(latent_file, photos):
    z, held_out = latents.load(latent_file)
    assert z.shape == (80, 8, 8, 8) and held_out.shape == (1000, 8, 8, 8)
    trainee = train_denoiser.Trainee("photos-class", pictures.photographs(photos))
    labels = trainee.conditions("train", 80)
    assert labels[:40].equal(labels[40:]) and not z[:40].equal(z[40:])


@pytest.fixture(scope="module")
def emoji_latents(emoji):
    """Random latents of the emoji of the fixture."""
    shown, g = pictures.emoji(emoji), torch.Generator().manual_seed(0)
    counts = {"train": len(shown.rows("train")), "validation": 20}
    path = emoji.with_name("latents.safetensors")
    save_file({split: torch.randn(n, 4, 16, 16, generator=g) for split, n in counts.items()}, path)
    return path


@pytest.mark.parametrize("name", ["photos-class", "photos-dit", "emoji-uncond"])
def test_resumed_training_on_pictures_equals_an_uninterrupted_one(
    name, latent_file, photos, emoji_latents, emoji, tmp_path, monkeypatch
):
    of, data = (latent_file, photos) if name.startswith("photos") else (emoji_latents, emoji)

    def run(out):
        autoencoder = photos.with_name("autoencoder")  # it only goes into the pipeline
        return train_denoiser.train(name, autoencoder, out, of, 4, batch_size=4, save_every=2, data=data)

    error = run(tmp_path / "whole")
    save = train_denoiser.training.save_checkpoint

    def killed(path, iteration, *rest):
        save(path, iteration, *rest)
        raise KeyboardInterrupt

    monkeypatch.setattr(train_denoiser.training, "save_checkpoint", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut")
    monkeypatch.undo()
    assert run(tmp_path / "cut") == error
    for file in (tmp_path / "whole").rglob("*.safetensors"):
        other = load_file(tmp_path / "cut" / file.relative_to(tmp_path / "whole"))
        assert all(x.equal(other[key]) for key, x in load_file(file).items())
    if name.startswith("photos"):
        pipe = load_pipeline(tmp_path / "cut")
        pipe.set_progress_bar_config(disable=True)
        pictured = pipe(class_labels=[0, 2], guidance_scale=2.0, num_inference_steps=2, output_type="np").images
        assert pictured.shape == (2, 32, 32, 3)


def test_an_unconditional_model_starts_from_the_convolutions_of_a_conditional_one(tmp_path):
    other, unet = build_denoiser("emoji-text"), build_denoiser("emoji-uncond")
    other.save_pretrained(tmp_path / "unet")
    attention = unet.mid_block.attentions[0].to_q.weight.clone()
    assert 0.5 < train_denoiser.copy_weights(unet, tmp_path) < 0.9
    theirs = other.mid_block.resnets[0].conv1.weight
    assert torch.equal(unet.mid_block.resnets[0].conv1.weight, theirs)
    assert torch.equal(unet.mid_block.attentions[0].to_q.weight, attention)
    with pytest.raises(ValueError, match="no tensor of its denoiser"):
        train_denoiser.copy_weights(torch.nn.Linear(2, 2), tmp_path)


def test_emoji_model_learns_from_captions_and_draws_concepts_evenly(emoji):
    torch.manual_seed(0)
    shown = pictures.emoji(emoji)
    trainee = train_denoiser.Trainee("emoji-text", shown)
    rows = shown.rows("train")
    ids = trainee.conditions("train", len(rows))
    assert trainee.tokenizer.decode(ids[0], skip_special_tokens=True).strip().startswith(shown.captions[rows[0]][:4])
    assert trainee.drawing_weights(len(rows)).sum() == pytest.approx(1)
    noise = trainee(torch.randn(2, 4, 16, 16), torch.tensor([1, 999]), ids[:2])
    assert noise.shape == (2, 4, 16, 16) and noise.dtype == torch.float32


def test_emoji_of_the_packages(tmp_path, monkeypatch):
    def draw(path, colour):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGBA", (64, 64), colour).save(path)

    entries = [
        {"name": "KISS", "image": "kiss.png", "skin_variations": {"1F3FB-1F3FB": {"image": "light.png"}}},
        {"name": "CLOUD", "image": "cloud.png"},
        {"name": "LOST", "image": "lost.png"},
    ]
    for vendor in ("google", "twitter"):
        package = tmp_path / f"emoji-datasource-{vendor}" / "package"
        for file, colour in (("kiss", "red"), ("light", "blue" if vendor == "google" else "red"), ("cloud", "#fff0")):
            draw(package / "img" / vendor / "64" / f"{file}.png", colour if vendor == "google" else "#0a0")
        (package / "emoji.json").write_text(json.dumps(entries), encoding="utf-8")
    monkeypatch.setattr(emoji_data, "drawn_by_fluent", lambda folder, kind: [])
    columns = emoji_data.build(tmp_path)
    # The cloud is empty, the file of the lost one is not there, and Twemoji's drawings here are all equal.
    assert columns["name"].tolist() == ["kiss", "kiss, light skin tone", "kiss"]
    assert columns["style"].tolist() == ["noto", "noto", "twemoji"]
    np.savez(tmp_path / "emoji.npz", **columns)
    assert pictures.emoji(tmp_path / "emoji.npz").captions[1] == "noto emoji: kiss, light skin tone"


def test_what_emoji_need_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(emoji_data.shutil, "which", lambda name: None)
    with pytest.raises(FileNotFoundError, match="npm: not installed"):
        emoji_data.fetch("fluentui-emoji@1.3.0", tmp_path)
    with pytest.raises(FileNotFoundError, match="rsvg-convert: not installed"):
        next(emoji_data.drawn_by_fluent(tmp_path, "flat"))


def test_an_image_text_model_of_emoji_is_trained_and_reported_on_what_is_held_out(emoji, tmp_path, capsys):
    train_clip.train(tmp_path / "clip", iterations=2, batch_size=4, held_out=16, kind="emoji", data=emoji)
    said = capsys.readouterr().out
    assert "held-out styles" in said and "held-out concepts" in said
    shown = pictures.emoji(emoji)
    rows = shown.rows("evaluation")[:3]
    model, preprocess, tokenizer = clip.load(tmp_path / "clip")
    assert tokenizer(["noto emoji: thing 7"])[0].shape == (MAX_LENGTH["emoji"],)
    found = clip_features(shown.images[rows], [shown.captions[i] for i in rows], model, preprocess, tokenizer)
    assert found["clip_image"].shape == found["clip_text"].shape == (3, 64)
    assert train_clip.material("emoji", 0, emoji)[2].sum() == pytest.approx(1)
