"""Block reconstruction: its loss, and what each pass may touch."""

import gc
from pathlib import Path

import pytest
import torch
from torch import nn

from quest.learning import reconstruction
from quest.learning import units as units_module
from quest.learning.adam import Descent
from quest.learning.calibrate import calibrate
from quest.learning.reconstruction import error, learn_rounding, reconstruct_activations, reconstruct_weights
from quest.learning.units import units
from quest.quantization import ranges
from quest.quantization.layers import input_quantizers, quant_layers
from quest.quantization.swapping import swap
from quest.quantization.timegroups import TimeGroups, grouped
from quest.runtime.memory import Waiting


def generator():
    return torch.Generator().manual_seed(0)


def test_the_loss_sums_over_dimension_1():
    a, b = torch.randn(2, 3, 5, 4, 4, generator=generator()).unbind(0)
    difference = a - b
    assert error(a, b, 2).item() == pytest.approx(difference.square().sum().item() / (3 * 4 * 4), rel=1e-5)
    assert error(a, b, 2.4).item() == pytest.approx(difference.abs().pow(2.4).sum().item() / (3 * 4 * 4), rel=1e-5)
    a[0] = b[0]
    by_hand, automatic = (a.clone().requires_grad_() for _ in range(2))
    error(by_hand, b, 2.4).backward()
    ((automatic - b).abs().pow(2.4).sum() / (3 * 4 * 4)).backward()
    torch.testing.assert_close(by_hand.grad, automatic.grad, rtol=1e-4, atol=1e-7)


def test_adaround_beats_the_nearest_codes(layer_of):
    """A layer whose inputs are correlated: the case where nearest rounding is not the best."""
    g = generator()
    x = torch.randn(256, 6, generator=g) @ torch.randn(6, 24, generator=g)
    q = layer_of(torch.randn(8, 24, generator=g), 3)
    full, before = nn.functional.linear(x, q.weight, q.bias), q.weight.clone()
    nearest = error(q(x), full, 2).item()
    descent = Descent(400, 32, 0.05, g)
    first, last = learn_rounding("unit", {"layer": q}, lambda r: q(x[r]), lambda r: full[r], 256, descent)
    assert first == pytest.approx(nearest, rel=1e-5) and last < 0.8 * first
    assert last == pytest.approx(error(q(x), full, 2).item(), rel=1e-5)
    assert ((q.weight - before).abs() <= 0.5001 * q.weight_quantizer.scale[0]).all()


def test_a_diverging_unit_is_named(layer_of):
    q = layer_of(torch.randn(8, 24, generator=generator()), 4)
    target = torch.full((10, 8), torch.nan)
    with pytest.raises(FloatingPointError, match="AdaRound, unit up.conv, iteration 0"):
        run = lambda r: q(torch.ones(len(r), 24))  # noqa: E731
        learn_rounding("up.conv", {"": q}, run, lambda r: target[r], 10, Descent(3, 4, 0.1, generator()))


@pytest.fixture(params=["uncond", "class"])
def case(request):
    return request.getfixturevalue(f"{request.param}_pipe"), request.getfixturevalue(f"{request.param}_calibration")


def student(pipe, calibration, w=3, a=4, groups=None, **swapping):
    q = swap(pipe, w, a, groups=groups, **swapping)
    for _, layer in quant_layers(q.unet):
        layer.choose_weight_range(ranges.mse)
    calibrate(q.unet, calibration, ranges.mse, samples=16, seed=0)
    return q.unet


def state(denoiser):
    return {k: v.clone() for k, v in denoiser.state_dict().items()}


