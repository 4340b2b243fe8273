"""Prologues: what layers do to the channels of their inputs before they quantize them."""

import copy
import json
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import nn

import quest
from quest.affine import FLOAT, QuantSpec
from quest.kernels.cpu import core
from quest.learning.calibrate import calibrate
from quest.quantization import cost, header, placement, prologue, ranges
from quest.quantization.checkpoint import load_weights
from quest.quantization.layers import input_quantizers, quant_layers, quantized
from quest.quantization.overhead import overhead
from quest.quantization.prologue import block_size, hadamard
from quest.quantization.swapping import swap

LAYERS = [
    (nn.Conv2d(48, 5, 3, padding=1), (2, 48, 7, 7)),
    (nn.Conv2d(96, 5, 3, stride=2, padding=1), (2, 96, 7, 7)),
    (nn.Conv2d(144, 5, 1), (2, 144, 4, 4)),
    (nn.Linear(48, 5), (2, 9, 48)),
]


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def in_float(layer):
    return quantized(copy.deepcopy(layer).requires_grad_(False), QuantSpec(FLOAT), QuantSpec(FLOAT), None)


@pytest.mark.parametrize("form, sizes", [("regular", (1, 4, 16, 64, 256)), ("sylvester", (1, 2, 8, 32, 64))])
def test_hadamard_matrices(form, sizes):
    for size in sizes:
        matrix = hadamard(size, form)
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(size), rtol=0, atol=1e-6)
        assert torch.equal(matrix, matrix.T) and torch.equal(matrix.abs(), torch.full((size, size), size**-0.5))
        if form == "regular":
            assert torch.equal(matrix.sum(1), torch.ones(size))


def test_sizes_and_forms_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="block: there is no regular Hadamard matrix of 32 in use; valid: powers of 4"):
        hadamard(32)
    with pytest.raises(ValueError, match="form: 'paley' is not one of regular, sylvester"):
        hadamard(4, "paley")
    layer = in_float(nn.Linear(48, 5))
    with pytest.raises(ValueError, match="block: 64 does not divide the 48 input channels"):
        layer.rotate_input(64)


def test_block_sizes():
    found = {c: block_size(c) for c in (3, 4, 48, 96, 112, 144, 224, 672, 64, 128, 192, 320, 640, 960, 1280)}
    assert found == {3: 1, 4: 4, **dict.fromkeys((48, 96, 112, 144, 224, 672), 16)} | dict.fromkeys(
        (64, 128, 192, 320, 640, 960, 1280), 64
    )
    assert [block_size(48, most) for most in (1, 8, 64)] == [1, 4, 16]
    assert [block_size(96, most, "sylvester") for most in (None, 16)] == [32, 16]


@pytest.mark.parametrize("layer, shape", LAYERS, ids=lambda v: str(v)[:40])
@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("form, block", [("regular", 16), ("sylvester", 8)])
def test_in_float_a_layer_computes_the_same(layer, shape, form, block, single):
    x, factors = random(*shape), random(shape[1] if len(shape) == 4 else shape[2], seed=1).abs() + 0.1
    expected = layer(x)
    q = in_float(layer)
    q.scale_input(factors)
    torch.testing.assert_close(q(x), expected, rtol=1e-5, atol=2e-5)
    q.scale_input(factors)  # a second time
    q.rotate_input(block, form, single)
    torch.testing.assert_close(q(x), expected, rtol=1e-5, atol=2e-5)
    with pytest.raises(RuntimeError, match="rotated"):
        q.scale_input(factors)


def test_a_rotation_spreads_an_outlier_over_its_block():
    q = in_float(nn.Conv2d(32, 5, 3))
    q.rotate_input(16)
    x = torch.zeros(1, 32, 1, 1)
    x[0, 3] = 12.0
    rotated = q.prologue(x, q.channels).flatten()
    assert torch.equal(rotated[:16].abs(), torch.full((16,), 3.0)) and not rotated[16:].any()


def test_a_block_of_one_and_factors_of_one_change_nothing():
    layer, shape = LAYERS[0]
    q = quantized(copy.deepcopy(layer).requires_grad_(False), QuantSpec(4, axis=0), QuantSpec(4), None)
    q.choose_weight_range()
    q.input_quantizer.calibrate(random(*shape), ranges.minmax)
    before = q(random(*shape))
    q.rotate_input(1)
    q.scale_input(torch.ones(48))
    assert torch.equal(q(random(*shape)), before)


