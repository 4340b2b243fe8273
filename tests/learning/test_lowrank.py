"""SVDQuant: its approximation, its ranks, and what its search may not do."""

import importlib.util

import pytest
import torch
from torch import nn

import quest
from quest.affine import QuantSpec, quantize
from quest.learning.lowrank import Decomposed, decompose, factored, factors, rank_of
from quest.quantization import ranges
from quest.quantization.layers import input_quantizers, quant_layers, quantized
from quest.quantization.swapping import make_dynamic, swap


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_ranks_fit_the_layers():
    assert [rank_of(c, c) for c in (3, 48, 96, 128, 320, 640, 1280)] == [4, 4, 4, 8, 16, 32, 32]
    assert rank_of(320, 48) == 4


def test_it_is_the_best_approximation_of_its_rank():
    weight = random(20, 7, 3, 3)
    values = torch.linalg.svdvals(weight.double().flatten(1))
    for rank in (1, 4, 20):
        rest = weight - factored(weight, rank).product(weight)
        assert rest.double().square().sum().item() == pytest.approx(
            values[rank:].square().sum().item(), rel=1e-3, abs=1e-3
        )


def test_factors():
    weight, largest = random(6, 4, 3, 3), torch.tensor([1.0, 10.0, 0.0, 100.0])
    found = factors(largest, weight, 0.5, 0.0)
    assert found[2] == 1 and found[3] / found[1] == pytest.approx(10**0.5, rel=1e-4)
    used = [0, 1, 3]
    assert found[used].log().sum().item() == pytest.approx(0, abs=1e-4)
    equal = largest / factors(largest, weight, 1.0, 0.0)
    assert equal[used].std() < 1e-4 * equal[0]  # alpha = 1: every channel has the same maximum
    both = factors(largest, weight, 0.5, 0.5)
    of_weight = weight.abs().amax((0, 2, 3))
    assert (both[3] / both[1]).item() == pytest.approx((10 * of_weight[1] / of_weight[3]).sqrt().item(), rel=1e-4)


def searched(rank, grid=((0.0, 0.0),), channels=False, bits=3):
    """A linear layer whose weight has a few large directions, and whose input has a few large channels."""
    weight = random(24, 32) + 5 * random(24, 2, seed=1) @ random(2, 32, seed=2)
    x = random(200, 32, seed=3)
    x[:, 5] *= 20
    linear = nn.Linear(32, 24).requires_grad_(False)
    linear.weight.copy_(weight)
    layer = quantized(linear, QuantSpec(bits, axis=0), QuantSpec(4), None)
    target = x @ weight.T + layer.bias
    prepare = lambda: layer.input_quantizer.calibrate(layer.prepared(x)[0], ranges.mse_zero_point)  # noqa: E731
    search = Decomposed(layer, lambda: [(layer(x), target)], x.abs().amax(0), prepare)
    with torch.no_grad():
        kept = search.search(grid, rank, channels, 100)
        error = (layer(x) - target).double().square().sum().item()
    return layer, weight, kept, error


@pytest.mark.parametrize("grid", [((0.0, 0.0),), ((0.0, 0.0), (0.5, 0.0), (0.5, 0.5))])
def test_errors_fall_until_the_search_stops(grid):
    layer, _, kept, error = searched(2, grid)
    assert all(b < a for a, b in zip(kept, kept[1:], strict=False)) and error == pytest.approx(kept[-1], rel=1e-6)
    assert layer.branch.rank == 2
    without = searched(0, grid)[3]
    assert error < 0.7 * without  # two directions are the outliers of this weight
    if len(grid) > 1:
        assert layer.prologue is not None and kept[0] < searched(2)[2][0]  # never worse than without smoothing


def test_full_rank_leaves_nothing_to_quantize():
    layer, weight, _, _ = searched(24, bits=4)
    assert layer.weight.abs().max() < 2e-3 * weight.abs().max()
    x = random(9, 32)
    layer.input_quantizer.spec = QuantSpec(32)
    torch.testing.assert_close(layer(x), x @ weight.T + layer.bias, rtol=1e-3, atol=5e-3)


def test_rank_0_is_smoothing_and_rounding_alone():
    layer, weight, kept, _ = searched(0, ((0.5, 0.5),))
    linear = nn.Linear(32, 24).requires_grad_(False)
    linear.weight.copy_(weight)
    expected = quantized(linear, QuantSpec(3, axis=0), QuantSpec(4), None)
    x = random(200, 32, seed=3)
    x[:, 5] *= 20
    expected.scale_input(factors(x.abs().amax(0), weight, 0.5, 0.5))
    expected.choose_weight_range(ranges.mse)
    assert layer.branch is None and layer.qweight.equal(expected.qweight) and len(kept) == 1


def test_whole_channels_of_equal_size():
    layer, _, kept, _ = searched(4, channels=True)
    assert layer.branch.channels is not None and 5 in layer.branch.channels.tolist() and len(kept) == 1
    low_rank = searched(4)[0].branch
    values = [
        sum(b.numel() for b in branch.buffers() if b.dtype == torch.float16) for branch in (layer.branch, low_rank)
    ]
    assert abs(values[0] - values[1]) <= 24 / 2  # half a channel


