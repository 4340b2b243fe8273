"""Weight dilation: what grows, and what may not move."""

import pytest
import torch

import quest
from baselines.dilate import dilation
from quest.affine import QuantSpec
from quest.quantization import ranges
from quest.quantization.layers import quant_layers

SHAPES = [(5, 40), (5, 40, 3, 3), (12, 96, 1, 1), (64, 3, 3, 3)]


def weight_of(shape, seed=0):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    weight[:, 1] = 0
    return weight


def scaled(weight, factors):
    return weight * factors.view(-1, *[1] * (weight.ndim - 2))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_range_stays_bit_for_bit(shape):
    weight, spec = weight_of(shape), QuantSpec(4, axis=0)
    factors = dilation(weight)
    assert (factors >= 1).all() and factors[1] == 1
    for before, after in zip(ranges.minmax(weight, spec), ranges.minmax(scaled(weight, factors), spec), strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_factors_are_the_largest(shape):
    """Channels that attain an extreme have none; one percent more of any other one widens a range."""
    weight, spec = weight_of(shape), QuantSpec(4, axis=0)
    factors, rows = dilation(weight), weight.flatten(2) if weight.ndim > 2 else weight[..., None]
    most, least = rows.amax((1, 2), True), rows.amin((1, 2), True)
    attains = ((rows == most) | (rows == least)).any(0).any(1)
    assert (factors[attains] == 1).all() and (factors[~attains] > 1).sum() >= (~attains).sum() - 1  # one is all zero
    assert shape[0] > shape[1] or (factors > 1).any()
    scale = ranges.minmax(weight, spec)[0]
    for channel in (factors > 1).nonzero().flatten().tolist():
        more = factors.clone()
        more[channel] *= 1.01
        assert (ranges.minmax(scaled(weight, more), spec)[0] > scale).any()


def test_a_channel_without_room_for_its_sign():
    """All weights of the output channel but this one are positive, so its least one is the extreme."""
    assert dilation(torch.tensor([[0.4, -0.1, 0.2]])).tolist() == [1, 1, 2]


def test_the_method(uncond_pipe, uncond_calibration):
    made = quest.quantize(uncond_pipe, "dilate", "w4a4", calibration=uncond_calibration, samples=4)
    plain = quest.quantize(uncond_pipe, "rtn-mse", "w4a4", calibration=uncond_calibration, samples=4)
    dilated = 0
    for name, layer in quant_layers(made.unet):
        own = plain.unet.get_submodule(name)
        assert layer.weight_quantizer.scale.equal(own.weight_quantizer.scale)
        assert layer.weight_quantizer.zero_point.equal(own.weight_quantizer.zero_point)
        dilated += (layer.prologue.multiplier < 1).sum().item()
        factors = 1 / layer.prologue.multiplier
        torch.testing.assert_close(scaled(own.float_weight, factors), layer.float_weight, rtol=1e-5, atol=1e-7)
    assert dilated > 0