def test_the_weight_pass_learns_roundings_and_nothing_else(case):
    pipe, calibration = case
    denoiser = student(pipe, calibration)
    before, full = state(denoiser), state(pipe.unet)
    drawn = calibration.subset(torch.arange(0, len(calibration), 3))
    only = [name for name, _ in quant_layers(denoiser) if not name.endswith("time_emb_proj")]
    errors = reconstruct_weights(denoiser, pipe.unet, drawn, Descent(12, 8, 0.5, generator()), only)
    moved = 0
    for name, value in denoiser.state_dict().items():
        if not name.endswith(".weight") or name.removesuffix(".weight") not in dict(quant_layers(denoiser)):
            assert torch.equal(value, before[name]), name
        else:
            layer = denoiser.get_submodule(name.removesuffix(".weight"))
            scale = layer.weight_quantizer.scale[0]
            assert ((value - full[name]).abs() <= 0.5001 * scale + 1e-6).all() or torch.equal(value, full[name])
            moved += not torch.equal(value, full[name])
            assert not name.endswith("time_emb_proj.weight") or torch.equal(value, full[name])
    assert moved > 10 and all(last <= first for first, last in errors.values())
    assert sum(last < 0.9 * first for first, last in errors.values()) > len(errors) / 3
    assert all(torch.equal(v, full[k]) for k, v in pipe.unet.state_dict().items())
    assert all(layer.operand is None for _, layer in quant_layers(denoiser))
    assert not any("forward" in m.__dict__ for m in denoiser.modules())  # nothing stands in for a unit any more
    again = student(pipe, calibration)
    reconstruct_weights(again, pipe.unet, drawn, Descent(12, 8, 0.5, generator()), only)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in denoiser.state_dict().items())


def in_files() -> int:
    """Temporary files without a name that this process has in memory."""
    return sum("(deleted)" in line for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines())


def test_where_tensors_wait_and_what_streams_changes_no_bit(case, monkeypatch):
    """In memory or in files, all rows at once or in chunks between the units, as long as units see the same chunks."""
    pipe, calibration = case
    drawn = calibration.subset(torch.arange(0, len(calibration), 2))
    monkeypatch.setattr(units_module, "CHUNK", 5)
    found, before = {}, in_files()
    whole = lambda _self, operation, _types, args=(), kwargs=None: operation(*args, **(kwargs or {}))  # noqa: E731
    for kind, budget in (("memory", 2**40), ("files", 0), ("whole", 2**40)):
        waiting = Waiting(budget)
        monkeypatch.setattr(reconstruction.memory, "waiting", lambda _device, waiting=waiting: waiting)
        if kind == "whole":
            monkeypatch.setattr(units_module.Streamed, "__torch_dispatch__", whole)
        denoiser = student(pipe, calibration)
        g = generator()
        errors = reconstruct_weights(denoiser, pipe.unet, drawn, Descent(2, 4, 0.5, g))
        steps = reconstruct_activations(denoiser, pipe.unet, drawn, Descent(2, 4, 1e-2, g))
        found[kind] = (errors, steps, state(denoiser), waiting)
        assert in_files() == before and waiting.held == waiting.in_memory == 0
    for kind in ("files", "whole"):
        assert found[kind][:2] == found["memory"][:2]
        assert all(torch.equal(v, found[kind][2][k]) for k, v in found["memory"][2].items())
    assert found["files"][3].most == found["memory"][3].most > found["whole"][3].most


def test_files_are_gone_after_an_exception(uncond_pipe, uncond_calibration, monkeypatch):
    waiting, seen, before = Waiting(0), [], in_files()
    monkeypatch.setattr(reconstruction.memory, "waiting", lambda _device: waiting)

    def fail(*_args):
        seen.append(in_files())
        raise FloatingPointError("diverged")

    monkeypatch.setattr(reconstruction, "learn_rounding", fail)
    denoiser = student(uncond_pipe, uncond_calibration)
    descent = Descent(1, 4, 0.1, generator())
    with pytest.raises(FloatingPointError, match="diverged"):
        reconstruct_weights(denoiser, uncond_pipe.unet, uncond_calibration.subset(torch.arange(8)), descent)
    gc.collect()
    assert seen[0] > before and in_files() == before and waiting.held == 0
    assert not any("forward" in m.__dict__ for m in denoiser.modules())