@pytest.mark.skipif(importlib.util.find_spec("comfy_kitchen") is None, reason="comfy-kitchen is not installed")
def test_a_linear_layer_is_that_of_comfy_kitchen():
    """Its codes, and the layer with smoothing, branch and groups of 64 on both sides."""
    from comfy_kitchen.backends.eager import svdquant as theirs

    linear, x = nn.Linear(128, 32).requires_grad_(False), random(10, 128)
    found = 2.0 ** torch.randint(-2, 3, (128,), generator=torch.Generator().manual_seed(0))  # exact in both orders
    weight, input = QuantSpec(4, True, 0, group=64), QuantSpec(4, True, -1, rows="token", group=64)
    q = quantized(linear, weight, input, None)
    q.scale_input(found)
    q.add_branch(factored(q.weight, 4))
    q.choose_weight_range()
    down = (q.branch.down.float() / found).T
    codes, scales, low = theirs.quantize_svdquant_w4a4(x, found, down, pad_size=1)
    own = quantize(q.prepared(x)[0], q.input_quantizer.qparams)
    assert torch.equal(theirs._unpack_int4_row_major(codes).float(), own.codes)
    torch.testing.assert_close(scales.T, own.scale[:, ::64], rtol=1e-6, atol=0)
    packed = theirs._pack_int4_row_major(q.qweight.codes.to(torch.int8))
    per_group = q.weight_quantizer.scale[0].T
    expected = theirs.scaled_mm_svdquant_w4a4(codes, packed, scales, per_group, low, q.branch.up.float(), q.bias)
    torch.testing.assert_close(q(x), expected, rtol=1e-5, atol=1e-5)


def student(pipe, rows=None, a=4):
    new = swap(pipe, 4, a, keep={"conv_in": 8, "down_blocks.0.*": 4, "conv_out": 8, "*": 32})
    if rows:
        make_dynamic(new.unet, rows, 16)
    return new.unet


def test_an_input_that_is_not_finite_is_named(class_pipe, class_calibration):
    new = student(class_pipe, "token")
    new.conv_in.bias.data[0] = torch.nan
    layers = {n: m for n, m in quant_layers(new) if n == "down_blocks.0.resnets.0.conv1"}
    how = dict(iterations=1, grid=1, rank=2, channels=False, gptq=False, choose=ranges.mse_zero_point)
    with pytest.raises(FloatingPointError, match="down_blocks.0.resnets.0.conv1: its calibration input holds NaN"):
        decompose(new, layers, class_calibration.subset(torch.arange(4)), **how)


@pytest.mark.parametrize("rows", [None, "token"])
def test_a_denoiser(class_pipe, class_calibration, rows):
    calibration = class_calibration.subset(torch.arange(4))
    found = {}
    for gptq in (False, True):
        denoiser = student(class_pipe, rows)
        layers = {n: m for n, m in quant_layers(denoiser) if m.weight_quantizer.spec.bits < 32}
        errors = decompose(
            denoiser,
            layers,
            calibration,
            iterations=3,
            grid=2,
            rank=None,
            channels=False,
            gptq=gptq,
            choose=ranges.mse_zero_point,
        )
        assert set(errors) == {n for n in layers if n.startswith("down_blocks.0")}
        assert {n for n, m in quant_layers(denoiser) if m.branch is not None} == set(errors)
        assert all(b < a for kept in errors.values() for a, b in zip(kept, kept[1:], strict=False))
        assert denoiser.stages[0]["stage"] == "SVDQuant" and denoiser.stages[0]["iterations"] == 3
        for q in input_quantizers(denoiser).values():
            q.spec = QuantSpec(32)
        with torch.no_grad():
            found[gptq] = denoiser.forward(**calibration.inputs(torch.arange(4))).sample - calibration.target
    assert found[True].norm() < found[False].norm()  # GPTQ rounds better what the branch leaves


def test_a_method_and_its_controls(uncond_pipe, uncond_calibration):
    few = dict(calibration=uncond_calibration, iterations=2, grid=1, rows=6, keep={"down_blocks.0.*": 4, "*": 32})
    smooth, branches, channels, static, groups = (
        quest.quantize(uncond_pipe, "svdquant", "w4a4", **few, **more)
        for more in (
            {"rank": 0},
            {},
            {"branch": "channels"},
            {"dynamic": "static", "per_step": True},
            {"rank": 0, "weight_group": 16},
        )
    )
    costs = [p.unet.quantization["cost"]["footprint"] for p in (smooth, branches, channels, static, groups)]
    assert costs[0]["branch_macs"] == 0 < costs[1]["branch_macs"] and costs[1]["branch_macs"] == costs[3]["branch_macs"]
    assert costs[0]["bytes"] < costs[1]["bytes"] and costs[2]["bytes"] == pytest.approx(costs[1]["bytes"], rel=0.01)
    assert costs[4]["weight_scale_bits"] > 0 == costs[0]["weight_scale_bits"] and costs[4]["branch_macs"] == 0
    assert costs[1]["scale_bits"] > 0 == costs[3]["scale_bits"]
    assert all(len(q.scale) == 6 for q in input_quantizers(static.unet).values() if q.spec.bits < 32)