def test_powers_of_two_scale_codes_and_weights_exactly():
    """Codes of x / 4 are those of x at four times the step, and a weight times 4 has the same codes."""
    layer, shape = LAYERS[0]
    x, results = random(*shape), []
    for factor in (1.0, 4.0):
        q = quantized(copy.deepcopy(layer).requires_grad_(False), QuantSpec(4, axis=0), QuantSpec(4), None)
        q.scale_input(torch.full((48,), factor))
        q.choose_weight_range()
        q.input_quantizer.calibrate(q.prologue(x, q.channels), ranges.minmax)
        results.append((q.qweight.codes, q.input_quantizer.scale * factor, q(x)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_weight_that_is_rotated_after_it_is_quantized_keeps_its_codes():
    """Its rotated codes are whole numbers over sqrt(block), so products of codes stay exact (arXiv:2512.05746)."""
    layer = nn.Linear(64, 5)
    q, plain = (
        quantized(copy.deepcopy(layer).requires_grad_(False), QuantSpec(4, axis=0), QuantSpec(4), None) for _ in "ab"
    )
    q.rotate_input(32, "sylvester", single=True)
    x = random(9, 64)
    for one in (q, plain):
        one.choose_weight_range(ranges.mse)
    q.input_quantizer.calibrate(q.prologue(x, q.channels), ranges.minmax)
    assert torch.equal(q.qweight.codes, plain.qweight.codes)
    codes = (q.qweight.codes - q.qweight.zero_point).double().unflatten(1, (2, 32))
    rotated = (codes @ hadamard(32, "sylvester").sign().double()).flatten(1)  # entries +-1
    assert torch.equal(rotated, rotated.round()) and rotated.abs().max() <= 32 * 15
    scale, zero_point, spec = q.input_quantizer.qparams
    inputs = ((q.prologue(x, q.channels) / scale).round() + zero_point).clamp(spec.qmin, spec.qmax) - zero_point
    sums = inputs.double() @ rotated.T
    expected = sums * scale.double() * q.qweight.scale.double().T / 32**0.5 + layer.bias.double()
    for frozen in (False, True):
        if frozen:
            q.freeze()
        torch.testing.assert_close(q(x).double(), expected, rtol=1e-6, atol=1e-6)
    assert placement.refusal(q, "reference") is None
    assert placement.refusal(q, "integer") == "weight: rotated after it is quantized"
    assert placement.refusal(q, "triton") == "weight: rotated after it is quantized"


def test_products_of_rotated_codes_are_wider():
    """Sums of 16 codes of 4 bits have 8 bits, which the bit operations count; codes of a rotated weight have 4."""
    layers = nn.ModuleDict()
    for name, bits in (("both-sides", 4), ("one-side", 4), ("in-float", FLOAT)):
        layers[name] = quantized(nn.Linear(32, 5).requires_grad_(False), QuantSpec(bits), QuantSpec(8), None)
        layers[name].rotate_input(16, single=name != "both-sides")
    assert [cost.operand_bits(layer) for layer in layers.values()] == [4, 8, FLOAT]
    assert cost.bops(layers, dict.fromkeys(layers, 10)) == 10 * 8 * (4 + 8 + FLOAT)


def test_what_rotations_cost(class_pipe, class_calibration):
    student = swap(class_pipe, 32, 32, keep={"*": 32})
    student.unet.down_blocks[0].resnets[0].conv1.rotate_input(16)  # 32 channels of 8 x 8 pixels
    found = overhead(student.unet, class_calibration.inputs(torch.tensor([0])))
    assert {name: count for name, count in found.items() if count} == {"float_additions": 64 * 32 * 4}


@pytest.fixture(scope="module")
def student(class_pipe, class_calibration):
    """Every layer's input is scaled, where it can be rotated too; some weights are rotated after they are quantized."""
    new = swap(class_pipe, 4, 8)
    for number, (_, layer) in enumerate(quant_layers(new.unet)):
        layer.scale_input(random(layer.weight_shape[1], seed=number).abs() + 0.5)
        if number % 2:
            layer.rotate_input(block_size(layer.weight_shape[1]), single=number % 4 == 1)
        layer.choose_weight_range(ranges.mse)
    calibrate(new.unet, class_calibration, ranges.minmax, samples=8, seed=0)
    return new


@torch.no_grad()
def predicted(pipe, calibration):
    return pipe.unet(**calibration.inputs(torch.tensor([0, 1]))).sample


@pytest.mark.parametrize("floats", [False, True])
def test_save_and_load(student, class_pipe, class_calibration, tmp_path, floats):
    path = tmp_path / "model.safetensors"
    quest.save(student, path, floats=floats)
    loaded = quest.load(class_pipe, path, kernel="reference")
    assert torch.equal(predicted(loaded, class_calibration), predicted(student, class_calibration))
    assert header.read(path)["format"] == 3
    quest.save(loaded, tmp_path / "again")
    again = quest.load(class_pipe, tmp_path / "again", kernel="reference")
    assert torch.equal(predicted(again, class_calibration), predicted(student, class_calibration))


@pytest.mark.skipif(not core.available(), reason="no compiled core: installed without a C++ compiler")
def test_the_integer_kernel_multiplies_what_a_prologue_returns(student, class_pipe, class_calibration, tmp_path):
    """A prologue runs in front of any kernel; only weights that are rotated after they are quantized are refused."""
    path = tmp_path / "model.safetensors"
    quest.save(student, path)
    loaded = quest.load(class_pipe, path, kernel="integer")
    rotated = {n for n, layer in quant_layers(student.unet) if layer.prologue.single and layer.prologue.block > 1}
    single = {n for n, layer in quant_layers(student.unet) if layer.prologue.single}
    assert rotated and set(loaded.unet.placement.refused) == single
    for name, layer in quant_layers(loaded.unet):
        own = student.unet.get_submodule(name)
        shape = (2, 8, layer.weight_shape[1]) if len(layer.weight_shape) == 2 else (2, layer.weight_shape[1], 8, 8)
        x = random(*shape)
        torch.testing.assert_close(layer(x), own(x), rtol=1e-5, atol=2e-5 * own(x).abs().max().item())
    # Blocks that the core computes in one call would leave prologues out, so there is none of them.
    seen = Counter()
    for name, layer in quant_layers(loaded.unet):
        layer.prologue.register_forward_hook(lambda *_, name=name: seen.update([name]))
    predicted(loaded, class_calibration)
    assert seen == Counter(name for name, _ in quant_layers(loaded.unet))


def test_another_method_starts_from_scaled_and_rotated_weights(student, class_pipe, class_calibration, tmp_path):
    path = tmp_path / "model.safetensors"
    quest.save(student, path, floats=True)
    other = swap(class_pipe, 4, 8, keep={"conv_in": 8, "conv_out": 8, "*.conv_shortcut": 32})
    load_weights(other.unet, path)
    for name, layer in quant_layers(other.unet):
        own = student.unet.get_submodule(name)
        if "conv_shortcut" in name:  # stays in float, with its own weight
            assert layer.prologue is None and torch.equal(layer.weight, class_pipe.unet.get_submodule(name).weight)
            continue
        assert layer.prologue.description == own.prologue.description and torch.equal(layer.weight, own.weight)
        assert torch.equal(layer.prologue.multiplier, own.prologue.multiplier)


def uncalibrated(pipe, keep=None):
    """A quantized pipeline that can be saved."""
    new = swap(pipe, 4, 8, keep=keep)
    for quantizer in input_quantizers(new.unet).values():
        quantizer.scale.data.fill_(1)
        quantizer.zero_point.zero_()
    for _, layer in quant_layers(new.unet):
        layer.choose_weight_range()
    return new


def test_a_layer_that_is_in_float_in_both_is_that_of_the_file(class_pipe, tmp_path):
    """SmoothQuant divides the rows of to_q and multiplies those of to_k, also where one of them stays in float."""
    keep = {"conv_in": 8, "conv_out": 8, "*.to_q": 32}
    start = uncalibrated(class_pipe, keep)
    changed = {n: m for n, m in quant_layers(start.unet) if n.endswith("to_q")}
    for layer in changed.values():
        layer.weight.data.mul_(2)
    quest.save(start, tmp_path / "m", floats=True)
    other = swap(class_pipe, 4, 8, keep=keep)
    load_weights(other.unet, tmp_path / "m")
    assert changed
    for name, layer in changed.items():
        assert torch.equal(other.unet.get_submodule(name).weight, layer.weight)


def test_layers_that_were_changed_together_are_taken_together(class_pipe, class_calibration, tmp_path):
    """SmoothQuant's factors between queries and keys: with to_q of the model and to_k of the file, logits are wrong."""
    plain = {"conv_in": 8, "conv_out": 8}
    start = quest.quantize(class_pipe, "smoothquant", "w8a8", calibration=class_calibration, samples=4)
    quest.save(start, tmp_path / "m", floats=True)
    attention = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    for leaf in ("to_q", "to_k"):
        student = swap(class_pipe, 8, 8, keep=plain | {f"*.{leaf}": 32})
        before = student.unet.get_submodule(f"{attention}.to_k").weight.clone()
        with pytest.raises(ValueError, match=rf"keep: .*attn1\.{leaf} .*keep all of them in float, or none"):
            load_weights(student.unet, tmp_path / "m")
        assert torch.equal(student.unet.get_submodule(f"{attention}.to_k").weight, before)
    x = random(1, 9, 32)
    expected = logits(class_pipe.unet.get_submodule(attention), x)
    tolerance = dict(rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    for keep in ({}, {"*.to_q": 32, "*.to_k": 32}, {"*.processor": 32}):
        student = swap(class_pipe, 8, 8, keep=plain | keep)
        load_weights(student.unet, tmp_path / "m")
        assert student.unet.coupled == start.unet.coupled
        for _, layer in quant_layers(student.unet):
            layer.input_quantizer.spec = layer.weight_quantizer.spec = QuantSpec(FLOAT)
        torch.testing.assert_close(logits(student.unet.get_submodule(attention), x), expected, **tolerance)
    # What starts from it, and what is loaded, says so in its own file.
    assert quest.load(class_pipe, tmp_path / "m").unet.coupled == start.unet.coupled
    found = header.read(tmp_path / "m")
    assert [f"{attention}.to_q", f"{attention}.to_k"] in found["coupled"]
    for wrong in ({}, ["a"], [[1]]):
        with pytest.raises(ValueError, match="coupled"):
            header.check(found | {"coupled": wrong}, "m")


@torch.no_grad()
def logits(attention, x):
    return attention.to_q(x) @ attention.to_k(x).mT


def test_unsigned_codes_cannot_start_from_signed_ones(class_pipe, tmp_path):
    """Scales of signed codes have zero point 0, with which unsigned ones would clip all negative weights."""
    start = uncalibrated(class_pipe)
    for _, layer in quant_layers(start.unet):
        layer.weight_quantizer.spec = replace(layer.weight_quantizer.spec, symmetric=True)
        layer.choose_weight_range()
    quest.save(start, tmp_path / "m", floats=True)
    with pytest.raises(ValueError, match=r"layer conv_in has weights .*codes from -128, not from 0"):
        load_weights(swap(class_pipe, 4, 8).unet, tmp_path / "m")


def test_damaged_prologues_are_refused(student, class_pipe, tmp_path):
    path = tmp_path / "model.safetensors"
    quest.save(student, path)
    found = header.read(path)
    for change in ({"block": 3}, {"block": 32}, {"form": "paley"}, {"single": 1}, {"scaled": None}, {"more": 1}):
        wrong = json.loads(json.dumps(found))
        wrong["prologues"]["conv_in"] |= change
        with pytest.raises(ValueError, match="prologues"):
            header.check(wrong, path)
    with pytest.raises(ValueError, match="prologues.nowhere"):
        header.check(found | {"prologues": {"nowhere": found["prologues"]["conv_in"]}}, path)
    for change in ({"scaled": False}, {"block": 64}):  # of 4 input channels
        wrong = json.loads(json.dumps(found))
        wrong["prologues"]["conv_in"] |= change
        layer = in_float(class_pipe.unet.conv_in)
        tensors = {"conv_in.prologue.multiplier": torch.ones(4)}
        with pytest.raises(ValueError, match="the prologue of conv_in does not fit its 4 input channels"):
            prologue.restore({"conv_in": layer}, wrong, tensors, path)
    for own, multiplier in ((layer, torch.ones(4).double()), (in_float(nn.Conv2d(4, 4, 3, groups=4)), torch.ones(1))):
        told = {"prologues": {"conv_in": found["prologues"]["conv_in"] | {"scaled": True, "block": 1}}}
        with pytest.raises(ValueError, match="the prologue of conv_in does not fit"):
            prologue.restore({"conv_in": own}, told, {"conv_in.prologue.multiplier": multiplier}, path)