def test_the_input_of_a_unit_comes_from_the_quantized_network_and_its_target_from_full_precision(
    class_pipe, class_calibration
):
    """Seen at the last unit: with no iterations, its input is what the weight-quantized network gives it."""
    denoiser = student(class_pipe, class_calibration, a=32, softmax_bits=32)
    rows, seen = torch.arange(6), []
    original = reconstruction.learn_rounding

    def look(name, layers, run, target, n, *_):
        if name == "conv_out":
            seen.append((run(torch.arange(n)), target(torch.arange(n))))
        return 0.0, 0.0

    reconstruction.learn_rounding = look
    try:
        descent = Descent(1, 4, 0.1, generator())
        reconstruct_weights(denoiser, class_pipe.unet, class_calibration.subset(rows), descent)
    finally:
        reconstruction.learn_rounding = original
    inputs = class_calibration.inputs(rows)
    torch.testing.assert_close(seen[0][0], denoiser(**inputs).sample, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(seen[0][1], class_pipe.unet(**inputs).sample, rtol=1e-4, atol=1e-4)
    assert (seen[0][0] - seen[0][1]).abs().max() > 1e-2


def test_the_weight_pass_does_not_mind_time_groups(uncond_pipe, uncond_calibration):
    plain, timed = (
        student(uncond_pipe, uncond_calibration, groups=groups)
        for groups in (None, TimeGroups(grouped(uncond_calibration.timesteps, 3)))
    )
    for denoiser in (plain, timed):
        descent = Descent(2, 4, 0.2, generator())
        reconstruct_weights(denoiser, uncond_pipe.unet, uncond_calibration.subset(torch.arange(8)), descent)
    weights = [{n: m.weight for n, m in quant_layers(d)} for d in (plain, timed)]
    assert all(torch.equal(w, weights[1][n]) for n, w in weights[0].items())


def test_every_time_group_learns_its_steps_on_its_own_rows(uncond_pipe, uncond_calibration, monkeypatch):
    groups = TimeGroups(grouped(uncond_calibration.timesteps, 3))
    timed, seen = student(uncond_pipe, uncond_calibration, groups=groups), []

    def look(name, quantizers, run, target, n, descent, *_):
        seen.append((name, groups.number, descent.iterations, run(torch.arange(n)), target(torch.arange(n))))
        return float(groups.number), 0.0

    monkeypatch.setattr(reconstruction, "learn_steps", look)
    descent = Descent(10, 4, 4e-4, generator())
    drawn = uncond_calibration.subset(torch.arange(len(uncond_calibration)).flip(0))
    errors = reconstruct_activations(timed, uncond_pipe.unet, drawn, descent)
    assert [(g, n) for name, g, n, _, _ in seen] == [(0, 3), (1, 3), (2, 4)] * len(errors)
    assert set(errors.values()) == {(1.0, 0.0)}  # means over the groups
    for g, output, target in [(g, output, target) for name, g, _, output, target in seen if name == "conv_in"]:
        own = drawn.sample[groups.index(drawn.timestep) == g]
        groups.enter(groups.starts[g])
        assert len(own) == 8
        torch.testing.assert_close(target, uncond_pipe.unet.conv_in(own))
        torch.testing.assert_close(output, timed.conv_in(own))
    with pytest.raises(ValueError, match="no calibration row of time group 0"):
        reconstruct_activations(timed, uncond_pipe.unet, drawn.subset(torch.arange(8)), descent)


def test_the_activation_pass_learns_scales_and_nothing_else(case):
    """From whole ranges, which 4 bits are too few for."""
    pipe, calibration = case
    denoiser = student(pipe, calibration, keep={"conv_in": 8, "*.processor": [4, 16]})
    calibrate(denoiser, calibration, ranges.minmax, samples=16, seed=0)
    before = state(denoiser)
    drawn = calibration.subset(torch.arange(0, len(calibration), 3))
    descent = Descent(12, 8, 2e-2, generator())
    errors = reconstruct_activations(denoiser, pipe.unet, drawn, descent)
    changed = {k for k, v in denoiser.state_dict().items() if not torch.equal(v, before[k])}
    scales = {f"{n}.scale" for n in input_quantizers(denoiser)}
    assert changed <= scales and len(changed) > len(scales) / 3
    assert not any(n.endswith("processor.p.scale") for n in changed)  # 16 bits are left alone
    assert any(n.endswith("processor.q.scale") for n in changed)
    assert len(errors) == len(units(denoiser, calibration.inputs(torch.arange(1))))
    assert all(last <= first for first, last in errors.values())
    assert sum(last < 0.95 * first for first, last in errors.values()) > len(errors) / 3
    assert not any(p.requires_grad for p in denoiser.parameters())
    assert denoiser.stages[-1]["stage"] == "activation steps" and denoiser.stages[-1]["iterations"] == 12
