"""Hadamard rotations: against comfy-kitchen's eager references, and what distinguishes the forms."""

import pytest
import torch
import torch.nn.functional as F
from comfy_kitchen.backends.eager import convrot_w4a4
from comfy_kitchen.backends.eager.svdquant import _unpack_int4_row_major as unpacked
from torch import nn

import quest
from quest.affine import QuantSpec, quantize
from quest.quantization import ranges
from quest.quantization.layers import input_quantizers, quant_layers, quantized
from quest.quantization.prologue import hadamard


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def convrot_layer(plain, block):
    """As the row `convrot` makes it: a rotated layer of symmetric weights, dynamic for each token."""
    layer = quantized(plain.requires_grad_(False), QuantSpec(4, True, 0), QuantSpec(4), None)
    layer.rotate_input(block)
    layer.choose_weight_range(ranges.minmax)
    layer.input_quantizer.make_dynamic(QuantSpec(4, True, layer.channels, rows="token"))
    return layer


@pytest.mark.parametrize("size", [4, 16, 64, 256])
def test_matrices_are_those_of_comfy_kitchen(size):
    assert torch.equal(hadamard(size), convrot_w4a4._build_hadamard(size))


@pytest.mark.parametrize("channels", [48, 96, 144])
def test_dynamic_codes_of_tokens_are_those_of_comfy_kitchen(channels):
    x = random(7, channels) * random(7, 1, seed=1).exp()
    layer = convrot_layer(nn.Linear(channels, 4), 1)
    packed, scales = convrot_w4a4.quantize_signed_int4_rowwise(x)
    own = quantize(x, layer.input_quantizer.qparams)
    assert torch.equal(own.codes.to(torch.int8), unpacked(packed).to(torch.int8))
    assert torch.equal(own.scale.flatten(), scales)


