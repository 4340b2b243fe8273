"""SmoothQuant: factors against the equation, searches against trying, and what it changes in float."""

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.activations import GEGLU
from torch import nn

import quest
from baselines import smoothquant
from baselines.smoothquant import SEARCHED, Recipe, factors, observe, search, tried
from quest.affine import FLOAT, QuantSpec, quantize
from quest.kernels.cpu import core, integer
from quest.learning.clipping import rows_of_each_step
from quest.learning.lowrank import weight_reach
from quest.quantization import ranges
from quest.quantization.layers import input_quantizers, quant_layers, quantized
from quest.quantization.swapping import swap


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layer_of(plain, w=4, a=4):
    return quantized(plain.requires_grad_(False), QuantSpec(w, axis=0 if w < FLOAT else None), QuantSpec(a), None)


def test_factors_are_those_of_equation_4():
    reach, weight = torch.tensor([4.0, 0.0, 1.0]), torch.tensor([0.25, 3.0, 1.0])
    assert factors(reach, weight, 0.5, 0.5).tolist() == [4.0, 1.0, 1.0]  # 1 for a channel that is always zero
    assert torch.equal(factors(reach, weight, 1.0, 0.0), torch.tensor([4.0, 1.0, 1.0]))
    assert factors(torch.tensor([1e-9]), torch.ones(1), 1.0, 0.0).item() == pytest.approx(1e-5)
    # alpha 0 with weights of equal reach: one factor for all channels.
    assert len(factors(torch.rand(8) + 0.1, torch.full((8,), 0.3), 0.0, 1.0).unique()) == 1
    assert SEARCHED[0] == (0.0, 0.0) and len(SEARCHED) == len(set(SEARCHED)) == 39
    assert torch.equal(factors(torch.rand(8) + 0.1, torch.rand(8), *SEARCHED[0]), torch.ones(8))


def test_the_reach_of_a_weight_is_over_its_outputs_and_taps_and_all_layers():
    layers = [layer_of(nn.Conv2d(3, 5, 3)), layer_of(nn.Conv2d(3, 2, 1))]
    by_hand = [max(layer.weight[:, c].abs().max().item() for layer in layers) for c in range(3)]
    assert weight_reach(layer.weight for layer in layers).tolist() == by_hand


def test_at_alpha_one_all_channels_reach_as_far():
    x, layer = random(4, 6, 5, 5) * torch.tensor([1.0, 9.0, 0.1, 3.0, 20.0, 0.5])[:, None, None], None
    layer = layer_of(nn.Conv2d(6, 5, 3))
    layer.scale_input(factors(x.abs().amax((0, 2, 3)), weight_reach([layer.weight]), 1.0, 0.0))
    assert layer.prologue(x, 1).abs().amax((0, 2, 3)).tolist() == pytest.approx([1.0] * 6)


