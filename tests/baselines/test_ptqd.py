"""PTQD's statistics and its corrected schedulers."""

import copy

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler

from baselines.ptqd import fit, statistics
from quest.diffusion.samplers import Correction, correct, restore, state
from quest.diffusion.sampling import arguments

T, C = 10, 4


def scheduler(**config):
    return DDIMScheduler(
        **(
            {"beta_schedule": "scaled_linear", "steps_offset": 1, "clip_sample": False, "set_alpha_to_one": False}
            | config
        )
    )


def constant(timesteps, slope=0.0, bias=0.0, std=0.0) -> Correction:
    n = len(timesteps)
    values = torch.full((n,), slope), torch.full((n, C), bias), torch.full((n,), std), torch.ones(n)
    return Correction(torch.tensor(timesteps), *values)


def steps(n=T):
    plain = scheduler()
    plain.set_timesteps(n)
    return plain.timesteps.tolist()


def test_the_fit_finds_what_was_put_in_and_the_mean_error_vanishes():
    torch.manual_seed(0)
    exact = torch.randn(64, C, 8, 8) + 0.3
    bias = torch.tensor([0.1, -0.2, 0.0, 0.05])
    found = 1.25 * exact + bias[:, None, None] + 0.07 * torch.randn_like(exact)
    slope, measured, std, r_squared = fit(exact, found)
    assert abs(slope - 0.25) < 0.01
    assert torch.allclose(measured, bias, atol=0.01)
    assert abs(std**2 - 0.07**2 - bias.var(correction=0)) < 5e-4  # the spread over the channels is part of it
    assert abs(r_squared - 0.25**2 / (0.25**2 + std**2)) < 0.01
    corrected = (found - measured[:, None, None]) / (1 + slope)
    assert (corrected - exact).mean((0, 2, 3)).abs().max() < 1e-5
    # The released code's bias counts slope * mean(exact) twice.
    _, released, _, _ = fit(exact, found, "error")
    left = (((found - released[:, None, None]) / (1 + slope)) - exact).mean()
    assert abs(left + slope / (1 + slope) * exact.mean()) < 1e-4 and abs(left) > 0.05


def test_a_prediction_that_shrinks_is_not_stretched():
    exact = torch.randn(8, C, 4, 4, generator=torch.Generator().manual_seed(0))
    assert fit(exact, 0.9 * exact)[0] == 0


@pytest.mark.parametrize("std", [0.0, 0.05, 0.3, 50.0])
def test_injected_and_quantization_noise_add_up_to_the_full_precision_variance(std):
    slope = 0.2
    plain, corrected = scheduler(), correct(scheduler(), constant(steps(), slope=slope, std=std))
    zero, one = torch.zeros(1, C, 1, 1), torch.ones(1, C, 1, 1)
    positive = 0
    for s in (plain, corrected):
        s.set_timesteps(T)
    for t in plain.timesteps.tolist():

        def step(scheduler, prediction, noise, t=t):
            return scheduler.step(prediction, t, zero, eta=1.0, variance_noise=noise).prev_sample[0, 0, 0, 0].item()

        # A step is linear: its coefficients are what it makes of ones.
        origin = step(plain, zero, zero)
        injected, coefficient = step(plain, zero, one) - origin, step(plain, one, zero) - origin
        less = step(corrected, zero, one) - step(corrected, zero, zero)
        arrives = coefficient * std / (1 + slope)
        if injected**2 > arrives**2:
            assert less**2 + arrives**2 == pytest.approx(injected**2, rel=1e-4)
            positive += 1
        else:
            assert less == 0
    assert positive > 0 if std < 1 else positive == 0


def test_the_mean_correction_is_what_the_sampler_sees():
    corrected, plain = correct(scheduler(), constant(steps(), slope=0.25, bias=0.1)), scheduler()
    for s in (corrected, plain):
        s.set_timesteps(T)
    x, exact = torch.randn(2, 1, C, 4, 4, generator=torch.Generator().manual_seed(0))
    t = steps()[3]
    found = 1.25 * exact + 0.1
    a, b = corrected.step(found, t, x).prev_sample, plain.step(exact, t, x).prev_sample
    assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("kind", ["uncond", "text"])
def test_nothing_to_correct_changes_nothing(kind, request):
    """Same random numbers, same images: with DDIM at eta 1 (uncond) and with PLMS (text)."""
    pipe, model = request.getfixturevalue(f"{kind}_pipe"), request.getfixturevalue(f"{kind}_model")
    calibration = request.getfixturevalue(f"{kind}_calibration")
    other = copy.copy(pipe)
    other.scheduler = correct(pipe.scheduler, constant(calibration.timesteps))
    a, b = (p(**arguments(p, model, "evaluation", [0, 1]), output_type="latent").images for p in (pipe, other))
    assert torch.equal(a, b)


@pytest.mark.parametrize("kind, guidance", [("uncond", None), ("class", 3.0), ("text", 3.0)])
def test_full_precision_has_no_error(kind, guidance, request):
    """Pairs the halves of a call rightly, or the guided predictions would differ."""
    pipe, calibration = request.getfixturevalue(f"{kind}_pipe"), request.getfixturevalue(f"{kind}_calibration")
    measured = statistics(pipe.unet, calibration, guidance, batch=5)
    assert measured.timesteps.tolist() == calibration.timesteps and measured.bias.shape == (
        len(calibration.timesteps),
        4,
    )
    assert max(v.abs().max() for v in (measured.slope, measured.bias, measured.std)) < 1e-4


def test_guidance_must_fit_the_trajectories(uncond_pipe, uncond_calibration, class_pipe, class_calibration):
    with pytest.raises(ValueError, match="guidance.*guided"):
        statistics(class_pipe.unet, class_calibration, None)
    with pytest.raises(ValueError, match="guidance: 3.0"):
        statistics(uncond_pipe.unet, uncond_calibration, 3.0)


def test_steps_without_statistics_are_refused():
    corrected = correct(scheduler(), constant(steps()))
    with pytest.raises(ValueError, match="without statistics"):
        corrected.set_timesteps(7)
    with pytest.raises(ValueError, match="timestep 3 has no statistics"):
        corrected.correction.at(3)


def test_what_cannot_be_corrected():
    with pytest.raises(ValueError, match="EulerDiscreteScheduler.*DDIMScheduler"):
        correct(EulerDiscreteScheduler(), constant(steps()))
    with pytest.raises(ValueError, match="prediction_type"):
        correct(scheduler(prediction_type="v_prediction"), constant(steps()))
    with pytest.raises(ValueError, match="clip_sample"):
        correct(scheduler(clip_sample=True), constant(steps()))


def test_state_and_restore():
    correction = constant(steps(), slope=0.1, bias=0.2, std=0.3)
    tensors = state(correct(scheduler(), correction))
    again = restore(scheduler(), tensors)
    assert all(torch.equal(a, b) for a, b in zip(again.correction, correction, strict=True))
    plain = scheduler()
    assert state(plain) == {} and restore(plain, {}) is plain
    with pytest.raises(ValueError, match="needed: timesteps, slope, bias, std"):
        restore(plain, {k: v for k, v in tensors.items() if k != "std"})
