"""Formats of small floats, and scales of blocks: their grids, their rounding, and what others compute."""

import copy
import importlib.util
import json

import pytest
import torch
from torch import nn

import quest
from baselines.fp4 import Recipe, least_error
from quest.affine import QParams, QuantSpec, Table, fake_quantize, quantize
from quest.kernels import get
from quest.quantization import header, packing, ranges
from quest.quantization.checkpoint import load_weights
from quest.quantization.layers import attentions, input_quantizers, quant_layers, quantized
from quest.quantization.quantizer import Quantizer
from quest.quantization.swapping import swap

E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
NVFP4 = dict(group=16, table="e2m1", block_scale="e4m3")
MXFP4 = dict(group=32, table="e2m1", block_scale="e8m0")
KITCHEN = importlib.util.find_spec("comfy_kitchen") is not None


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def blocks(x, **fields):
    """x [rows, K] in blocks, as one sample."""
    spec = QuantSpec(4, True, -1, rows="token", **fields)
    return fake_quantize(x[None], QParams(torch.tensor(1.0), torch.tensor(0.0), spec))[0]


def test_grids():
    def grid(name):
        table = Table.named(name)
        return [m / 2**table.mantissa for m in table.magnitudes]

    assert grid("e2m1") == E2M1
    assert grid("e3m0") == [0, 1, 2, 4, 8, 16, 32, 64] and grid("e1m2") == [i / 4 for i in range(8)]
    assert Table.named("e2m2").magnitudes == [0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28]
    assert Table.named("e1m3").magnitudes == list(range(16))  # unsigned INT4
    for name in ("e2m", "f2m1", "e0m3", "e2x1", "E2M1", "e6m1"):
        with pytest.raises(ValueError, match=f"table: '{name}' is not of the form e2m1"):
            Table.named(name)


@pytest.mark.parametrize("name, symmetric", [("e2m1", True), ("e3m0", True), ("e1m2", True), ("e2m2", False)])
def test_the_nearest_code_ties_to_even(name, symmetric):
    table = Table.named(name)
    points = torch.tensor(table.magnitudes, dtype=torch.float64)
    grid = torch.cat([-points[1:].flip(0), points]) if symmetric else points
    x = torch.empty(100_000).uniform_(-80, 80, generator=torch.Generator().manual_seed(0))
    codes = table.nearest(x, symmetric).double()
    assert torch.isin(codes, grid).all() and torch.equal(table.nearest(codes.float(), symmetric).double(), codes)
    best = (x.double()[:, None] - grid).abs().amin(1)
    assert torch.equal((x.double() - codes).abs(), best)
    if symmetric:
        assert torch.equal(table.nearest(-x, True).double(), -codes)
    ties = (points[:-1] + points[1:]) / 2
    expected = [points[i] if i % 2 == 0 else points[i + 1] for i in range(len(ties))]
    assert table.nearest(ties.float(), symmetric).double().tolist() == [v.item() for v in expected]


def test_e2m1_ties_of_the_standard():
    assert (Table.named("e2m1").nearest(torch.tensor([0.5, 1.5, 2.5, 3.5, 5, 7, 10]), True) / 2).tolist() == [
        0, 1, 1, 2, 2, 4, 4,
    ]  # fmt: skip


def test_codes_are_whole_numbers_and_gradients_pass_straight_through():
    x = random(1000).requires_grad_()
    spec = QuantSpec(4, True, table="e2m1")
    assert (spec.qmin, spec.qmax) == (-12, 12)
    q = quantize(x, QParams(torch.tensor(0.25), torch.tensor(0.0), spec))
    assert set(q.codes.detach().abs().unique().tolist()) <= {0, 1, 2, 3, 4, 6, 8, 12}
    fake_quantize(x, QParams(torch.tensor(0.25), torch.tensor(0.0), spec)).sum().backward()
    assert torch.equal(x.grad, (x.detach().abs() <= 3).float())


def test_formats_that_do_not_exist_are_refused():
    for fields, said in (
        (dict(bits=4, table="e2m1"), "table: e2m1 has not 4 bits"),
        (dict(bits=4, symmetric=True, axis=0, group=16, block_scale="e5m2"), "block_scale: 'e5m2' is not one of"),
        (dict(bits=4, symmetric=True, axis=0, block_scale="e4m3"), "block_scale: of groups only"),
        (dict(bits=4, axis=0, group=16, block_scale="e8m0"), "block_scale: of groups only, and powers of two"),
    ):
        with pytest.raises(ValueError, match=said):
            QuantSpec(**fields)


