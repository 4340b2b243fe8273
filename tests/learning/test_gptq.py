"""GPTQ: what its arithmetic must satisfy, convolutions as linear layers, and what it gains on a model of the zoo."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import quest
from quest.affine import FLOAT, QParams, QuantSpec, quantize
from quest.diffusion import models
from quest.diffusion.calibration_set import collect
from quest.learning import gptq as module
from quest.learning.calibrate import calibrate
from quest.learning.gptq import compensated, gptq, observed, round_weight
from quest.quantization import checkpoint, ranges
from quest.quantization.layers import input_quantizers, quant_layers, quantized
from quest.quantization.splitting import split_layers
from quest.quantization.swapping import swap
from quest.runtime.memory import Waiting


def generator():
    return torch.Generator().manual_seed(0)


def problem(outputs=12, inputs=40, samples=300, bits=3):
    """A weight, correlated inputs [samples, K], their Hessian and the ranges of the weight."""
    g = generator()
    x = torch.randn(samples, 10, generator=g) @ torch.randn(10, inputs, generator=g)
    x += 0.3 * torch.randn(samples, inputs, generator=g)
    weight, spec = torch.randn(outputs, inputs, generator=g), QuantSpec(bits, axis=0)
    hessian = 2 / samples * x.double().T @ x.double()
    return weight, x, hessian, QParams(*ranges.mse(weight, spec), spec)


def values(weight, qparams):
    return quantize(weight, qparams).dequantize()


def loss(weight, rounded, hessian):
    difference = (weight - rounded).double()
    return (difference @ hessian * difference).sum().item()


def test_uncorrelated_inputs_give_the_nearest_codes():
    weight, _, hessian, qparams = problem()
    result = compensated(weight, hessian.diagonal().diag(), qparams)
    assert torch.equal(result, weight)  # so its codes are the nearest, also where a division ends near a tie


def test_the_output_error_falls_and_every_weight_is_on_its_grid():
    weight, x, hessian, qparams = problem()
    rounded = values(compensated(weight, hessian, qparams), qparams)
    assert loss(weight, rounded, hessian) < 0.5 * loss(weight, values(weight, qparams), hessian)
    codes = rounded / qparams.scale + qparams.zero_point
    assert (codes - codes.round()).abs().max() < 1e-4 and codes.min() > -0.5 and codes.max() < 7.5
    nearest = (x @ (weight - values(weight, qparams)).T).square().sum()
    assert (x @ (weight - rounded).T).square().sum() < 0.5 * nearest


def test_it_is_the_recursion_that_removes_one_input_at_a_time():
    """Against optimal brain compression (arXiv:2208.11580), of which it is the fast form: here H^-1 is updated."""
    weight, _, hessian, qparams = problem(outputs=5, inputs=12)
    damped = hessian + module.DAMPING * hessian.diagonal().mean() * torch.eye(12, dtype=torch.float64)
    inverse, left, expected = torch.linalg.inv(damped), weight.double(), torch.empty_like(weight)
    for k in hessian.diagonal().argsort(descending=True).tolist():
        column = QParams(qparams.scale[:, 0], qparams.zero_point[:, 0], qparams.spec)
        expected[:, k] = quantize(left[:, k].float(), column).dequantize()
        left -= torch.outer((left[:, k] - expected[:, k]) / inverse[k, k], inverse[k])
        inverse -= torch.outer(inverse[:, k], inverse[k]) / inverse[k, k]
    assert torch.allclose(values(compensated(weight, hessian, qparams), qparams), expected)


def test_the_order_of_the_inputs_does_not_matter():
    weight, _, hessian, qparams = problem()
    order = torch.randperm(weight.shape[1], generator=generator())
    permuted = compensated(weight[:, order], hessian[order][:, order], qparams)
    expected = values(compensated(weight, hessian, qparams), qparams)
    assert torch.equal(values(permuted, qparams), expected[:, order])


@pytest.mark.parametrize("block", [1, 32, 40])
def test_blocks_change_nothing_but_the_order_of_additions(block):
    weight, _, hessian, qparams = problem()
    expected = compensated(weight, hessian, qparams)
    torch.testing.assert_close(compensated(weight, hessian, qparams, block), expected, rtol=1e-5, atol=1e-6)


def test_scales_may_differ_along_the_inputs():
    """Groups of inputs, whose scales were chosen before: every weight ends on the grid of its own group."""
    weight, _, hessian, qparams = problem()
    groups = weight.view(12, 4, 10).abs().amax(2) / 3
    scale = groups.repeat_interleave(10, 1)
    own = QParams(scale, torch.full_like(scale, 4.0), qparams.spec)
    codes = values(compensated(weight, hessian, own), own) / scale
    assert torch.allclose(codes, codes.round(), atol=1e-5) and codes.abs().max() < 4.5
    assert loss(weight, codes * scale, hessian) < loss(weight, values(weight, own), hessian)


def test_an_input_that_is_always_zero_gets_no_weight():
    weight, x, _, qparams = problem()
    x[:, 7] = 0
    result = compensated(weight, 2 / len(x) * x.double().T @ x.double(), qparams)
    assert (result[:, 7] == 0).all() and (result[:, 6] != 0).all()


def test_a_hessian_without_full_rank_is_damped_more():
    weight, _, hessian, qparams = problem()
    eigenvalues, vectors = torch.linalg.eigh(hessian)
    negative = 2.2 * module.DAMPING * hessian.diagonal().mean()  # the first damping is not enough
    indefinite = hessian - (eigenvalues[0] + negative) * torch.outer(vectors[:, 0], vectors[:, 0])
    assert compensated(weight, indefinite, qparams).isfinite().all()
    with pytest.raises(FloatingPointError, match="cannot be factored, also with 26 times the damping"):
        compensated(weight, -hessian, qparams)


def layer(kind, **shape):
    torch.manual_seed(0)
    float_layer = kind(**shape).requires_grad_(False)
    q = quantized(float_layer, QuantSpec(3, axis=0), QuantSpec(FLOAT), None)
    q.input_quantizer.name = "up.conv"
    q.choose_weight_range(ranges.mse)
    return q


CONVOLUTIONS = [
    dict(kernel_size=3, padding=1),
    dict(kernel_size=(3, 2), stride=2, padding=(2, 1), dilation=(1, 2)),
    dict(kernel_size=1),
    dict(kernel_size=3, padding="same"),
    dict(kernel_size=3, padding=1, groups=2),
]


@pytest.mark.parametrize("shape", CONVOLUTIONS, ids=str)
def test_a_convolution_is_the_linear_layer_of_its_unfolded_input(shape, monkeypatch):
    monkeypatch.setattr(module, "UNFOLDED", 1)  # one row at a time
    conv = layer(nn.Conv2d, in_channels=4, out_channels=6, **shape)
    x = torch.randn(5, 4, 9, 8, generator=generator())
    with observed({"conv": conv}) as hessians:
        y = conv.forward(x)
        conv.forward(x)
    assert hessians["conv"].count == 2 * y[:, 0].numel()
    rows = []  # the gradient of an output with respect to the weight is the unfolded input
    weight = conv.weight.detach().requires_grad_()
    conv_of = conv._conv_forward
    for g in range(conv.groups):
        channel = g * 6 // conv.groups
        outputs = conv_of(x, weight, None)[:, channel].flatten()
        grads = [torch.autograd.grad(o, weight, retain_graph=True)[0][channel].flatten() for o in outputs]
        rows.append(torch.stack(grads).double())
    expected = torch.stack([2 / len(r) * r.T @ r for r in rows])
    torch.testing.assert_close(hessians["conv"].mean(), expected, rtol=1e-4, atol=1e-5)
    result = round_weight(conv, hessians["conv"])
    flat, (scale, zero_point, spec) = conv.weight.flatten(1), conv.weight_quantizer.qparams
    parts = (t.chunk(conv.groups) for t in (flat, scale.flatten(1), zero_point.flatten(1)))
    by_hand = [compensated(w, h, QParams(s, z, spec)) for w, s, z, h in zip(*parts, expected, strict=True)]
    torch.testing.assert_close(result, torch.cat(by_hand).view(conv.weight.shape), rtol=1e-3, atol=1e-3)


def test_a_linear_layer_takes_all_positions_of_its_quantized_input():
    linear = layer(nn.Linear, in_features=6, out_features=3)
    linear.input_quantizer.spec = QuantSpec(4)
    x = torch.randn(2, 5, 6, generator=generator())
    linear.input_quantizer.calibrate(x, ranges.minmax)
    with observed({"": linear}) as hessians:
        linear(x)
    seen = quantize(x, linear.input_quantizer.qparams).dequantize().reshape(-1, 6).double()
    torch.testing.assert_close(hessians[""].mean()[0], 2 / 10 * seen.T @ seen, rtol=1e-5, atol=1e-6)


def test_what_cannot_be_rounded_is_named():
    linear = layer(nn.Linear, in_features=6, out_features=3)
    with observed({"": linear}) as hessians:
        pass
    with pytest.raises(ValueError, match="layer up.conv: no calibration row reaches it"):
        round_weight(linear, hessians[""])
    with observed({"": linear}) as hessians:
        linear(torch.full((2, 6), torch.nan))
    with pytest.raises(FloatingPointError, match="layer up.conv: its calibration input is not finite"):
        round_weight(linear, hessians[""])


@pytest.fixture(scope="module")
def shipped():
    model = replace(models.get("scenes-uncond"), steps=4, batch_size=4)
    pipe = model.load()
    return pipe, collect(pipe, model, "calibration", 4)


def test_on_a_shipped_model_the_errors_of_nearly_all_layers_fall(shipped):
    """At equal ranges: of at least 95 % of the layers, and of all together."""
    pipe, calibration = shipped
    pipe = quest.quantize(pipe, "gptq", "w4a32", calibration=calibration, rows=16)
    thawed = swap(shipped[0], 4, FLOAT)
    layers = dict(quant_layers(thawed.unet))
    for q in layers.values():
        q.choose_weight_range(ranges.mse)
    ratios, total = [], [0.0, 0.0]
    with observed({n: q for n, q in quant_layers(pipe.unet) if n in layers}) as hessians, torch.no_grad():
        pipe.unet(**calibration.inputs(torch.arange(16)))  # inputs of the rounded network: nothing was fitted to them
    for name, q in quant_layers(pipe.unet):
        if name not in layers:
            assert name.rpartition(".")[0] in split_layers(pipe.unet)
            continue
        nearest, h = layers[name], hessians[name].mean()[0]
        assert q.weight_quantizer.scale.equal(nearest.weight_quantizer.scale)
        assert q.weight_quantizer.zero_point.equal(nearest.weight_quantizer.zero_point)
        errors = [loss(nearest.weight.flatten(1), w.dequantize().flatten(1), h) for w in (q.qweight, nearest.qweight)]
        ratios.append(errors[0] / errors[1])
        total = [a + b for a, b in zip(total, errors, strict=True)]
    assert total[0] < total[1] and sum(r < 1 for r in ratios) >= 0.95 * len(ratios)
    assert math.exp(sum(map(math.log, ratios)) / len(ratios)) < 0.8


SOME = {"conv_in": 4, "conv_out": 4, "mid_block.*": 4, "*": 32}  # layers that are rounded; the others stay in float


def student_of(pipe, a=FLOAT):
    student = swap(pipe, 4, a, keep=SOME).unet
    for _, q in quant_layers(student):
        q.choose_weight_range(ranges.mse)
    return student


def test_layers_in_parts_and_rows_in_chunks_have_the_same_hessians(uncond_pipe, uncond_calibration, monkeypatch):
    """Where memory is short; inputs from full precision, and from the network whose earlier layers are rounded.

    Weights keep their nearest codes here: GPTQ's would answer the last bit of a sum with other codes.
    """
    calibration, found = uncond_calibration.subset(torch.arange(0, 24, 3)), {}

    def kept(layer, hessian):
        seen[layer.input_quantizer.name] = hessian.mean()
        return layer.weight

    monkeypatch.setattr(module, "round_weight", kept)
    for room in (2**40, 1):
        monkeypatch.setattr(module.memory, "budget", lambda device, room=room: room)
        monkeypatch.setattr(module.memory, "waiting", lambda device, room=room: Waiting(room))
        for inputs in (False, True):
            student, seen = student_of(uncond_pipe), {}
            gptq(student, calibration, inputs)
            found[room, inputs] = seen
            rounded = {name: q for name, q in quant_layers(student) if q.weight_quantizer.spec.bits < FLOAT}
            assert set(seen) == set(rounded) and not any(q.is_frozen for q in rounded.values())
            total = sum(q.weight.numel() for q in rounded.values())
            assert student.stages == [dict(stage="GPTQ", parameters=total, iterations=1, batch=8)]
    full, after = (found[2**40, inputs] for inputs in (False, True))
    for inputs, expected in ((False, full), (True, after)):
        for name, hessian in found[1, inputs].items():
            torch.testing.assert_close(hessian, expected[name], rtol=1e-3, atol=1e-4 * expected[name].max().item())
    torch.testing.assert_close(after["conv_in"], full["conv_in"])
    assert (after["conv_out"] - full["conv_out"]).norm() > 0.01 * full["conv_out"].norm()


def test_each_layer_sees_the_network_whose_earlier_layers_are_rounded(class_pipe, class_calibration):
    """The Hessian of the last layer is that of the finished network, its quantized activations included."""
    calibration = class_calibration.subset(torch.arange(4))
    student = student_of(class_pipe)
    for q in input_quantizers(student).values():
        q.spec = QuantSpec(4)
    calibrate(student, calibration, ranges.minmax, samples=4, seed=0)
    gptq(student, calibration, True)
    untouched = student_of(class_pipe)
    with observed({"": student.conv_out}) as hessians, torch.no_grad():
        student.forward(**calibration.inputs(torch.arange(4)))
    expected = round_weight(untouched.conv_out, hessians[""])
    torch.testing.assert_close(student.conv_out.weight.data, expected, rtol=1e-3, atol=1e-3)
    gptq(untouched, calibration, False)
    assert (untouched.conv_out.weight - expected).abs().gt(1e-3).float().mean() > 0.2


def test_it_is_a_starting_point_and_splits_shortcuts(uncond_pipe, uncond_calibration, tmp_path):
    made = quest.quantize(uncond_pipe, "gptq", "w4a32", calibration=uncond_calibration, rows=4)
    assert split_layers(made.unet) and all(name.endswith("conv_shortcut") for name in split_layers(made.unet))
    for name, channels in split_layers(made.unet).items():
        whole, halves = uncond_pipe.unet.get_submodule(name).weight, made.unet.get_submodule(name)
        moved = halves.skip.float_weight - whole[:, channels:]
        assert moved.abs().max() > 0 and halves.skip.float_weight.shape == whole[:, channels:].shape
    quest.save(made, tmp_path / "gptq.safetensors", floats=True)
    few = dict(tla_iterations=0, cma_iterations=0, samples=4)
    tuned = quest.quantize(
        uncond_pipe,
        "quest-suite",
        "w4a4",
        calibration=uncond_calibration,
        init=str(tmp_path / "gptq.safetensors"),
        **few,
    )
    own, started = (
        {k: v for k, v in checkpoint.state(p.unet).items() if k.endswith((".codes", "weight_quantizer.scale"))}
        for p in (made, tuned)
    )
    assert own.keys() == started.keys() and all(torch.equal(v, started[k]) for k, v in own.items())
