"""AdaRound and block reconstruction: golden alphas and weights, the units, and what each pass may touch."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from quest import ranges, reconstruction
from quest.affine import QuantSpec, quantize
from quest.calibration import calibrate
from quest.layers import attentions, input_quantizers, quant_layers, quantized, swap
from quest.reconstruction import (
    Rounding,
    beta,
    error,
    learn_rounding,
    reconstruct_activations,
    reconstruct_weights,
    units,
)
from quest.timegroups import TimeGroups, grouped

GOLDEN = {k: torch.from_numpy(v) for k, v in np.load(Path(__file__).parent / "golden" / "quantizers.npz").items()}
ROUNDED = sorted(k.removesuffix(".alpha") for k in GOLDEN if k.endswith(".alpha"))


def generator():
    return torch.Generator().manual_seed(0)


def layer(weight, bits):
    """A quantized layer of this weight with its MSE ranges."""
    new = nn.Linear(weight.shape[1], len(weight)) if weight.ndim == 2 else nn.Conv2d(weight.shape[1], len(weight), 3)
    new.weight.data = weight.clone()
    q = quantized(new.requires_grad_(False), QuantSpec(bits, axis=0), QuantSpec(32), None)
    q.choose_weight_range(ranges.mse)
    return q


@pytest.mark.parametrize("case", ROUNDED)
def test_adaround_starts_as_the_released_quantizer(case):
    _, bits, name = case.split(".")
    q = layer(GOLDEN[f"input.{name}"], int(bits[1:]))
    rounding = Rounding([q])
    torch.testing.assert_close(unflatten(rounding.alpha, [q.weight])[0], GOLDEN[f"{case}.alpha"], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(rounding.soft(None)[0], GOLDEN[f"{case}.soft"], rtol=1e-5, atol=1e-6)
    q.weight.data = rounding.folded()[0]
    torch.testing.assert_close(q.qweight.dequantize(), GOLDEN[f"{case}.hard"], rtol=1e-5, atol=1e-6)


def unflatten(flat, like):
    """The parts of a flat tensor whose values lie channels innermost, in the shapes of `like`."""
    parts = flat.split([w.numel() for w in like])
    return [part.view(w.movedim(1, -1).shape).movedim(-1, 1) for part, w in zip(parts, like, strict=True)]


def test_there_is_golden_data_for_each_layer_and_width():
    assert ROUNDED == [f"adaround.{bits}.{name}" for bits in ("w4", "w8") for name in ("w_conv", "w_linear")]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_soft_weights_start_as_the_float_ones_and_hard_ones_as_the_nearest(bits):
    q = layer(torch.randn(9, 40, generator=generator()), bits)
    scale, zero_point, spec = q.weight_quantizer.qparams
    low, high = (spec.qmin - zero_point) * scale, (spec.qmax - zero_point) * scale
    rounding = Rounding([q])
    soft = rounding.soft(None)
    inside = (q.weight >= low) & (q.weight <= high)
    assert (soft[0] - q.weight)[inside].abs().max() < 1e-5 and inside.float().mean() > 0.7
    nearest = q.qweight.codes
    folded = rounding.folded()[0]
    assert torch.equal(quantize(folded, q.weight_quantizer.qparams).codes, nearest)
    # The fold moves a weight by half a step at most, and keeps its place between two codes.
    assert ((folded - q.weight).abs() <= 0.5001 * scale).all()


@pytest.mark.parametrize("bits", [2, 4])
def test_folded_weights_round_to_the_learned_codes(bits):
    """For any rounding, clipped weights and ties included."""
    g = generator()
    q = layer(torch.randn(9, 40, generator=g), bits)
    scale, zero_point, spec = q.weight_quantizer.qparams
    q.weight.data[:, ::5] = (torch.randint(-9, 9, (9, 8), generator=g) * scale).expand(9, 8)  # on a code: a tie
    rounding = Rounding([q])
    rounding.alpha = torch.randn(rounding.alpha.shape, generator=g)
    up = (rounding.alpha >= 0).float().view_as(q.weight)
    learned = ((q.weight / scale).floor() + up + zero_point).clamp(spec.qmin, spec.qmax)
    assert torch.equal(quantize(rounding.folded()[0], q.weight_quantizer.qparams).codes, learned)
    assert not torch.equal(learned, q.qweight.codes)


@pytest.mark.parametrize("exponent", [None, 20.0, 2.0])
def test_gradient_of_the_soft_weights_is_that_of_automatic_differentiation(exponent):
    """With the regulariser's along, which is a sum over all weights; it is off before the exponent is there."""
    g = generator()
    layers = [layer(torch.randn(6, 10, generator=g), 4), layer(torch.randn(3, 2, 3, 3, generator=g), 3)]
    rounding = Rounding(layers)
    rounding.alpha = torch.randn(rounding.alpha.shape, generator=g) * 3
    rounding.alpha[:4] = 0  # h = 1/2: the regulariser's slope is 0
    upstream = torch.randn(rounding.alpha.shape, generator=g)
    by_hand, automatic = (rounding.alpha.clone().requires_grad_() for _ in range(2))
    rounding.alpha = by_hand
    soft = torch.cat([w.movedim(1, -1).flatten() for w in rounding.soft(exponent)])
    (soft * upstream).sum().backward()
    h = (torch.sigmoid(automatic) * 1.2 - 0.1).clamp(0, 1)
    weights = []
    for q, part in zip(layers, unflatten(h, [q.weight for q in layers]), strict=True):
        scale, zero_point, spec = q.weight_quantizer.qparams
        codes = ((q.weight / scale).floor() + part + zero_point).clamp(spec.qmin, spec.qmax)
        weights.append(((codes - zero_point) * scale).movedim(1, -1).flatten())
    weights = torch.cat(weights)
    regulariser = (1 - (2 * h - 1).abs().pow(exponent)).sum() if exponent else torch.zeros(())
    ((weights * upstream).sum() + 0.01 * regulariser).backward()
    torch.testing.assert_close(soft, weights, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(by_hand.grad, automatic.grad, rtol=1e-4, atol=1e-6)


def test_the_exponent_falls_from_20_to_2_after_a_fifth():
    assert [beta(i, 1000) for i in (0, 199)] == [None, None]
    assert beta(200, 1000) == 20 and beta(600, 1000) == 11 and beta(1000, 1000) == 2
    assert beta(999, 1000) == pytest.approx(2, abs=0.03)


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


def test_adaround_beats_the_nearest_codes():
    """A layer whose inputs are correlated: the case where nearest rounding is not the best."""
    g = generator()
    x = torch.randn(256, 6, generator=g) @ torch.randn(6, 24, generator=g)
    q = layer(torch.randn(8, 24, generator=g), 3)
    full, before = nn.functional.linear(x, q.weight, q.bias), q.weight.clone()
    nearest = error(q(x), full, 2).item()
    arguments = dict(iterations=400, batch=32, lr=0.05, generator=g)
    first, last = learn_rounding("unit", {"layer": q}, lambda r: q(x[r]), full, **arguments)
    assert first == pytest.approx(nearest, rel=1e-5) and last < 0.8 * first
    assert last == pytest.approx(error(q(x), full, 2).item(), rel=1e-5)
    assert ((q.weight - before).abs() <= 0.5001 * q.weight_quantizer.scale[0]).all()


def test_a_diverging_unit_is_named():
    q = layer(torch.randn(8, 24, generator=generator()), 4)
    target = torch.full((10, 8), torch.nan)
    with pytest.raises(FloatingPointError, match="AdaRound, unit up.conv, iteration 0"):
        run = lambda r: q(torch.ones(len(r), 24))  # noqa: E731
        learn_rounding("up.conv", {"": q}, run, target, iterations=3, batch=4, lr=0.1, generator=generator())


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


def test_units_stand_in_execution_order_and_hold_everything_once(case):
    pipe, calibration = case
    q = swap(pipe, 8, 8).unet
    found = units(q, calibration.inputs(torch.arange(1)))
    names = [u.name for u in found]
    assert names[:3] == ["time_embedding.linear_1", "time_embedding.linear_2", "conv_in"] and names[-1] == "conv_out"
    middle = [i for i, n in enumerate(names) if n.startswith("mid_block")]
    assert max(i for i, n in enumerate(names) if n.startswith("down")) < min(middle)
    assert max(middle) < min(i for i, n in enumerate(names) if n.startswith("up_blocks"))
    assert sorted(n for u in found for n in u.layers) == sorted(n for n, _ in quant_layers(q))
    assert sorted(n for u in found for n in u.quantizers) == sorted(input_quantizers(q))
    whole = {type(m) for u in found for m in u.modules.values() if len(u.modules) < len(u.layers)}
    if any(isinstance(m, BasicTransformerBlock) for m in q.modules()):
        assert whole == {ResnetBlock2D, BasicTransformerBlock}
        assert all(u.layers and len(u.modules) == 1 for u in found)
    else:
        assert whole == {ResnetBlock2D}
        attention = [n for n, _ in attentions(q)]
        for kind, size in (("qkv", 3), ("processor", 1), ("to_out.0", 1)):  # one after the other
            assert [n.removesuffix(f".{kind}") for n in names if n.endswith(kind)] == [
                n for n in sorted(attention, key=lambda n: names.index(f"{n}.qkv"))
            ]
            of = [u for u in found if u.name.endswith(kind)]
            assert all(len(u.modules) == size and bool(u.layers) == (kind != "processor") for u in of)
        at = names.index(f"{attention[0]}.qkv")
        assert names[at : at + 3] == [f"{attention[0]}.{kind}" for kind in ("qkv", "processor", "to_out.0")]


def test_an_unconditional_attention_is_judged_in_the_layout_of_the_paper_s_network():
    """[B, channels, tokens], whether of its layers or of its products' heads."""
    g = generator()
    y = torch.randn(3, 5, 8, generator=g)
    heads = y.unflatten(2, (2, 4)).transpose(1, 2).flatten(0, 1)  # [3 * 2, 5, 4], as a processor has them
    assert torch.equal(reconstruction._channels_first(y, 3), y.transpose(1, 2))
    assert torch.equal(reconstruction._heads_as_channels(heads, 3), y.transpose(1, 2))


def test_the_weight_pass_learns_roundings_and_nothing_else(case):
    pipe, calibration = case
    denoiser = student(pipe, calibration)
    before, full = state(denoiser), state(pipe.unet)
    rows = torch.arange(0, len(calibration), 3)
    exclude = ("*.time_emb_proj",)
    arguments = dict(iterations=12, batch=8, lr=0.5, exclude=exclude)
    errors = reconstruct_weights(denoiser, pipe.unet, calibration, rows, **arguments, generator=generator())
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
    assert all(layer.packed is None for _, layer in quant_layers(denoiser))
    assert not any("forward" in m.__dict__ for m in denoiser.modules())  # nothing stands in for a unit any more
    again = student(pipe, calibration)
    reconstruct_weights(again, pipe.unet, calibration, rows, **arguments, generator=generator())
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in denoiser.state_dict().items())


