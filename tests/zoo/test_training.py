"""The training scripts on tiny settings: they learn, stop, resume to the same bits, and write what loads."""

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from safetensors.torch import load_file, save_file

from quest.diffusion import scenes
from quest.diffusion.pipelines import LatentDiffusionPipeline
from quest.metrics import clip, extractor
from quest.runtime.files import atomic_folder
from quest.zoo import architectures, latents, train_autoencoder, train_clip, train_denoiser, train_extractor, training
from quest.zoo.training import constant_then_decay, cosine


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zoo") / "autoencoder"
    train_autoencoder.train(folder, iterations=2, images=64, batch_size=2, held_out=16)
    return folder


@pytest.fixture(scope="module")
def latent_file(autoencoder):
    path = autoencoder.with_name("latents.safetensors")
    g = torch.Generator().manual_seed(0)
    save_file({k: torch.randn(n, 8, 8, 8, generator=g) for k, n in (("train", 32), ("validation", 8))}, path)
    return path


def weights(folder):
    return {str(p.relative_to(folder)): load_file(p) for p in sorted(folder.rglob("*.safetensors"))}


def same(a, b):
    return a.keys() == b.keys() and all(
        x.keys() == b[k].keys() and all(x[n].equal(b[k][n]) for n in x) for k, x in a.items()
    )


@pytest.mark.parametrize("name", ["scenes-text", "scenes-uncond"])
def test_resumed_denoiser_equals_an_uninterrupted_one(name, autoencoder, latent_file, tmp_path, monkeypatch):
    def run(out):
        return train_denoiser.train(name, autoencoder, out, latent_file, iterations=4, batch_size=4, save_every=2)

    error = run(tmp_path / "whole")
    save = training.save_checkpoint

    def killed(path, iteration, *rest):
        save(path, iteration, *rest)
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "save_checkpoint", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut")
    assert not (tmp_path / "cut").exists()
    monkeypatch.undo()
    assert run(tmp_path / "cut") == error
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


def test_denoiser_learns_and_is_written_in_half_precision(autoencoder, latent_file, tmp_path):
    out = tmp_path / "scenes-uncond"
    start = train_denoiser.train("scenes-uncond", autoencoder, out, latent_file, iterations=1, batch_size=4)
    out.with_name("scenes-uncond.checkpoint").unlink()
    end = train_denoiser.train("scenes-uncond", autoencoder, out, latent_file, iterations=30, batch_size=4)
    assert end < 0.95 * start
    assert all(x.dtype == torch.float16 for file in weights(out).values() for x in file.values())
    assert LatentDiffusionPipeline.from_pretrained(out).class_embedder is None
    assert not any(str(tmp_path.parent) in file.read_text(encoding="utf-8") for file in out.rglob("*.json"))


def test_text_model_is_a_stock_pipeline(autoencoder, latent_file, tmp_path):
    train_denoiser.train("scenes-text", autoencoder, tmp_path / "m", latent_file, iterations=1, batch_size=2)
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "m").to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a large red circle", num_inference_steps=2, output_type="np").images
    assert type(pipe).__name__ == "StableDiffusionPipeline" and image.shape == (1, 64, 64, 3)


def test_conditions_are_dropped_as_the_pipelines_leave_them_out():
    drawn = scenes.draw("train", 3)
    which = torch.tensor([True, False, True])
    text, label = train_denoiser.Trainee("scenes-text"), train_denoiser.Trainee("scenes-class")
    ids = text.conditions("train", 3)
    assert text.dropped(ids, which).equal(torch.stack([text.nothing, ids[1], text.nothing]))
    assert text.tokenizer("", padding="max_length").input_ids == text.nothing.tolist()
    assert label.dropped(label.conditions("train", 3), which).tolist() == [48, drawn.labels()[1], 48]


def test_latents_of_the_autoencoder_are_normalised(autoencoder):
    vae = AutoencoderKL.from_pretrained(autoencoder).float()
    x = train_autoencoder.to_tensor(scenes.draw("train", 64).images())
    y = vae.decode(vae.encode(x).latent_dist.mean).sample
    z = latents.posterior_means(vae, scenes.draw("train", 64).images())
    assert z.mean((0, 2, 3)).abs().max() < 0.02 and (z.std((0, 2, 3)) - 1).abs().max() < 0.02
    train_autoencoder.normalise(vae, 0.5 * x)  # other statistics, the same reconstruction
    assert torch.allclose(vae.decode(vae.encode(x).latent_dist.mean).sample, y, atol=1e-4)
    assert not torch.allclose(vae.encode(x).latent_dist.mean, z, atol=0.1)


def test_extractor_and_clip_scripts_write_what_their_loaders_read(autoencoder, tmp_path):
    train_extractor.train(tmp_path / "extractor", autoencoder, iterations=2, fine_tuning=2, images=64, held_out=16)
    said = extractor.load(tmp_path / "extractor")(torch.zeros(2, 3, 64, 64))
    assert said["pool"].shape == (2, 64) and said["spatial"].shape == (2, 112) and said["logits"].shape == (2, 48)
    train_clip.train(tmp_path / "clip", iterations=2, images=64, batch_size=4, held_out=16)
    model, _, tokenizer = clip.load(tmp_path / "clip")
    assert model.encode_text(tokenizer(["a red circle"]), normalize=True).shape == (1, 64)


def test_learning_rates():
    assert [cosine(i, 100, 10) for i in (0, 100)] == pytest.approx([0.1, 0.0])
    for total in (400, 1000):  # level, and the same for both, until the shorter one decays
        assert constant_then_decay(299, total) == 1
    assert constant_then_decay(350, 400) == 0.5


def test_folder_is_replaced_only_when_complete(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "old").touch()
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "a") as folder:
        (folder / "new").touch()
        raise RuntimeError
    assert [p.name for p in tmp_path.rglob("*")] == ["a", "old"]
    with atomic_folder(tmp_path / "a") as folder:
        (folder / "new").touch()
    assert [p.name for p in tmp_path.rglob("*")] == ["a", "new"]


def test_unknown_model():
    with pytest.raises(ValueError, match="no model 'scenes'; there are scenes-text"):
        architectures.build_denoiser("scenes")
