import copy
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler

from quest.diffusion import sampling
from quest.diffusion.models import MODELS, SEEDS
from quest.diffusion.samplers import QuadraticDDIMScheduler
from quest.metrics import features
from quest.quantization.timegroups import TimeGroups, grouped
from quest.runtime import memory

KINDS = ("uncond", "class", "text")


@pytest.fixture(params=KINDS)
def kind(request):
    """A pipeline, its model, and the way a user calls it for images 4 to 7 of the evaluation split."""
    pipe, model = (request.getfixturevalue(f"{request.param}_{part}") for part in ("pipe", "model"))
    call = {
        "uncond": {"batch_size": 4, "eta": 1.0},
        "class": {"class_labels": [4, 0, 1, 2], "guidance_scale": 3.0},
        "text": {"prompt": ["a green square", "a blue square", "a red star", "a green star"], "guidance_scale": 3.0},
    }
    return pipe, model, call[request.param]


def run(pipe, model, n, shard=(0, 1), split="evaluation"):
    """All of a shard as (indices [n], latents [n, C, h, w], images [n, H, W, 3])."""
    parts = list(sampling.generate(pipe, model, split, n, shard))
    return tuple(np.concatenate([np.asarray(part[i]) for part in parts]) for i in range(3)) if parts else None


def test_generate_makes_the_images_of_the_pipeline(kind):
    pipe, model, call = kind

    def direct(output_type):
        generators = [torch.Generator().manual_seed(SEEDS["evaluation"] + i) for i in range(4, 8)]
        return pipe(num_inference_steps=6, generator=generators, output_type=output_type, **call).images

    indices, latents, images = run(pipe, model, 8)
    assert indices.tolist() == list(range(8))
    assert latents.dtype == np.float32 and images.dtype == np.uint8
    np.testing.assert_array_equal(latents[4:], direct("latent").numpy())
    np.testing.assert_array_equal(images[4:], np.stack([np.asarray(image) for image in direct("pil")]))
    assert len(np.unique(images)) > 50  # neither flat nor saturated


def test_nothing_is_what_a_denoiser_of_nan_generates(kind):
    pipe, model, _ = kind
    n, shard, size = 2 * model.batch_size + 1, (0, 2), model.batch_size
    parts = list(sampling.nothing(pipe, model, n, shard))
    broken = copy.copy(pipe)
    broken.unet = copy.deepcopy(pipe.unet).requires_grad_(False)
    for parameter in broken.unet.parameters():
        parameter.fill_(torch.nan)
    for part, other in zip(parts, sampling.generate(broken, model, "evaluation", n, shard), strict=True):
        for ours, theirs in zip(part, other, strict=True):
            np.testing.assert_array_equal(ours, theirs)
    assert [len(part[0]) for part in parts] == [size, 1] and not parts[0][2].any() and parts[0][1].isnan().all()
    assert [part[0].tolist() for part in sampling.nothing(pipe, model, n, shard, skip={0})] == [[2 * size]]


def test_images_further_on_are_those_of_a_longer_run(uncond_pipe, uncond_model):
    size = uncond_model.batch_size
    whole = run(uncond_pipe, uncond_model, 2 * size + 2)
    (later, *rest) = sampling.generate(uncond_pipe, uncond_model, "evaluation", size + 2, first=size)
    assert later[0].tolist() == list(range(size, 2 * size)) and [len(part[0]) for part in rest] == [2]
    np.testing.assert_array_equal(later[2], whole[2][size : 2 * size])
    with pytest.raises(ValueError, match="first: 1 is not a multiple of the batch size"):
        sampling.generate(uncond_pipe, uncond_model, "evaluation", 2, first=1)


def _placed(images):
    """An extractor whose rows change with the size and order of a pass; a network's may, in the last bits."""
    place = torch.arange(len(images))[:, None] + 1000 * len(images)
    mean = images.float().mean(dim=(2, 3))  # [B, 3]
    return {"pool": mean + place, "spatial": mean - place, "logits": mean * place}


def test_any_number_of_shards_in_any_order_gives_the_same_bytes(kind, monkeypatch):
    pipe, model, _ = kind
    monkeypatch.setitem(features.EXTRACTORS, "placed", lambda: _placed)

    def shard(k, count):
        """Indices, latents, images and features of one shard, as the sample script makes them; None if it is empty."""
        made = run(pipe, model, 14, (k, count))
        return made and [*made, *features.extract(made[2], "placed", batch=model.batch_size).values()]

    whole = shard(0, 1)
    assert whole[0].tolist() == list(range(14)) and len(whole) == 6
    for count in (2, 8):
        numbers = np.random.default_rng(count).permutation(count).tolist()
        shards = [found for k in numbers if (found := shard(k, count)) is not None]
        order = np.argsort(np.concatenate([found[0] for found in shards]))
        for i, expected in enumerate(whole):
            assert np.concatenate([found[i] for found in shards])[order].tobytes() == expected.tobytes()
    assert not np.array_equal(features.extract(whole[2], "placed")["pool"], whole[3])  # without whole passes


