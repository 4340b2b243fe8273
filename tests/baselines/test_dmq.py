"""DMQ: factors that are learned, weights of timesteps, powers of two for channels, and its tables of steps."""

import copy
import json
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import quest
from baselines.dmq import SHIFTS
from quest.affine import FLOAT, QuantSpec, fake_quantize, quantize
from quest.kernels.cpu import integer
from quest.learning.adam import Descent
from quest.learning.scaling import POWER, TimestepWeights, learn_factors, learn_scaling
from quest.quantization import header, ranges
from quest.quantization.layers import input_quantizers, quant_layers, quantized
from quest.quantization.swapping import swap

QUICK = dict(rows=6, batch=2, weight_iterations=2, samples=2)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layer_of(plain, a=4):
    return quantized(plain.requires_grad_(False), QuantSpec(4, axis=0), QuantSpec(a), None)


def test_weights_of_timesteps():
    weights = TimestepWeights(1000)
    assert weights.bins(torch.tensor([0, 49, 50, 999])).tolist() == [0, 0, 1, 19]
    one = weights(torch.tensor([10, 20]), torch.tensor([3.0, 5.0]))
    assert one.tolist() == [1, 1] and weights.averages[0] == 4  # one bin: nothing to weigh
    two = weights(torch.tensor([10, 500]), torch.tensor([4.0, 12.0]))
    assert weights.averages[0] == 4 and weights.averages[10] == 12
    assert two.mean() == 1 and (two[0] / two[1]).item() == pytest.approx(((1 - 0.25) / (1 - 0.75)) ** POWER, rel=1e-5)
    weights(torch.tensor([500, 501, 502]), torch.tensor([2.0, 2.0, 2.0]))  # the mean: it does not grow with the rows
    assert weights.averages[10].item() == pytest.approx(0.95 * 12 + 0.05 * 2)


@pytest.mark.parametrize(
    "make, shape",
    [(partial(nn.Conv2d, 6, 8, 3, padding=1, stride=2), (16, 6, 8, 8)), (partial(nn.Linear, 6, 8), (16, 9, 6))],
    ids=("convolution", "linear"),
)
def test_learned_factors_lower_the_error_and_leave_the_float_layer(make, shape):
    torch.manual_seed(0)  # of the layer's weights
    plain = make()
    layer, x = layer_of(plain), random(*shape)
    channel = [slice(None)] * x.ndim
    channel[layer.channels] = 2
    x[tuple(channel)] *= 20  # an outlier channel
    expected, log_tau = plain(x), torch.zeros(6)
    generator = torch.Generator().manual_seed(0)

    def learn(iterations, log_tau):
        weights, descent = TimestepWeights(1000), Descent(iterations, 8, 0.05, generator)
        t = torch.arange(16) * 60
        return learn_factors("x", {"x": layer}, lambda r: x[r], t, {"x": (4, 4)}, log_tau, weights, descent, 16)

    before, same = learn(0, log_tau)
    assert before == same and not log_tau.any()
    first, after = learn(60, log_tau)
    assert first == before and after < 0.7 * before
    assert (log_tau.argmax() == 2) and log_tau.isfinite().all()
    layer.scale_input(log_tau.exp())
    layer.weight_quantizer.spec = layer.input_quantizer.spec = QuantSpec(FLOAT)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_layers_of_one_input_share_their_factors(class_pipe, class_calibration):
    student = swap(class_pipe, 4, 4, keep={"conv_in": 8, "conv_out": 8, "*.conv_shortcut": 32}).unet
    plain = copy.deepcopy(student)
    descent = Descent(3, 4, 0.02, torch.Generator().manual_seed(0))
    errors = learn_scaling(student, class_calibration.subset(torch.arange(8)), 1000, descent, "smooth")
    block = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    assert f"{block}.qkv" in errors and all(after <= before for before, after in errors.values())
    multipliers = [student.get_submodule(f"{block}.{leaf}").prologue.multiplier for leaf in ("to_q", "to_k", "to_v")]
    assert torch.equal(multipliers[0], multipliers[1]) and torch.equal(multipliers[0], multipliers[2])
    changed = sum(layer.prologue is not None for _, layer in quant_layers(student))
    assert changed > 0.7 * len(list(quant_layers(student)))
    inputs = class_calibration.inputs(torch.tensor([0, 1]))
    for name, layer in quant_layers(student):
        if "conv_shortcut" in name:
            assert layer.prologue is None and torch.equal(layer.weight, plain.get_submodule(name).weight)
        layer.weight_quantizer.spec = QuantSpec(FLOAT)
    for q in input_quantizers(student).values():
        q.spec = QuantSpec(FLOAT)
    torch.testing.assert_close(student(**inputs).sample, class_pipe.unet(**inputs).sample, rtol=1e-3, atol=1e-4)
    assert [stage["stage"] for stage in student.stages] == ["equivalent scaling"]


def test_without_scaling_and_shifts_the_weights_are_those_of_adaround(uncond_pipe, uncond_calibration):
    quick = {key: QUICK[key] for key in ("rows", "batch", "weight_iterations")}
    adaround = quest.quantize(uncond_pipe, "adaround", "w4a32", calibration=uncond_calibration, **quick)
    own = quest.quantize(
        uncond_pipe, "dmq", "w4a4", calibration=uncond_calibration, scaling_iterations=0, shift_agreement=2.0, **QUICK
    )
    for name, layer in quant_layers(own.unet):
        assert layer.prologue is None and layer.qweight.equal(adaround.unet.get_submodule(name).qweight)
    assert not any(q.spec.shifts for q in input_quantizers(own.unet).values())
    with pytest.raises(ValueError, match="bits w4a32: DMQ scales the channels of quantized activations"):
        quest.quantize(uncond_pipe, "dmq", "w4a32", calibration=uncond_calibration, **QUICK)