@pytest.mark.parametrize("channels, block", [(64, 16), (128, 64), (192, 4)])
def test_a_rotated_linear_layer_is_that_of_comfy_kitchen(channels, block):
    """Codes of the weight and of the input are equal; scales and outputs but for the order of float additions."""
    plain = nn.Linear(channels, 24)
    packed, scales = convrot_w4a4.quantize_convrot_w4a4_weight(plain.weight.detach(), block)
    x = random(9, channels)
    expected = convrot_w4a4.convrot_w4a4_linear(x, packed, scales, plain.bias.detach(), block)
    layer = convrot_layer(plain, block)
    assert torch.equal(layer.qweight.codes.to(torch.int8), unpacked(packed).to(torch.int8))
    torch.testing.assert_close(layer.qweight.scale.flatten(), scales, rtol=3e-7, atol=0)
    codes, own_scales = convrot_w4a4.quantize_signed_int4_rowwise(
        convrot_w4a4._rotate_activation(x, convrot_w4a4._build_hadamard(block), block)
    )
    own = quantize(layer.prologue(x, -1), layer.input_quantizer.qparams)
    assert torch.equal(own.codes.to(torch.int8), unpacked(codes).to(torch.int8))
    torch.testing.assert_close(own.scale.flatten(), own_scales, rtol=3e-7, atol=0)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_a_rotated_1x1_convolution_is_that_linear_layer_of_its_pixels():
    plain = nn.Conv2d(64, 24, 1)
    weight, x = plain.weight.detach().flatten(1).clone(), random(2, 64, 3, 3)
    packed, scales = convrot_w4a4.quantize_convrot_w4a4_weight(weight, 16)
    pixels = x.permute(0, 2, 3, 1).flatten(0, 2)
    expected = convrot_w4a4.convrot_w4a4_linear(pixels, packed, scales, plain.bias.detach(), 16)
    y = convrot_layer(plain, 16)(x).permute(0, 2, 3, 1).flatten(0, 2)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_any_orthogonal_columns_on_both_sides_leave_a_float_layer_alone(seed):
    """Signs and permutations of H's columns, on input and weight: the rotation needs no symmetric matrix."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (16,), generator=generator) * 2.0 - 1
    matrix = hadamard(16)[:, torch.randperm(16, generator=generator)] * signs
    layer = quantized(nn.Conv2d(32, 5, 3, padding=1).requires_grad_(False), QuantSpec(32), QuantSpec(32), None)
    x = random(1, 32, 5, 5)
    expected = layer(x)
    layer.rotate_input(16)
    layer.weight.data = layer.prologue.rotated(layer.weight, 1)  # undone, since H is its own inverse
    layer.prologue.matrix.copy_(matrix)
    layer.weight.data = layer.prologue.rotated(layer.weight, 1)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


def test_a_regular_rotation_keeps_the_mean_where_sylvesters_collects_it():
    """After a SiLU, whose mean is positive: the largest value beside the root mean square, in blocks of 16."""
    x = F.silu(random(4096, 16) + 0.5)
    peaks = [
        (y.abs().max() / y.square().mean().sqrt()).item() for y in (x @ hadamard(16), x @ hadamard(16, "sylvester"))
    ]
    assert peaks[0] < 0.85 * peaks[1]


def test_block_one_is_rounding_to_nearest(uncond_pipe, uncond_calibration):
    own = quest.quantize(uncond_pipe, "hadamard", "w4a8", calibration=uncond_calibration, block=1, samples=4)
    rtn = quest.quantize(uncond_pipe, "rtn-mse", "w4a8", calibration=uncond_calibration, samples=4)
    inputs = uncond_calibration.inputs(torch.tensor([0]))
    with torch.no_grad():
        assert torch.equal(own.unet(**inputs).sample, rtn.unet(**inputs).sample)
    assert all(layer.prologue is None for _, layer in quant_layers(own.unet))  # `single` would keep it off kernels


def test_what_rows_are(uncond_pipe, uncond_calibration):
    """Blocks, forms and granularities of the rows; a rotation costs additions, which the checkpoint's cost states."""
    rows = {
        row: quest.quantize(uncond_pipe, row, "w4a4", calibration=uncond_calibration, **recipe)
        for row, recipe in (("convrot", {}), ("hadamard-single", {"samples": 2}))
    }
    for row, pipe in rows.items():
        for name, layer in quant_layers(pipe.unet):
            size = layer.weight_shape[1]
            found = layer.prologue.description
            blocks = (64, 16, 4, 1) if row == "convrot" else (32, 16, 8, 4, 2, 1)
            assert found["block"] == next(b for b in blocks if size % b == 0), name
            assert found["form"] == ("regular" if row == "convrot" else "sylvester")
            assert found["single"] == (row == "hadamard-single") and not found["scaled"]
    assert all(q.spec.rows == "token" for q in input_quantizers(rows["convrot"].unet).values())
    assert rows["convrot"].unet.quantization["cost"]["activations"] == "dynamic per token"
    single = rows["hadamard-single"].unet
    assert single.quantization["cost"]["activations"] == f"per tensor, {len(uncond_calibration.timesteps)} time groups"
    plain = quest.quantize(uncond_pipe, "rtn-mse", "w4a4", calibration=uncond_calibration, samples=2)
    for name, layer in quant_layers(single):  # weights are quantized as they are
        assert layer.qweight.equal(plain.unet.get_submodule(name).qweight)
    for pipe in rows.values():
        assert pipe.unet.quantization["cost"]["footprint"]["float_additions"] > 0


def test_smoothed_layers_can_be_rotated(uncond_pipe, uncond_calibration, tmp_path):
    """Factors first, then the rotation; and other methods start from both (`init`)."""
    smooth = quest.quantize(uncond_pipe, "smoothquant", "w4a8", calibration=uncond_calibration, samples=4)
    quest.save(smooth, tmp_path / "smooth", floats=True)
    recipe = dict(init=str(tmp_path / "smooth"), samples=4)
    both = quest.quantize(uncond_pipe, "hadamard", "w4a8", calibration=uncond_calibration, **recipe)
    for name, layer in quant_layers(both.unet):
        own = smooth.unet.get_submodule(name).prologue
        assert torch.equal(layer.prologue.multiplier, own.multiplier) and layer.prologue.block in (4, 16, 64)
    quest.save(both, tmp_path / "both", floats=True)
    quick = dict(init=str(tmp_path / "both"), samples=2, tla_iterations=1, cma_iterations=1, batch=2, time_groups=2)
    tuned = quest.quantize(uncond_pipe, "quest-suite", "w4a8", calibration=uncond_calibration, **quick)
    for name, layer in quant_layers(tuned.unet):
        assert layer.prologue.description == both.unet.get_submodule(name).prologue.description