def test_an_image_does_not_depend_on_n(kind):
    pipe, model, _ = kind
    few, more = run(pipe, model, 5), run(pipe, model, 8)
    assert few[0].tolist() == list(range(5))
    for i in (1, 2):
        assert few[i].tobytes() == more[i][:5].tobytes()


def test_splits_draw_different_noise(uncond_pipe, uncond_model):
    evaluation, calibration = (run(uncond_pipe, uncond_model, 1, split=s)[1] for s in ("evaluation", "calibration"))
    assert np.abs(evaluation - calibration).max() > 0.1


def test_shards_are_whole_batches_and_may_be_empty(uncond_pipe, uncond_model):
    assert [len(run(uncond_pipe, uncond_model, 9, (k, 3))[0]) for k in range(3)] == [4, 4, 1]
    assert run(uncond_pipe, uncond_model, 4, (1, 2)) is None


@pytest.mark.parametrize("steps", [20, 40])
def test_ddim_timesteps(uncond_pipe, uncond_model, steps):
    stride = 1000 // steps
    times = sampling.timesteps(replace(uncond_model, steps=steps), uncond_pipe)
    assert times == list(range(1001 - stride, 0, -stride))
    assert (times[0], times[-1], len(times)) == {20: (951, 1, 20), 40: (976, 1, 40)}[steps]


def noise_schedule(name):
    """The scheduler of one of the paper's models, as its loader makes it."""
    if name == "cifar10":
        return QuadraticDDIMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False)
    leading = {"steps_offset": 1, "timestep_spacing": "leading", "set_alpha_to_one": False}
    return PNDMScheduler(**leading, skip_prk_steps=True) if name == "sd14" else DDIMScheduler(**leading)


# Stride c of the original samplers: timesteps 1, 1 + c, 1 + 2c, ...
@pytest.mark.parametrize(
    ("name", "stride", "calls"), [("lsun-bedrooms", 5, 200), ("lsun-churches", 2, 500), ("imagenet", 50, 20)]
)
def test_ddim_timesteps_of_the_papers_models(name, stride, calls):
    pipe = SimpleNamespace(scheduler=noise_schedule(name))
    times = sampling.timesteps(MODELS[name], pipe)
    assert times == list(range(1001 - stride, 0, -stride)) and len(times) == calls


def test_plms_calls_51_times_for_50_steps():
    times = sampling.timesteps(MODELS["sd14"], SimpleNamespace(scheduler=noise_schedule("sd14")))
    assert times == [981, 961, *range(961, 0, -20)] and len(times) == 51


def test_quadratic_timesteps_of_cifar10():
    times = sampling.timesteps(MODELS["cifar10"], SimpleNamespace(scheduler=noise_schedule("cifar10")))
    assert len(times) == 100 and len(set(times)) == 96
    assert times[:4] == [800, 783, 768, 752] and times[-12:] == [9, 8, 6, 5, 3, 2, 2, 1, 0, 0, 0, 0]
    assert len(grouped(times, MODELS["cifar10"].time_groups)) == 24


def test_plms_repeats_its_second_timestep(text_pipe, text_model):
    times = sampling.timesteps(replace(text_model, steps=20), text_pipe)
    assert times == [951, 901, *range(901, 0, -50)]
    assert len(times) == 21


def test_timesteps_are_those_of_the_denoiser_calls(kind):
    pipe, model, _ = kind
    seen = []

    def note(module, inputs):
        seen.append(int(inputs[1]))

    handle = pipe.unet.register_forward_pre_hook(note)
    try:
        run(pipe, model, 4)
    finally:
        handle.remove()
    pipe.scheduler.set_timesteps(3)
    assert sampling.timesteps(model, pipe) == seen
    assert len(pipe.scheduler.timesteps) in (3, 4)  # the pipeline's own scheduler is left alone


def test_one_bar_and_the_pipelines_setting_is_restored(uncond_model, capsys):
    pipe = uncond_model.load()
    pipe.set_progress_bar_config(desc="inner", disable=False)
    run(pipe, uncond_model, 6)
    err = capsys.readouterr().err
    assert "6/6" in err and "inner" not in err
    pipe(num_inference_steps=1, output_type="latent")
    assert "inner" in capsys.readouterr().err


@pytest.mark.parametrize("shard", [(2, 2), (-1, 2), (0, 0)])
def test_bad_shard(uncond_pipe, uncond_model, shard):
    with pytest.raises(ValueError, match="shard: "):
        sampling.generate(uncond_pipe, uncond_model, "evaluation", 4, shard)


def test_bad_split_and_n(uncond_pipe, uncond_model):
    with pytest.raises(ValueError, match="n: 0 images"):
        sampling.generate(uncond_pipe, uncond_model, "evaluation", 0)
    with pytest.raises(ValueError, match="split: 'test' is not one of evaluation, calibration, validation"):
        sampling.generate(uncond_pipe, uncond_model, "test", 4)