def shifted_input(samples=50, small=43):
    """[samples, 4, 3, 3]: channel 0 reaches 8; channel 1 reaches 0.25 in `small` of the samples and 8 in the others."""
    x = random(samples, 4, 3, 3).clamp(-1, 1) / 2
    x[:, 0] *= 16
    x[:small, 1] /= 2
    x[small:, 1] *= 16
    x[:, 0, 0, 0], x[:, 0, 0, 1] = 8, -8
    return x


@pytest.mark.parametrize("small, shifted", [(42, False), (43, True)])  # 84 and 86 %
def test_a_channel_is_shifted_where_85_percent_of_the_samples_agree(small, shifted):
    x, spec = shifted_input(small=small), QuantSpec(4, axis=1, shifts=SHIFTS)
    scale, zero_point = ranges.mse_shifted(x, spec)
    whole = ranges.mse_zero_point(x, QuantSpec(4))
    k = (whole[0] / scale.flatten()).log2()
    assert torch.equal(k, k.round()) and k.max() == 3 and k[0] == 0 and k.min() == 0
    assert (k[1] > 0) == shifted and (k[2:] > 0).all()
    assert torch.equal(zero_point.flatten(), whole[1].expand(4))
    assert ranges.mse_shifted(x, spec, agreement=1.01)[0].unique().numel() == 1


@pytest.mark.parametrize("padding", [0, 1])
def test_shifted_codes_are_summed_as_integers(padding):
    x, layer = shifted_input(), layer_of(nn.Conv2d(4, 5, 1 + 2 * padding, padding=padding, bias=False))
    layer.choose_weight_range(ranges.mse)
    layer.input_quantizer.spec = spec = QuantSpec(4, axis=1, shifts=SHIFTS)
    layer.input_quantizer.calibrate(x, ranges.mse_shifted)
    scale, zero_point, _ = qparams = layer.input_quantizer.qparams
    codes = quantize(x, qparams).codes
    assert codes.min() >= 0 and codes.max() <= 15
    assert torch.equal(fake_quantize(x, qparams), (codes - zero_point) * scale)
    finest = scale.min()
    places = (scale / finest).long()  # 2^(shifts - k), up to the finest channel there is
    assert places.unique().tolist() in ([1, 8], [1, 2, 8], [1, 4, 8], [1, 2, 4, 8])
    shifted = (codes - zero_point).long() * places
    assert shifted.abs().max() <= 15 * 8
    weight = layer.qweight
    sums = F.conv2d(shifted.double(), (weight.codes - weight.zero_point).double(), padding=padding)
    y = sums * finest.double() * weight.scale.double().flatten()[:, None, None]
    torch.testing.assert_close(layer(x).double(), y, rtol=1e-5, atol=1e-5)
    reason = integer.supports(weight, layer.weight_quantizer.spec, qparams)
    assert reason == "input: channels shifted by up to 3 bits" and spec.granularity.endswith("shifted by up to 3")
    for wrong in (dict(axis=None), dict(axis=1, rows="token"), dict(axis=1, shifts=0)):
        with pytest.raises(ValueError, match="shifts"):
            QuantSpec(4, **{"shifts": 3} | wrong)


def test_tables_of_a_step_depend_on_its_rows_alone(class_pipe, class_calibration, first_calls, tmp_path):
    class_calibration = first_calls(class_calibration)
    recipe = QUICK | dict(scaling_iterations=0, weight_iterations=0, shift_agreement=0.5)
    own = quest.quantize(class_pipe, "dmq", "w8a4", calibration=class_calibration, **recipe)
    other = copy.deepcopy(class_calibration)
    first = class_calibration.timestep == class_calibration.timesteps[0]
    other.sample[first] *= 3
    moved = quest.quantize(class_pipe, "dmq", "w8a4", calibration=other, **recipe)
    shifted = changed = 0
    for name, q in input_quantizers(own.unet).items():
        theirs = moved.unet.get_submodule(name)
        if q.spec == theirs.spec:
            assert torch.equal(q.scale[1:], theirs.scale[1:]) and torch.equal(q.zero_point[1:], theirs.zero_point[1:])
            changed += not torch.equal(q.scale[0], theirs.scale[0])
        assert not q.spec.shifts or "conv_shortcut" in name
        shifted += q.spec.shifts == SHIFTS and q.scale.ndim > 1
    assert shifted and changed > 20
    path = tmp_path / "m"
    quest.save(own, path)
    loaded = quest.load(class_pipe, path, kernel="reference")
    inputs = class_calibration.inputs(torch.tensor([0, 1]))
    with torch.no_grad():
        assert torch.equal(loaded.unet(**inputs).sample, own.unet(**inputs).sample)
    found = header.read(path)
    assert found["cost"]["footprint"]["static_scale_bits"] > 0
    name = next(n for n, (_, spec, *_) in found["layers"].items() if "shifts" in spec)
    for change in ({"shifts": 0}, {"axis": None}, {"group": 16}):
        wrong = json.loads(json.dumps(found))
        wrong["layers"][name][1] |= change
        with pytest.raises(ValueError, match=f"layers.{name}"):
            header.check(wrong, "m")
