"""EfficientDM: low-rank updates that merge, one scale per step, distillation that helps."""

import pytest
import torch

import quest
from baselines import efficient_dm
from baselines.efficient_dm import add_low_rank
from quest.affine import QuantSpec
from quest.metrics.noise_prediction import eps_error
from quest.quantization import checkpoint
from quest.quantization.layers import QuantLinear, input_quantizers, quant_layers, quantized

FAST = dict(samples=8, batch=4)


def test_an_update_starts_at_zero_and_merges():
    torch.manual_seed(0)
    layer = quantized(torch.nn.Linear(12, 8), QuantSpec(4, axis=0), QuantSpec(8), None).requires_grad_(False)
    before = layer.weight.clone()
    update = add_low_rank(layer, 3, torch.Generator().manual_seed(0))
    assert update.a.shape == (3, 12) and update.b.shape == (8, 3)
    assert torch.equal(layer.weight, before)
    with torch.no_grad():
        update.b.normal_()
    layer.weight.sum().backward()
    assert update.a.grad.abs().sum() > 0 and update.b.grad.abs().sum() > 0
    expected = before + update.b @ update.a
    layer.choose_weight_range()
    layer.freeze()
    assert type(layer) is QuantLinear and torch.allclose(layer.float_weight, expected)
    assert set(layer.state_dict()) == {
        "codes",
        "bias",
        *(f"{q}_quantizer.{t}" for q in ("weight", "input") for t in ("scale", "zero_point")),
    }


def test_an_update_of_a_convolution_has_at_most_full_rank():
    layer = quantized(torch.nn.Conv2d(2, 6, 3), QuantSpec(4, axis=0), QuantSpec(8), None)
    update = add_low_rank(layer, 32, torch.Generator())
    assert update.a.shape == (6, 18) and layer.weight.shape == (6, 2, 3, 3)


@pytest.fixture(scope="module")
def calibration(uncond_calibration, first_calls):
    return first_calls(uncond_calibration)


@pytest.fixture(scope="module")
def runs(uncond_pipe, calibration):
    """Without training, and after eight rounds of the two steps."""
    recipe = dict(FAST, lr_update=1 / 250)
    return [efficient_dm.quantize(uncond_pipe, calibration, 4, 4, iterations=n, **recipe) for n in (0, 16)]


def test_what_is_learned(runs):
    start, end = (checkpoint.state(run.unet, floats=True) for run in runs)
    moved = {k for k in start if not torch.equal(start[k], end[k])}
    tuned = {n for n, _ in quant_layers(runs[0].unet)} - {"conv_in", "conv_out"}
    scales = {f"{n}.scale" for n in input_quantizers(runs[0].unet)}
    assert {f"{n}.weight" for n in tuned} <= moved
    assert {f"{n}.weight_quantizer.scale" for n in tuned} <= moved
    assert {k for k in scales if (start[k] != end[k]).all()} >= scales - {"conv_out.input_quantizer.scale"}
    assert moved <= {f"{n}.{p}" for n in tuned for p in ("weight", "weight_quantizer.scale")} | scales
    assert all((end[k] > 0).all() for k in end if k.endswith("scale"))


def test_the_start_is_the_dequantized_weight(runs):
    """QALoRA's base weight is what the codes mean, so that W0 + 0 has the codes of W."""
    for name, layer in quant_layers(runs[0].unet):
        assert torch.allclose(layer.float_weight, layer.operand, atol=1e-6), name


def test_one_scale_for_each_step(runs, calibration):
    assert all(len(q.scale) == len(calibration.timesteps) for q in input_quantizers(runs[1].unet).values())


def test_distillation_lowers_the_error(runs, calibration):
    before, after = (eps_error(run, calibration)[0].mean() for run in runs)
    assert after < 0.95 * before, (before, after)


