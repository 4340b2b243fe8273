import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from quest.diffusion.compvis.networks import FixedHeadsUNet2DModel
from quest.diffusion.pipelines import ClassEmbedder, LatentDiffusionPipeline
from quest.diffusion.samplers import QuadraticDDIMScheduler


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def noise(*seeds):
    """Initial noise [B, 4, 8, 8] of these seeds, and the generators that drew it."""
    drawn = generators(*seeds)
    return torch.cat([torch.randn(1, 4, 8, 8, generator=generator) for generator in drawn]), drawn


def alphas_cumprod():
    """The scaled-linear schedule of latent diffusion, from its definition."""
    return torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)


def ddim(denoise, x, times, eta=0.0, fresh=None):
    """DDIM, equation 12 and 16 of arXiv:2010.02502; below the last step, the first alpha stands in."""
    a = alphas_cumprod()
    with torch.no_grad():
        for t, following in zip(times, [*times[1:], 0], strict=True):
            eps = denoise(x, t)
            now, then = a[t], a[following]
            sigma = eta * ((1 - then) / (1 - now) * (1 - now / then)).sqrt()
            x0 = (x - (1 - now).sqrt() * eps) / now.sqrt()
            x = then.sqrt() * x0 + (1 - then - sigma**2).sqrt() * eps
            if eta:
                x = x + sigma * fresh()
    return x


TIMES = list(range(801, 0, -200))  # five steps


def test_unconditional_is_plain_ddim(uncond_pipe):
    x, _ = noise(3, 4)
    expected = ddim(lambda x, t: uncond_pipe.unet(x, t).sample, x, TIMES)
    latents = uncond_pipe(2, num_inference_steps=5, generator=generators(3, 4), output_type="latent").images
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)


def test_eta_draws_every_step_from_each_images_own_generator(uncond_pipe):
    x, drawn = noise(3, 4)

    def fresh():
        return torch.cat([torch.randn(1, 4, 8, 8, generator=generator) for generator in drawn])

    expected = ddim(lambda x, t: uncond_pipe.unet(x, t).sample, x, TIMES, eta=1.0, fresh=fresh)
    call = {"num_inference_steps": 5, "eta": 1.0, "output_type": "latent"}
    latents = uncond_pipe(2, generator=generators(3, 4), **call).images
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)

    other = uncond_pipe(2, generator=generators(3, 5), **call).images  # a new neighbour
    torch.testing.assert_close(other[0], latents[0], rtol=1e-5, atol=1e-5)
    assert (other[1] - latents[1]).abs().max() > 0.1


def test_guidance_extrapolates_from_no_class_to_class(class_pipe):
    embed, unet = class_pipe.class_embedder, class_pipe.unet
    labels, none = torch.tensor([2, 0]), torch.tensor([5, 5])

    def denoise(x, t):
        without, by_class = (unet(x, t, encoder_hidden_states=embed(c)).sample for c in (none, labels))
        return without + 3 * (by_class - without)

    x, _ = noise(3, 4)
    call = {"num_inference_steps": 5, "generator": generators(3, 4), "output_type": "latent"}
    latents = class_pipe(class_labels=[2, 0], guidance_scale=3.0, **call).images
    torch.testing.assert_close(latents, ddim(denoise, x, TIMES), rtol=1e-4, atol=1e-3)


def test_one_denoiser_call_per_step_on_the_doubled_batch(class_pipe):
    seen = []
    handle = class_pipe.unet.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[0]))
    try:
        class_pipe(class_labels=[1], num_inference_steps=2, guidance_scale=3.0, output_type="latent")
        class_pipe(class_labels=[1], num_inference_steps=2, output_type="latent")
    finally:
        handle.remove()
    assert seen == [2, 2, 1, 1]


def test_class_changes_the_image(class_pipe):
    images = [
        class_pipe(class_labels=[c], num_inference_steps=4, generator=generators(1), output_type="np").images
        for c in (0, 1)
    ]
    assert np.abs(images[0] - images[1]).mean() > 0.01


def test_given_latents_replace_the_initial_noise(uncond_pipe):
    x, _ = noise(3, 4)
    call = {"num_inference_steps": 4, "output_type": "latent"}
    drawn = uncond_pipe(2, generator=generators(3, 4), **call).images
    assert torch.equal(uncond_pipe(2, latents=x, **call).images, drawn)