def test_nvfp4_by_hand():
    """A block whose largest value is 6 times a scale of E4M3, another one, and one too small for any scale."""
    x = torch.zeros(1, 64)
    x[0, 0] = 448 * 6.0  # so that the factor is 1
    x[0, 16:20] = torch.tensor([6.0, 2.6, -0.7, 0.2])  # scale 1
    x[0, 32:34] = torch.tensor([7.0, 3.3])  # 7 / 6 = 1.1667 is rounded to 1.125, so 7 is clipped at 6.75
    x[0, 48] = 6 * 2.0**-11  # half of the smallest scale rounds to zero
    found = blocks(x, **NVFP4)
    assert found[0, 0] == 448 * 6 and found[0, 16:20].tolist() == [6, 3, -0.5, 0]
    assert found[0, 32:34].tolist() == [6.75, 3.375] and not found[0, 48:].any()


def test_mxfp4_by_hand():
    x = torch.zeros(1, 64)
    x[0, :3] = torch.tensor([7.9, 3.0, 0.3])  # 2^(2 - 2) = 1: 7.9 saturates at 6
    x[0, 32:34] = torch.tensor([8.0, 1.0])  # 2^(3 - 2) = 2
    assert blocks(x, **MXFP4)[0, :3].tolist() == [6, 3, 0.5] and blocks(x, **MXFP4)[0, 32:34].tolist() == [8, 1]
    up = blocks(x, **MXFP4 | {"block_scale": "e8m0-up"})
    assert up[0, :3].tolist() == [8, 3, 0] and up[0, 32:34].tolist() == [8, 1]  # scale 2 in both
    x[0, 0] = 6.0
    assert blocks(x, **MXFP4 | {"block_scale": "e8m0-up"})[0, :3].tolist() == [6, 3, 0.5]  # 6 is reached by scale 1


@pytest.mark.parametrize("fields", [NVFP4, MXFP4, dict(group=16, block_scale="e4m3")], ids=str)
def test_zeros_and_extremes(fields):
    x = random(4, 64)
    x[0] = 0
    x[1, :32] = 0
    found = blocks(x, **fields)
    assert not found[0].any() and not found[1, :32].any() and found[1, 32:].any()
    for size in (1e-30, 1e-12, 1e30):
        assert blocks(x * size, **fields).isfinite().all()
    assert not blocks(torch.zeros(2, 64), **fields).any()
    if "e8m0" in fields["block_scale"]:  # powers of two: everything scales exactly
        assert torch.equal(blocks(x * 2.0**20, **fields), found * 2.0**20)


@pytest.mark.parametrize("fields", [NVFP4, MXFP4, MXFP4 | {"block_scale": "e8m0-up"}, MXFP4 | {"table": None}])
def test_what_is_no_number_stays_visible(fields):
    x = torch.ones(1, 64)
    for bad in (torch.nan, torch.inf):
        x[0, 3] = bad
        assert not blocks(x, **fields)[0, 3].isfinite()
    static = QParams(torch.tensor(1.0), torch.tensor(0.0), QuantSpec(4, True, table="e2m1"))
    assert fake_quantize(torch.tensor([torch.nan, 2.0]), static).isnan().tolist() == [True, False]


def test_integer_products_with_powers_of_two_are_exact():
    """E2M1 times 2 are whole numbers, so a block's sum is one, and its scales shift it."""
    specs = QuantSpec(4, True, -1, rows="token", **MXFP4)
    a, b = random(5, 64), random(7, 64, seed=1)
    clip = QParams(torch.tensor(1.0), torch.tensor(0.0), specs)
    (qa, qb), total = (quantize(x[None], clip) for x in (a, b)), torch.zeros(5, 7, dtype=torch.float64)
    for first in (0, 32):
        part = slice(first, first + 32)
        sums = qa.codes[0, :, part].long() @ qb.codes[0, :, part].long().T
        assert sums.abs().max() <= 144 * 32
        total += sums * qa.scale[0, :, first].double()[:, None] * qb.scale[0, :, first].double()
    expected = qa.dequantize()[0].double() @ qb.dequantize()[0].double().T
    assert torch.equal(total, expected)


@pytest.mark.skipif(not KITCHEN, reason="comfy-kitchen is not installed")
@pytest.mark.parametrize("size", [1.0, 37.5, 1e-4])
def test_nvfp4_is_that_of_comfy_kitchen(size):
    from comfy_kitchen.backends.eager.quantization import dequantize_nvfp4, quantize_nvfp4

    x = random(128, 64) * size
    x[3, 16:32] *= 1e-8
    x[5] = 0
    x[7] *= torch.linspace(0, 100, 64)
    factor = x.abs().amax() / 6 / 448
    theirs = dequantize_nvfp4(*quantize_nvfp4(x, factor)[:1], factor, quantize_nvfp4(x, factor)[1], torch.float32)
    torch.testing.assert_close(blocks(x, **NVFP4), theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(6, 40), (6, 40, 3, 3), (6, 8, 3, 2)])