def test_the_input_of_a_unit_comes_from_the_quantized_network_and_its_target_from_full_precision(
    class_pipe, class_calibration
):
    """Seen at the last unit: with no iterations, its input is what the weight-quantized network gives it."""
    denoiser = student(class_pipe, class_calibration, a=32, softmax_bits=32)
    rows, seen = torch.arange(6), []
    original = reconstruction.learn_rounding

    def look(name, layers, run, target, **_):
        if name == "conv_out":
            seen.append((run(torch.arange(len(target))), target))
        return 0.0, 0.0

    reconstruction.learn_rounding = look
    try:
        arguments = dict(iterations=1, batch=4, lr=0.1, generator=generator())
        reconstruct_weights(denoiser, class_pipe.unet, class_calibration, rows, **arguments)
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
        arguments = dict(iterations=2, batch=4, lr=0.2, generator=generator())
        reconstruct_weights(denoiser, uncond_pipe.unet, uncond_calibration, torch.arange(8), **arguments)
    weights = [{n: m.weight for n, m in quant_layers(d)} for d in (plain, timed)]
    assert all(torch.equal(w, weights[1][n]) for n, w in weights[0].items())


def test_every_time_group_learns_its_steps_on_its_own_rows(uncond_pipe, uncond_calibration, monkeypatch):
    groups = TimeGroups(grouped(uncond_calibration.timesteps, 3))
    timed, seen = student(uncond_pipe, uncond_calibration, groups=groups), []

    def look(name, quantizers, run, target, *, iterations, **_):
        seen.append((name, groups.number, iterations, run(torch.arange(len(target))), target))
        return float(groups.number), 0.0

    monkeypatch.setattr(reconstruction, "learn_steps", look)
    arguments = dict(iterations=10, batch=4, lr=4e-4, generator=generator())
    rows = torch.arange(len(uncond_calibration)).flip(0)
    errors = reconstruct_activations(timed, uncond_pipe.unet, uncond_calibration, rows, **arguments)
    assert [(g, n) for name, g, n, _, _ in seen] == [(0, 3), (1, 3), (2, 4)] * len(errors)
    assert set(errors.values()) == {(1.0, 0.0)}  # means over the groups
    for g, output, target in [(g, output, target) for name, g, _, output, target in seen if name == "conv_in"]:
        own = uncond_calibration.sample[rows][groups.index(uncond_calibration.timestep[rows]) == g]
        groups.enter(groups.starts[g])
        assert len(own) == 8
        torch.testing.assert_close(target, uncond_pipe.unet.conv_in(own))
        torch.testing.assert_close(output, timed.conv_in(own))
    with pytest.raises(ValueError, match="no calibration row of time group 0"):
        reconstruct_activations(timed, uncond_pipe.unet, uncond_calibration, rows[:8], **arguments)


def test_the_activation_pass_learns_scales_and_nothing_else(case):
    """From whole ranges, which 4 bits are too few for."""
    pipe, calibration = case
    denoiser = student(pipe, calibration, keep={"conv_in": 8, "*.processor": [4, 16]})
    calibrate(denoiser, calibration, ranges.minmax, samples=16, seed=0)
    before = state(denoiser)
    rows = torch.arange(0, len(calibration), 3)
    arguments = dict(iterations=12, batch=8, lr=2e-2, generator=generator())
    errors = reconstruct_activations(denoiser, pipe.unet, calibration, rows, **arguments)
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