def test_output_types_agree(uncond_pipe):
    def call(kind):
        return uncond_pipe(2, num_inference_steps=2, generator=generators(0, 1), output_type=kind).images

    pixels = call("np")
    assert pixels.shape == (2, 64, 64, 3) and 0 <= pixels.min() < pixels.max() <= 1
    np.testing.assert_array_equal(call("pt").permute(0, 2, 3, 1).numpy(), pixels)
    np.testing.assert_array_equal(np.stack([np.asarray(image) for image in call("pil")]), (pixels * 255).round())
    assert call("latent").shape == (2, 4, 8, 8)


@pytest.mark.parametrize("kind", ["uncond", "class", "text"])
def test_save_and_load_is_exact(kind, request, tmp_path):
    pipe = request.getfixturevalue(f"{kind}_pipe")
    given = {"uncond": {"batch_size": 2, "eta": 1.0}, "class": {"class_labels": [0, 4]}, "text": {"prompt": ["a", "b"]}}
    pipe.save_pretrained(tmp_path)
    loaded = type(pipe).from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    first, second = (
        p(num_inference_steps=3, generator=generators(0, 1), output_type="np", **given[kind]).images
        for p in (pipe, loaded)
    )
    np.testing.assert_array_equal(first, second)


def test_vq_autoencoder_decodes_through_its_codebook(uncond_pipe):
    from diffusers import VQModel

    torch.manual_seed(0)
    vae = VQModel(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=4,
        num_vq_embeddings=16,
        norm_num_groups=4,
        scaling_factor=1.0,
    ).eval()
    pipe = LatentDiffusionPipeline(uncond_pipe.unet, vae, uncond_pipe.scheduler)
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 2, "generator": generators(0)}
    pixels = pipe(output_type="pt", **call).images
    call["generator"] = generators(0)
    latents = pipe(output_type="latent", **call).images
    with torch.no_grad():
        codes = vae.quantize(latents)[0]
        expected = vae.decode(codes, force_not_quantize=True).sample
    assert pixels.shape == (1, 3, 16, 16)
    torch.testing.assert_close(pixels, (expected / 2 + 0.5).clamp(0, 1))


def pixel_pipe(uncond_pipe):
    scheduler = QuadraticDDIMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False)
    pipe = LatentDiffusionPipeline(uncond_pipe.unet, None, scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_quadratic_ddim_without_an_autoencoder(uncond_pipe, eta):
    pipe, steps = pixel_pipe(uncond_pipe), 6
    x, drawn = noise(3, 4)
    a = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)
    times = [800, 512, 288, 128, 32, 0]  # 800 (i / 5)^2
    expected = x
    with torch.no_grad():
        for t, now, then in zip(times, a[times], [*a[times[1:]], torch.tensor(1.0)], strict=True):
            eps = pipe.unet(expected, t).sample
            sigma = eta * ((1 - then) / (1 - now) * (1 - now / then)).sqrt()
            image = (expected - (1 - now).sqrt() * eps) / now.sqrt()
            expected = then.sqrt() * image + (1 - then - sigma**2).sqrt() * eps
            if eta:
                fresh = torch.cat([torch.randn(1, 4, 8, 8, generator=generator) for generator in drawn])
                expected = expected + sigma * fresh
    call = {"num_inference_steps": steps, "eta": eta}
    latents = pipe(2, generator=generators(3, 4), output_type="latent", **call).images
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)
    pixels = pipe(2, generator=generators(3, 4), output_type="pt", **call).images
    torch.testing.assert_close(pixels, (latents / 2 + 0.5).clamp(0, 1))


def test_quadratic_steps_that_coincide_leave_the_image(uncond_pipe):
    scheduler = pixel_pipe(uncond_pipe).scheduler
    scheduler.set_timesteps(100)
    x, eps = torch.randn(2, 1, 4, 8, 8).unbind()
    for t in scheduler.timesteps[:-1]:
        before, x = x, scheduler.step(eps, t, x, eta=1.0, generator=torch.Generator().manual_seed(0)).prev_sample
    torch.testing.assert_close(x, before)  # from 0 to 0
    with pytest.raises(ValueError, match="timestep 800 is out of turn"):
        scheduler.step(eps, 800, x)
    with pytest.raises(ValueError, match="num_inference_steps: 1; 2 to 1000"):
        scheduler.set_timesteps(1)


def test_a_pixel_pipeline_is_saved_with_its_scheduler(uncond_pipe, tmp_path):
    pipe = pixel_pipe(uncond_pipe)
    pipe.save_pretrained(tmp_path)
    again = LatentDiffusionPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert again.vae is None and type(again.scheduler) is QuadraticDDIMScheduler
    call = {"num_inference_steps": 3, "output_type": "np"}
    first, second = (p(1, generator=generators(0), **call).images for p in (pipe, again))
    np.testing.assert_array_equal(first, second)