def test_inputs_are_observed_once_for_layers_that_share_one(class_pipe, class_calibration):
    found = {o.layers: o.reach for o in observe(class_pipe.unet, class_calibration, Recipe())}
    block = "down_blocks.0.attentions.0.transformer_blocks.0"
    assert (f"{block}.attn1.to_q", f"{block}.attn1.to_k", f"{block}.attn1.to_v") in found
    assert (f"{block}.attn2.to_q",) in found and (f"{block}.attn2.to_k", f"{block}.attn2.to_v") in found
    layers = [n for n, m in class_pipe.unet.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    assert sorted(name for names in found for name in names) == sorted(layers)
    assert ("down_blocks.0.resnets.0.conv1",) in found
    # The largest value of each channel over all rows; the mean over steps is smaller.
    rows = torch.cat(rows_of_each_step(class_calibration, 32, 0))
    samples = class_calibration.inputs(rows)["sample"]
    torch.testing.assert_close(found[("conv_in",)], samples.abs().amax((0, 2, 3)))
    mean = {o.layers: o.reach for o in observe(class_pipe.unet, class_calibration, Recipe(statistic="mean"))}
    assert (mean[("conv_in",)] < found[("conv_in",)]).all()


@torch.no_grad()
def test_in_float_it_changes_nothing(class_pipe, class_calibration):
    """Factors of inputs, queries and keys, with weights and activations in float afterwards."""
    own = quest.quantize(class_pipe, "smoothquant", "w8a8", calibration=class_calibration, samples=4)
    changed = 0
    for name, layer in quant_layers(own.unet):
        layer.thaw()
        changed += not torch.allclose(layer.weight, class_pipe.unet.get_submodule(name).weight)
        layer.weight_quantizer.spec = QuantSpec(FLOAT)
    for quantizer in input_quantizers(own.unet).values():
        quantizer.spec = QuantSpec(FLOAT)
    assert changed == len(list(quant_layers(own.unet)))
    inputs = class_calibration.inputs(torch.tensor([0, 1]))
    expected = class_pipe.unet(**inputs).sample
    torch.testing.assert_close(own.unet(**inputs).sample, expected, rtol=1e-3, atol=1e-4)
    attention = own.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    plain = class_pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    x = random(1, 9, 32)
    q, k = attention.to_q(x), attention.to_k(x)
    torch.testing.assert_close(q @ k.mT, plain.to_q(x) @ plain.to_k(x).mT, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(q, plain.to_q(x))


def test_powers_of_two_keep_the_codes():
    """Codes of x / s are those of x at s times the step, if s is a power of two."""
    x, layer = random(2, 6, 5, 5), layer_of(nn.Conv2d(6, 5, 3))
    layer.scale_input(torch.full((6,), 8.0))
    smoothed = layer.prologue(x, 1)
    layer.input_quantizer.calibrate(smoothed, ranges.minmax)
    parameters = layer.input_quantizer.qparams
    assert torch.equal(
        quantize(smoothed, parameters).codes, quantize(x, parameters._replace(scale=parameters.scale * 8)).codes
    )


@pytest.mark.skipif(not core.available(), reason="no compiled core: installed without a C++ compiler")
@pytest.mark.parametrize(
    "plain, shape", [(nn.Linear(48, 5), (2, 9, 48)), (nn.Conv2d(48, 5, 3, padding=1), (2, 48, 6, 6))]
)
def test_the_integer_kernel_sums_the_same_codes(plain, shape):
    """With scales of 1 and whole zero points, its output is the sum of codes itself."""
    layer = layer_of(plain, 4, 8)
    layer.bias = None
    layer.scale_input(random(48, seed=1).abs() + 0.5)
    layer.choose_weight_range(ranges.mse)
    x = layer.prologue(random(*shape), layer.channels)
    layer.input_quantizer.calibrate(x, ranges.minmax)
    scale, zero_point, spec = layer.input_quantizer.qparams
    codes, weight = quantize(x, layer.input_quantizer.qparams).codes - zero_point, layer.qweight
    centred = (weight.codes - weight.zero_point).double()
    sums = F.linear(codes.double(), centred) if x.ndim == 3 else F.conv2d(codes.double(), centred, padding=1)
    unit = weight.__class__(weight.codes, torch.ones_like(weight.scale), weight.zero_point)
    # The input at its own scale; one multiplication by it remains.
    packed = integer.pack(unit)
    numbers = layer.input_quantizer.qparams._replace(scale=scale.item(), zero_point=zero_point.item())
    conv = dict(stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1) if x.ndim == 4 else {}
    y = (integer.conv2d if conv else integer.linear)(x, numbers, packed, None, **conv)
    assert torch.equal((y.double() / scale.double()).round(), sums)


def test_a_search_is_never_worse_than_no_factors(class_pipe, class_calibration):
    """On its rows, for layers that share an input (to_q, to_k, to_v), a convolution and a linear layer."""
    student, teacher = swap(class_pipe, 4, 4).unet, class_pipe.unet
    block = "down_blocks.0.attentions.0.transformer_blocks.0"
    wanted = [f"{block}.attn1.to_q", "down_blocks.0.resnets.0.conv2", f"{block}.ff.net.2"]
    groups = [o for o in observe(teacher, class_calibration, Recipe()) if set(o.layers) & set(wanted)]
    assert len(groups) == 3
    before = {n: student.get_submodule(n).weight.clone() for o in groups for n in o.layers}
    inputs = {}
    handles = [
        teacher.get_submodule(n).register_forward_hook(lambda m, args, y, n=n: inputs.update({n: (args[0], y)}))
        for n in before
    ]
    search(student, teacher, groups, class_calibration, seed=0)
    for handle in handles:
        handle.remove()
    better = 0
    for o in groups:
        errors = dict.fromkeys(("none", "found"), 0.0)
        for name in o.layers:
            x, y = inputs[name]
            layer = student.get_submodule(name)
            found = 1 / layer.prologue.multiplier
            plain = layer_of(teacher.get_submodule(name).__class__(*_sizes(teacher.get_submodule(name))))
            plain.weight.data, plain.bias = before[name], layer.bias
            for key, s in (("none", torch.ones_like(found)), ("found", found)):
                errors[key] += (tried(plain, s, x) - y).square().sum().item()
        assert errors["found"] <= errors["none"] * (1 + 1e-5)
        better += errors["found"] < 0.95 * errors["none"]
    assert better


def _sizes(module):
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features, module.bias is not None
    return module.in_channels, module.out_channels, module.kernel_size, module.stride, module.padding


def test_a_search_of_products_is_never_worse_on_its_logits(class_pipe, class_calibration):
    own = [
        quest.quantize(
            class_pipe, "smoothquant", "w8a8", calibration=class_calibration, samples=4, alpha=0.5, products=p
        )
        for p in (False, True)
    ]
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    rows = [pipe.unet.get_submodule(f"{name}.to_q").float_weight for pipe in own]
    factor = rows[0] / rows[1]  # one factor for each output channel
    assert torch.allclose(factor, factor[:, :1].expand_as(factor), rtol=1e-3)
    keys = [pipe.unet.get_submodule(f"{name}.to_k").float_weight for pipe in own]
    torch.testing.assert_close(keys[1] / keys[0], factor, rtol=1e-3, atol=1e-3)
    attention = own[0].unet.get_submodule(name)
    q, k = random(2, 9, 32) * (torch.arange(32) + 1), random(2, 9, 32, seed=1)
    pairs = [factors(q.abs().amax((0, 1)), k.abs().amax((0, 1)), *exponents) for exponents in SEARCHED]
    errors = smoothquant.logit_error(attention, q, k, pairs)
    assert errors.argmin() > 0 and errors.min() < 0.9 * errors[0]


@torch.no_grad()
def test_what_a_norm_or_a_gate_can_hold_is_the_same_as_a_prologue():
    """1 / s folded into a layer norm's affine, and into the rows of the linear half of a GEGLU (in float, exactly)."""
    norm, gate = nn.LayerNorm(8), GEGLU(8, 12)
    norm.weight.data, norm.bias.data = random(8, seed=1), random(8, seed=2)
    out = nn.Linear(12, 5)
    x, s, t = random(3, 8), random(8, seed=3).abs() + 0.5, random(12, seed=4).abs() + 0.5
    expected = out(gate(norm(x)))
    layers = [layer_of(nn.Linear(8, 24), FLOAT, FLOAT), layer_of(out, FLOAT, FLOAT)]
    layers[0].weight, layers[0].bias = gate.proj.weight.requires_grad_(False), gate.proj.bias.requires_grad_(False)
    layers[0].weight = nn.Parameter(layers[0].weight.clone(), requires_grad=False)
    layers[1].weight = nn.Parameter(layers[1].weight.clone(), requires_grad=False)
    for layer, factor in zip(layers, (s, t), strict=True):
        layer.scale_input(factor)

    def gated(y):
        hidden, opened = y.chunk(2, -1)
        return hidden * F.gelu(opened)

    torch.testing.assert_close(layers[1](gated(layers[0](norm(x)))), expected, rtol=1e-5, atol=1e-5)
    # The same weights without prologues, after a norm and a gate that hold the factors.
    folded = nn.LayerNorm(8)
    folded.weight.data, folded.bias.data = norm.weight / s, norm.bias / s
    first, bias = layers[0].weight.clone(), layers[0].bias.clone()
    first[:12] /= t[:, None]
    bias[:12] /= t
    y = F.linear(gated(F.linear(folded(x), first, bias)), layers[1].weight, layers[1].bias)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


def test_layers_in_float_are_left_alone(class_pipe, class_calibration):
    keep = {"conv_in": 8, "conv_out": 8, "*.conv_shortcut": 32, "*.processor": 32}
    own = quest.quantize(class_pipe, "smoothquant", "w4a8", calibration=class_calibration, samples=4, keep=keep)
    for name, layer in quant_layers(own.unet):
        assert (layer.prologue is None) == ("conv_shortcut" in name)