def test_what_was_learned_is_counted(runs):
    (stage,) = runs[1].unet.stages
    layers = [m for n, m in quant_layers(runs[1].unet) if n not in ("conv_in", "conv_out")]
    updates = sum(min(32, *w.shape) * sum(w.shape) for w in (m.float_weight.flatten(1) for m in layers))
    scales = sum(m.weight_quantizer.scale.numel() for m in layers)
    scales += sum(q.scale.numel() for q in input_quantizers(runs[1].unet).values())
    assert stage == {"stage": "distillation", "parameters": updates + scales, "iterations": 16, "batch": 4}


def test_divergence_names_stage_and_iteration(uncond_pipe, calibration):
    with pytest.raises(FloatingPointError, match="distillation, iteration 1: the loss is nan"):
        efficient_dm.quantize(uncond_pipe, calibration, 4, 4, iterations=2, lr_update=float("inf"), **FAST)


def test_zero_points_are_learned_and_stay_whole_numbers(runs, uncond_pipe, calibration):
    learned = efficient_dm.quantize(
        uncond_pipe, calibration, 4, 4, iterations=8, lr_update=1 / 250, lr_zero_point=0.05, **FAST
    )
    before, after = input_quantizers(runs[0].unet), input_quantizers(learned.unet)
    moved = [name for name, q in after.items() if not torch.equal(q.zero_point, before[name].zero_point)]
    assert len(moved) > len(after) / 4, moved
    for name, q in after.items():
        assert torch.equal(q.zero_point, q.zero_point.round()) and not q.zero_point.requires_grad, name
        assert torch.equal(runs[1].unet.get_submodule(name).zero_point, before[name].zero_point), name
    assert learned.unet.stages[0]["parameters"] > runs[1].unet.stages[0]["parameters"]


def test_it_starts_from_weights_that_are_split(class_pipe, class_calibration, first_calls, tmp_path):
    """Loading them replaces layers, of which the new ones are learned."""
    calibration = first_calls(class_calibration)
    rounded = quest.quantize(class_pipe, "adaround", "w4a32", calibration=calibration, weight_iterations=0)
    quest.save(rounded, tmp_path / "start.safetensors", floats=True)
    recipe = dict(FAST, init=str(tmp_path / "start.safetensors"), guidance=3.0, lr_update=1 / 250)
    start, end = (
        quest.quantize(class_pipe, "efficient-dm", "w4a4", calibration=calibration, iterations=n, **recipe).unet
        for n in (0, 3)
    )
    halves = [name for name, _ in quant_layers(end) if name.endswith(".skip")]
    assert halves
    for name in halves:
        assert not torch.equal(start.get_submodule(name).float_weight, end.get_submodule(name).float_weight), name


def test_unknown_preset(uncond_pipe, calibration):
    with pytest.raises(ValueError, match="preset.*full, short"):
        quest.quantize(uncond_pipe, "efficient-dm", "w4a4", calibration=calibration, preset="medium")


@pytest.mark.parametrize("bits", [8, 32])
def test_layers_that_all_keep_their_bits_leave_none_to_update(bits, uncond_pipe, calibration):
    with pytest.raises(ValueError, match="keep: it names every layer, .*; valid: globs that leave some out"):
        quest.quantize(uncond_pipe, "efficient-dm", "w4a4", calibration=calibration, keep={"*": bits})


def test_scales_of_channels_are_learned_too(uncond_pipe, calibration):
    recipe = dict(FAST, lr_update=1 / 250, granularity="released")
    start, end = (efficient_dm.quantize(uncond_pipe, calibration, 4, 4, iterations=n, **recipe).unet for n in (0, 2))
    before, after = start.conv_out.input_quantizer, end.conv_out.input_quantizer
    channels = uncond_pipe.unet.conv_out.in_channels
    groups = len(calibration.timesteps)
    assert before.spec.axis == 1 and before.scale.shape == after.scale.shape == (groups, 1, channels, 1, 1)
    moved = [
        name for name, q in input_quantizers(start).items() if (q.scale != input_quantizers(end)[name].scale).any()
    ]
    assert len(moved) > len(input_quantizers(start)) / 2