def test_saved_pipelines_load_in_a_process_that_imports_no_other_module(uncond_pipe, class_pipe, tmp_path):
    """Those that were saved before modules moved out of `quest.pipelines`, too."""
    unet = FixedHeadsUNet2DModel(
        8, 4, 4, (16, 16), ("DownBlock2D", "AttnDownBlock2D"), ("AttnUpBlock2D", "UpBlock2D"), 4, norm_num_groups=4
    )
    pipes = [class_pipe, pixel_pipe(uncond_pipe), LatentDiffusionPipeline(unet, None, uncond_pipe.scheduler)]
    expected = [type(component).__name__ for pipe in pipes for component in pipe.components.values()]
    for number, pipe in enumerate(pipes):
        for when in ("now", "earlier"):
            pipe.save_pretrained(tmp_path / f"{when}-{number}")
        index = tmp_path / f"earlier-{number}" / "model_index.json"
        saved = json.loads(index.read_text(encoding="utf-8"))
        old = {n: ["quest.pipelines", one[1]] for n, one in saved.items() if str(one[0]).startswith("quest.")}
        assert len(old) == 1
        index.write_text(json.dumps(saved | old), encoding="utf-8")
    code = """
import sys
from quest.diffusion.pipelines import LatentDiffusionPipeline
for folder in sys.argv[1:]:
    print(*(type(c).__name__ for c in LatentDiffusionPipeline.from_pretrained(folder).components.values()))
"""
    folders = [str(tmp_path / f"{when}-{number}") for when in ("now", "earlier") for number in range(3)]
    done = subprocess.run([sys.executable, "-c", code, *folders], capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == expected * 2


def test_class_embedder_has_a_last_row_for_no_class():
    embedder = ClassEmbedder(num_classes=3, tokens=2, dim=8)
    assert embedder.embedding.weight.shape == (4, 16)
    tokens = embedder(torch.tensor([0, 3]))
    assert tokens.shape == (2, 2, 8)
    assert torch.equal(tokens[1].flatten(), embedder.embedding.weight[3])


@pytest.mark.parametrize(
    ("pipe", "arguments", "message"),
    [
        ("uncond", {"batch_size": 2, "generator": generators(0)}, "generator: 1 generators for 2 images"),
        ("uncond", {"class_labels": [1]}, "class_labels: this pipeline is unconditional"),
        ("uncond", {"guidance_scale": 3.0}, "guidance_scale: 3.0 needs class_labels"),
        ("uncond", {"eta": 1.5}, r"eta: 1.5 is outside \[0, 1\]"),
        ("uncond", {"eta": -0.1}, r"eta: -0.1 is outside \[0, 1\]"),
        ("uncond", {"output_type": "png"}, "output_type: 'png' is not one of pil, np, pt, latent"),
        ("uncond", {"latents": torch.zeros(1, 4, 4, 4)}, r"latents: expected shape \[1, 4, 8, 8\], got \[1, 4, 4, 4\]"),
        ("class", {}, "class_labels: this pipeline is class-conditional"),
        ("class", {"class_labels": [0, 5]}, "class_labels: 5 is not a class of this model; valid are 0 to 4"),
        ("class", {"class_labels": [-1]}, "class_labels: -1 is not a class"),
        ("class", {"class_labels": [1, 2], "batch_size": 3}, "class_labels: 2 given for batch_size 3"),
        ("class", {"class_labels": [1], "guidance_scale": 0.5}, "guidance_scale: 0.5 is below 1"),
        ("class", {"class_labels": [1], "guidance_scale": float("nan")}, "guidance_scale: nan is below 1"),
        ("uncond", {"num_inference_steps": -5}, "num_inference_steps: -5 is not a whole number from 1 on"),
        ("uncond", {"num_inference_steps": 0}, "num_inference_steps: 0 is not"),
        ("uncond", {"num_inference_steps": 2.5}, "num_inference_steps: 2.5 is not"),
        ("uncond", {"num_inference_steps": True}, "num_inference_steps: True is not"),
        ("uncond", {"batch_size": -1}, "batch_size: -1 is not"),
        ("uncond", {"batch_size": 0}, "batch_size: 0 is not"),
    ],
)
def test_bad_input_names_the_argument(pipe, arguments, message, request):
    with pytest.raises(ValueError, match=message):
        request.getfixturevalue(f"{pipe}_pipe")(**{"num_inference_steps": 1} | arguments)