@pytest.mark.parametrize("fields", [NVFP4, dict(group=16), dict(group=16, block_scale="e4m3")], ids=str)
def test_a_weight_in_groups(shape, fields):
    """Groups are of in-channels of one tap; the last one may be shorter. A frozen weight is the same."""
    weight = random(*shape)
    weight[:, 16:24] *= 50
    layer = nn.Linear(shape[1], 6) if len(shape) == 2 else nn.Conv2d(shape[1], 6, shape[2:])
    layer.requires_grad_(False).weight.copy_(weight)
    q = quantized(layer, QuantSpec(4, True, 0, **fields), QuantSpec(32), None)
    q.choose_weight_range()
    number = -(-shape[1] // 16)
    assert q.weight_quantizer.scale.shape == (1, 6, number, *shape[2:])
    values = q.qweight.dequantize()
    taps = weight.reshape(6, shape[1], -1).movedim(2, 1)  # [O, taps, C]
    factors = QuantSpec(4, True, -1, rows="token", **fields)
    expected = fake_quantize(taps[None], QParams(torch.tensor(1.0), torch.tensor(0.0), factors))[0]
    assert torch.equal(values.reshape(6, shape[1], -1).movedim(2, 1), expected)
    if number > 1:
        assert (values - weight)[:, :16].abs().max() < 0.5  # those of another group do not matter
    packed = packing.pack(q.qweight.codes, q.weight_quantizer.spec)
    assert packed.shape[1] * 2 >= weight[0].numel() > packed.shape[1]  # half a byte each
    assert torch.equal(packing.unpack(packed, q.weight_quantizer.spec, shape), q.qweight.codes)
    q.freeze()
    assert torch.equal(q.qweight.dequantize(), values)
    x = random(2, shape[1]) if len(shape) == 2 else random(2, shape[1], 5, 5)
    functional = nn.functional.linear if len(shape) == 2 else nn.functional.conv2d
    torch.testing.assert_close(q(x), functional(x, values, q.bias), rtol=1e-5, atol=1e-5)
    reason = get("integer").supports(
        q.qweight, q.weight_quantizer.spec, QParams(torch.ones(1), torch.zeros(1), QuantSpec(8))
    )
    assert reason == ("weight: codes of e2m1" if "table" in fields else "weight: signed codes")


def after_silu():
    return torch.nn.functional.silu(random(4, 16, 8, 8) * 2 + 0.5)


def test_unsigned_floats_are_taken_where_they_are_better():
    x, errors = after_silu(), {}
    for zero_point in ("none", "rounded", "free"):
        for table in ("e2m1", "e1m2", "any"):
            q = Quantizer(QuantSpec(4))
            scale, shift = least_error(q, Recipe(zero_point=zero_point, table=table), x, q.spec)
            errors[table, zero_point] = (fake_quantize(x, QParams(scale, shift, q.spec)) - x).square().mean().item()
            assert q.spec.symmetric == (zero_point == "none")
    for table in ("e2m1", "e1m2", "any"):
        assert errors[table, "free"] < 0.7 * errors[table, "none"]
        assert errors[table, "free"] <= errors[table, "rounded"] * 1.001 < errors[table, "none"]
    for zero_point in ("none", "rounded", "free"):
        assert errors["any", zero_point] <= min(errors[t, zero_point] for t in ("e2m1", "e1m2"))
    q = Quantizer(QuantSpec(4))
    least_error(q, Recipe(), random(4, 16, 8, 8), q.spec)
    assert q.spec == QuantSpec(4, True, table="e2m1")  # of both signs


def test_a_group_wider_than_its_weight_costs_nothing():
    q = Quantizer(QuantSpec(4, True, 0, group=2**40), (2, 1))
    q.size = 3
    assert q.qparams.scale.shape == (2, 3)


def test_int4_is_a_table_too():
    """e1m3 without a sign has the codes 0 to 15, so both ways agree."""
    x = after_silu()
    scale, zero_point = ranges.mse_zero_point(x, QuantSpec(4))
    by_table = fake_quantize(x, QParams(scale, zero_point, QuantSpec(4, table="e1m3")))
    torch.testing.assert_close(by_table, fake_quantize(x, QParams(scale, zero_point, QuantSpec(4))), rtol=0, atol=1e-6)


@pytest.fixture(scope="module", params=[None, "nvfp4"])
def made(request, uncond_pipe, uncond_calibration):
    few = dict(calibration=uncond_calibration, samples=4, blocks=request.param)
    return request.param, quest.quantize(uncond_pipe, "fp4", "w4a4", **few)


def test_save_and_load(made, uncond_pipe, uncond_calibration, tmp_path):
    name, q = made
    quest.save(q, tmp_path / "m")
    with torch.no_grad():
        inputs = uncond_calibration.inputs(torch.tensor([0, 1]))
        expected = q.unet(**inputs).sample
        for kernel in ("reference", "auto"):
            loaded = quest.load(uncond_pipe, tmp_path / "m", kernel=kernel)
            assert torch.equal(loaded.unet(**inputs).sample, expected) or loaded.unet.placement.kernel == "integer"
    if loaded.unet.placement.kernel == "integer":
        of_integers = {n for n, m in quant_layers(loaded.unet) if n not in loaded.unet.placement.refused}
        assert of_integers == {"conv_in", "conv_out"}
        reasons = set(loaded.unet.placement.refused.values())
        assert "weight: codes of e2m1" in reasons and all("e2m1" in reason for reason in reasons)
    found = header.read(tmp_path / "m")
    footprint = found["cost"]["footprint"]
    in_blocks = sum(m.weight.numel() for m in quantizers(q))
    if name == "nvfp4":
        assert footprint["weight_scale_bits"] >= in_blocks / 16 * 8 and footprint["scale_bits"] > 0
        assert "in groups of 16, scales e4m3, codes e2m1" in found["granularity"]["weights"]
    else:
        assert footprint["weight_scale_bits"] == footprint["scale_bits"] == 0
    specs = {key: spec for key, (spec, *_) in found["layers"].items()}
    assert specs["conv_in"]["bits"] == 8 and "table" not in specs["conv_in"]
    for change in (
        {"table": "e3m1"},
        {"table": "x"},
        {"table": "e7m0", "bits": 8},
        {"block_scale": "e5m2"},
        {"group": 0},
        {"block_scale": "e8m0", "symmetric": False},
    ):
        wrong = json.loads(json.dumps(found))
        wrong["layers"]["time_embedding.linear_1"][0] |= change
        with pytest.raises(ValueError, match=r"layers.time_embedding.linear_1\[0\]"):
            header.check(wrong, "m")


def test_queries_keys_and_values_may_have_different_formats(made, uncond_pipe, uncond_calibration, tmp_path):
    name, q = made
    if name is not None:
        pytest.skip("in blocks all have one format")
    q = copy.deepcopy(q)
    for _, attention in attentions(q.unet):  # as `least_error` may choose
        attention.processor.k.spec = QuantSpec(4, table="e2m2")
        attention.processor.k.zero_point.data.fill_(12.5)
        attention.processor.v.spec = QuantSpec(4, symmetric=True, table="e2m1")
        attention.processor.v.zero_point.data.zero_()
        attention.processor.q.spec, attention.processor.q.zero_point.data[:] = QuantSpec(4, table="e2m2"), 3.5
    quest.save(q, tmp_path / "m")
    loaded = quest.load(uncond_pipe, tmp_path / "m", kernel="reference")
    specs = {n: quantizer.spec for n, quantizer in input_quantizers(loaded.unet).items()}
    assert specs == {n: quantizer.spec for n, quantizer in input_quantizers(q.unet).items()}
    with torch.no_grad():
        inputs = uncond_calibration.inputs(torch.tensor([0, 1]))
        assert torch.equal(loaded.unet(**inputs).sample, q.unet(**inputs).sample)
    found = header.read(tmp_path / "m")
    assert {len(own) for own in found["attentions"].values()} == {4}
    for own in found["attentions"].values():
        own.append(own[0])
    with pytest.raises(ValueError, match="a list of 2 or 4 formats"):
        header.check(found, "m")


def quantizers(q):
    return [m for _, m in quant_layers(q.unet) if m.weight_quantizer.spec.group is not None]


def test_another_format_cannot_start_from_them(made, uncond_pipe, tmp_path):
    _, q = made
    quest.save(q, tmp_path / "m", floats=True)
    other = swap(uncond_pipe, 4, 8)
    with pytest.raises(ValueError, match="layer .* has weights .*codes e2m1, not per channel 0"):
        load_weights(other.unet, tmp_path / "m")


def test_products_of_attention_are_in_blocks_of_what_they_sum_over(made):
    name, q = made
    for key, quantizer in input_quantizers(q.unet).items():
        spec = quantizer.spec
        if key.endswith("processor.p") or key.startswith(("conv_in", "conv_out")):
            assert spec.bits == 8 and spec.table is None and not spec.dynamic
        elif name == "nvfp4":
            axis = -2 if key.endswith("processor.v") else 1 if "conv" in key or "sampl" in key else -1
            assert (spec.rows, spec.group, spec.table, spec.block_scale) == ("token", 16, "e2m1", "e4m3")
            assert spec.axis == axis or "conv" not in key
        else:
            assert spec.table in ("e2m1", "e2m2") and (spec.table == "e2m1") == spec.symmetric