def test_too_few_captions_is_said_before_sampling(text_pipe, text_model):
    captions = ["a red circle"] * 6
    model = replace(text_model, source=lambda split, start, stop: captions[start:stop])
    with pytest.raises(ValueError, match="tiny-text: split 'evaluation' has fewer than 8 captions"):
        sampling.generate(text_pipe, model, "evaluation", 7)


def test_time_groups_are_checked_before_sampling(uncond_model):
    pipe = uncond_model.load()
    TimeGroups([831, 400]).attach(pipe.unet)
    run(pipe, uncond_model, 1)  # six steps start at 831
    with pytest.raises(ValueError, match="951..1.*calibrated for 831..0"):
        sampling.generate(pipe, replace(uncond_model, steps=20), "evaluation", 1)


def test_timed_calls(uncond_pipe, uncond_model):
    """One time for each call, less than the whole run takes; nothing else changes, and nothing stays behind."""
    plain = run(uncond_pipe, uncond_model, 8)
    start = time.perf_counter()
    with sampling.timed(uncond_pipe.unet) as seconds:
        samples = run(uncond_pipe, uncond_model, 8)
    assert len(seconds) == 2 * uncond_model.steps and min(seconds) > 0
    assert sum(seconds) < time.perf_counter() - start
    np.testing.assert_array_equal(samples[1], plain[1])
    assert not uncond_pipe.unet._forward_hooks and not uncond_pipe.unet._forward_pre_hooks


@pytest.mark.parametrize("kind", ["uncond", "text"])
def test_another_scheduler_than_the_protocol_s(kind, request):
    model, pipe = request.getfixturevalue(f"{kind}_model"), copy.copy(request.getfixturevalue(f"{kind}_pipe"))
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match=f"a EulerDiscreteScheduler is not the sampler {model.sampler}"):
        sampling.generate(pipe, model, "evaluation", 4)


@pytest.mark.parametrize(
    "field, value",
    [("steps", -5), ("steps", 0), ("steps", 2.5), ("batch_size", True), ("eta", float("nan")), ("eta", 1.5)]
    + [("guidance", value) for value in (float("nan"), float("inf"), 0.5, -1.0)],
)
def test_a_protocol_that_no_sampler_follows(field, value, uncond_model):
    with pytest.raises(ValueError, match=f"tiny-uncond: {field}: "):
        replace(uncond_model, **{field: value})


def test_an_empty_caption(text_pipe, text_model):
    model = replace(text_model, source=lambda _split, start, stop: ["a", " ", "b", "c"][start:stop])
    with pytest.raises(ValueError, match="split 'evaluation' has an empty caption, of image 1"):
        sampling.generate(text_pipe, model, "evaluation", 4)


@pytest.mark.parametrize("steps, eta", [(-5, 0.0), (0, 0.0), (2.5, 0.0), (5, 1.5), (5, float("nan"))])
def test_a_sampler_s_own_arguments(steps, eta):
    scheduler = QuadraticDDIMScheduler()
    with pytest.raises(ValueError, match="num_inference_steps|eta"):
        scheduler.set_timesteps(steps)
        scheduler.step(torch.zeros(1, 3, 4, 4), scheduler.timesteps[0], torch.zeros(1, 3, 4, 4), eta=eta)


def test_images_are_decoded_in_chunks_that_fit(kind, monkeypatch):
    """One image at a time is summed up in another order, so that values are rounded to the next level."""
    pipe, model, _ = kind
    indices, latents, images = run(pipe, model, 6)
    whole, pieces = type(pipe.vae).decode, []
    monkeypatch.setattr(
        type(pipe.vae), "decode", lambda vae, z, *a, **k: pieces.append(len(z)) or whole(vae, z, *a, **k)
    )
    widths = pipe.vae.config.block_out_channels
    one = max(widths[:2]) * latents[0, 0].size * 4 ** (len(widths) - 1) * 4  # bytes of the largest tensor of an image
    for budget, sizes in ((10 * one, [1, 1, 1, 1]), (16 * 3 * one, [3, 1]), (16 * 4 * one, [4])):
        monkeypatch.setenv(memory.VARIABLE, str(budget))
        pieces.clear()
        decoded = sampling.decode(pipe, torch.from_numpy(latents[:4]))
        again = run(pipe, model, 6)
        assert pieces == 3 * sizes and np.array_equal(again[1], latents)
        for found, expected in ((decoded, images[:4]), (again[2], images)):
            differ = np.abs(found.astype(int) - expected)
            assert differ.max() <= (len(sizes) > 1) and (differ > 0).mean() < 0.01
        assert "decode" not in vars(pipe.vae)
    with sampling.decoding_in_chunks(None):  # of a pipeline without an autoencoder
        pass
