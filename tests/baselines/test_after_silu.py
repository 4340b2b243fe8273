"""Formats after a SiLU: what each does to negative values, and which layers have them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import quest
from baselines.after_silu import FORMATS, LOWEST, set_formats
from quest.affine import QParams, QuantSpec, fake_quantize, quantize
from quest.quantization import ranges
from quest.quantization.layers import input_quantizers, quant_layers, quantized
from quest.quantization.swapping import swap


def after_silu(seed=0):
    """[2, 16, 8, 8], from -0.2785 to above 8: the zero point of the whole range is 0.278 / 0.55 = 0.5 there."""
    x = F.silu(3 * torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(seed)))
    assert LOWEST < x.min() < -0.278 and x.max() > 8
    return x


def quantized_by(name, x):
    fields, choose = FORMATS[name]
    if choose is None:
        spec = QuantSpec(4, axis=1, **fields)
        return quantize(x, QParams(torch.tensor(1.0), torch.tensor(0.0), spec)), spec
    spec = QuantSpec(4, **fields)
    return quantize(x, QParams(*choose(x, spec), spec)), spec


def test_what_becomes_of_negative_values():
    x = after_silu()
    found = {name: quantized_by(name, x) for name in FORMATS}
    for name, (q, spec) in found.items():
        assert q.codes.min() >= spec.qmin and q.codes.max() <= spec.qmax and len(q.codes.unique()) <= 16, name
    for name in ("nearest", "fixed", "symmetric"):
        assert torch.equal(found[name][0].zero_point, found[name][0].zero_point.round())
    fixed, shifted = found["fixed"][0], found["shifted"][0]
    assert (
        fixed.zero_point >= 1 and ((x / fixed.scale).round() + fixed.zero_point).min() >= 0
    )  # nothing is clipped below
    assert (LOWEST / fixed.scale).abs() <= fixed.zero_point < (LOWEST / fixed.scale).abs() + 1
    assert shifted.zero_point == -LOWEST / shifted.scale and shifted.zero_point % 1 != 0
    assert shifted.dequantize().min().item() == pytest.approx(LOWEST, abs=1e-6)
    # SVDQuant's form of it: unsigned codes of x + 0.2785, and what was added is taken back.
    codes = ((x - LOWEST) / shifted.scale).round().clamp(0, 15)
    assert (codes != shifted.codes).float().mean() < 1e-3  # but for ties
    error = {name: (q.dequantize() - x).square().mean().item() for name, (q, _) in found.items()}
    assert error["shifted"] < error["symmetric"] and error["free"] < error["symmetric"]
    assert error["nvfp4"] < error["e2m1"] and error["int4-blocks"] < error["symmetric"]
    # No clamp and no widening: the published search.
    plain = QuantSpec(4)
    assert torch.equal(found["nearest"][0].dequantize(), fake_quantize(x, QParams(*ranges.mse(x, plain), plain)))


@pytest.mark.parametrize("name", ["shifted", "fixed"])
def test_padding_is_the_real_zero(name):
    layer = quantized(nn.Conv2d(16, 5, 3, padding=1).requires_grad_(False), QuantSpec(4, axis=0), QuantSpec(4), None)
    layer.choose_weight_range(ranges.mse)
    fields, choose = FORMATS[name]
    layer.input_quantizer.spec = QuantSpec(4, **fields)
    x = after_silu()
    layer.input_quantizer.calibrate(x, choose)
    dequantized = F.pad(fake_quantize(x, layer.input_quantizer.qparams), (1, 1, 1, 1))
    torch.testing.assert_close(layer(x), F.conv2d(dequantized, layer.qweight.dequantize(), layer.bias))


@pytest.mark.parametrize("name", ["shifted", "nvfp4"])
def test_rows_differ_in_inputs_after_a_silu_alone(name, uncond_pipe, uncond_calibration, tmp_path):
    plain, own = (
        quest.quantize(uncond_pipe, "rtn-mse", "w4a4", calibration=uncond_calibration, samples=4, **recipe)
        for recipe in ({}, {"after_silu": name})
    )
    after = {m for m in ("conv1", "conv2", "time_emb_proj", "linear_2")}
    changed = 0
    for layer_name, layer in quant_layers(own.unet):
        other = plain.unet.get_submodule(layer_name)
        assert layer.qweight.equal(other.qweight)
        different = layer.input_quantizer.spec != other.input_quantizer.spec
        assert different == (layer_name.rpartition(".")[2] in after)
        changed += different
    assert changed > 8
    quest.save(own, tmp_path / "m")
    loaded = quest.load(uncond_pipe, tmp_path / "m", kernel="reference")
    inputs = uncond_calibration.inputs(torch.tensor([0, 1]))
    with torch.no_grad():
        assert torch.equal(loaded.unet(**inputs).sample, own.unet(**inputs).sample)


def test_it_is_of_four_bits(uncond_pipe, uncond_calibration):
    with pytest.raises(ValueError, match="after_silu: 'free' is of 4-bit inputs"):
        quest.quantize(uncond_pipe, "rtn-mse", "w4a3", calibration=uncond_calibration, after_silu="free")
    with pytest.raises(ValueError, match="bits w4a8: after_silu is of 4-bit inputs.* valid: 2 to 4"):
        quest.quantize(uncond_pipe, "rtn-mse", "w4a8", after_silu="free")  # before a calibration set is drawn
    student = swap(uncond_pipe, 4, 4).unet
    set_formats(student, "nvfp4")
    assert any(q.spec.table == "e2m1" for q in input_quantizers(student).values())
