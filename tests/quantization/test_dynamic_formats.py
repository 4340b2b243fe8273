"""Dynamic formats: scales that come from each tensor itself, per sample, per token and in groups of channels."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import quest
from quest.affine import FLOAT, QParams, QuantSpec, fake_quantize, measured, quantize
from quest.kernels import get, reference
from quest.kernels.cpu import core
from quest.quantization import cost, header, ranges
from quest.quantization.layers import input_quantizers, quant_layers, quantized
from quest.quantization.overhead import overhead
from quest.quantization.placement import place
from quest.quantization.quantizer import Quantizer
from quest.quantization.swapping import make_dynamic, swap
from quest.quantization.timegroups import TimeGroups

CLIP = (torch.tensor(1.0), torch.tensor(0.0))  # scale and zero point of a quantizer whose clip ratio is 1
ALL = [
    QuantSpec(4, symmetric, 1, rows=rows, group=group)
    for symmetric in (False, True)
    for rows in ("tensor", "token")
    for group in (None, 4)
]


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def dynamic_layer(layer, spec):
    """A quantized layer with 4-bit weights and this format of its input."""
    new = quantized(layer.requires_grad_(False), QuantSpec(4, axis=0), QuantSpec(4), None)
    new.choose_weight_range(ranges.minmax)
    new.input_quantizer.make_dynamic(spec)
    return new


@pytest.mark.parametrize("spec", ALL, ids=str)
def test_a_constant_row_comes_back_and_zeros_stay_zeros(spec):
    x = torch.full((2, 6, 3, 3), 0.3)
    x[1] = -1.7
    codes = quantize(x, QParams(*CLIP, spec))
    assert set((codes.codes - codes.zero_point).unique().tolist()) == {spec.qmax, -spec.qmax}
    # max / 7 * 7 is max but for its last bit.
    torch.testing.assert_close(codes.dequantize(), x, rtol=2**-23, atol=0)
    assert torch.equal(fake_quantize(torch.zeros(2, 6, 3, 3), QParams(*CLIP, spec)), torch.zeros(2, 6, 3, 3))


@pytest.mark.parametrize("spec", ALL, ids=str)
def test_a_sample_alone_is_as_in_a_batch(spec):
    x = random(3, 6, 5, 5) * torch.tensor([1.0, 30.0, 0.01])[:, None, None, None]
    whole = fake_quantize(x, QParams(*CLIP, spec))
    assert all(torch.equal(fake_quantize(x[i : i + 1], QParams(*CLIP, spec))[0], whole[i]) for i in range(3))


@pytest.mark.parametrize("spec", [spec for spec in ALL if spec.rows == "token"], ids=str)
def test_a_scaled_pixel_keeps_its_codes_and_leaves_others_alone(spec):
    layer = dynamic_layer(nn.Conv2d(6, 5, 3, padding=1), spec)
    x = random(1, 6, 7, 7)
    scaled = x.clone()
    scaled[:, :, 2, 3] *= 8
    before, after = (quantize(v, QParams(*CLIP, spec)) for v in (x, scaled))
    assert torch.equal(before.codes, after.codes)
    assert torch.equal(before.dequantize()[:, :, 2, 3] * 8, after.dequantize()[:, :, 2, 3])
    changed = (layer(x) != layer(scaled)).any(1)[0]
    assert changed[1:4, 2:5].any() and changed.sum() <= 9 and not changed[4:].any() and not changed[:, 5:].any()


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_group_of_all_channels_is_a_token_and_one_pixel_is_a_tensor(symmetric):
    def same(x, **a):
        return fake_quantize(x, QParams(*CLIP, QuantSpec(4, symmetric, 1, **a)))

    x = random(2, 6, 5, 5)
    assert torch.equal(same(x, rows="token", group=6), same(x, rows="token"))
    assert torch.equal(same(x, rows="tensor", group=99), same(x, rows="tensor"))
    x = random(2, 6, 1, 1)
    assert torch.equal(same(x, rows="token"), same(x, rows="tensor"))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("layer", [nn.Conv2d(10, 5, 3, padding=1), nn.Conv2d(10, 5, 3, stride=2), nn.Conv2d(10, 5, 1)])
def test_a_convolution_is_its_sums_of_codes_by_tap_and_group(layer, symmetric):
    """One integer sum for each tap and group of channels, times the scale of that pixel and group; 10 is not 4 n."""
    spec = QuantSpec(4, symmetric, 1, rows="token", group=4)
    q = dynamic_layer(layer, spec)
    x = random(2, 10, 6, 6)
    pixels, weight = quantize(x, QParams(*CLIP, spec)), q.qweight
    centred = (pixels.codes - pixels.zero_point).double()
    scale = pixels.scale.double()
    w = (weight.codes - weight.zero_point).double()
    y = torch.zeros_like(q(x), dtype=torch.float64)
    stride, (pad, _) = layer.stride[0], layer.padding
    for i in range(layer.kernel_size[0]):
        for j in range(layer.kernel_size[1]):
            for group in torch.arange(10).split(4):
                sums, scales = (F.pad(t[:, group], (pad,) * 4) for t in (centred, scale))
                sums, scales = (t[:, :, i:, j:][:, :, ::stride, ::stride] for t in (sums, scales))
                sums, scales = (t[:, :, : y.shape[2], : y.shape[3]] for t in (sums, scales))
                total = torch.einsum("nchw,oc->nohw", sums, w[:, group, i, j])
                assert torch.equal(total, total.round())
                y += total * scales[:, :1]
    y = y * weight.scale.double().flatten()[:, None, None] + layer.bias.double()[:, None, None]
    torch.testing.assert_close(q(x).double(), y, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("spec", ALL, ids=str)
def test_padding_is_the_real_zero(spec):
    conv = nn.Conv2d(6, 5, 3, padding=1)
    q = dynamic_layer(conv, spec)
    x = random(2, 6, 5, 5) + 0.5
    # Without padding of its own, on an input that holds the zeros.
    bare = dynamic_layer(nn.Conv2d(6, 5, 3), spec)
    bare.load_state_dict(q.state_dict())
    torch.testing.assert_close(q(x), bare(F.pad(x, (1, 1, 1, 1))), rtol=1e-6, atol=1e-6)


def test_symmetric_codes_end_at_seven_and_unsigned_ones_reach_both_ends():
    x = torch.tensor([[-4.0, 1.0, 2.1, 3.0]])
    q = quantize(x, QParams(*CLIP, QuantSpec(4, True, -1, rows="token")))
    assert q.codes.tolist() == [[-7, 2, 4, 5]]
    clipped = quantize(x, QParams(torch.tensor(0.5), CLIP[1], QuantSpec(4, True, -1, rows="token")))
    assert clipped.codes[0, 0] == -7 and clipped.codes[0, -1] == 7 and clipped.scale.item() == pytest.approx(2 / 7)
    q = quantize(x, QParams(*CLIP, QuantSpec(4, False, -1, rows="token")))
    assert q.codes[0, 0] == 0 and q.codes[0, -1] == 15 and q.zero_point.item() == round(4 / (7 / 15))
    # Values on one side of zero: the range includes zero all the same.
    q = quantize(x.abs() + 1, QParams(*CLIP, QuantSpec(4, False, -1, rows="token")))
    assert q.zero_point.item() == 0 and q.scale.item() == pytest.approx(5 / 15)


def test_static_symmetric_codes_are_those_of_dynamic_ones():
    """-7 to 7 in the methods that offer both; what Q-Diffusion and QuEST released starts at -8."""
    x = torch.tensor([[-4.0, 1.0, 2.1, 3.0]])
    dynamic = quantize(x, QParams(torch.tensor(0.5), CLIP[1], QuantSpec(4, True, -1, rows="token")))
    narrow, released = QuantSpec(4, True, narrow=True), QuantSpec(4, True)
    qparams = QParams(dynamic.scale.squeeze(), torch.tensor(0.0), narrow)
    assert torch.equal(quantize(x, qparams).codes, dynamic.codes) and dynamic.codes[0, 0] == -7
    assert quantize(x, qparams._replace(spec=released)).codes[0, 0] == -8
    assert (narrow.qmin, released.qmin, QuantSpec(8, True, narrow=True).qmin) == (-7, -8, -127)
    assert "narrow" not in released.fields and QuantSpec(**narrow.fields) == narrow
    for wrong in (dict(), dict(symmetric=True, wide=True)):
        with pytest.raises(ValueError, match="narrow"):
            QuantSpec(4, narrow=True, **wrong)


def test_gradients_are_those_of_automatic_differentiation():
    spec = QuantSpec(4, False, 1, rows="token", group=4)
    grads = []
    for function in (fake_quantize, lambda x, q: quantize(x, q).dequantize()):
        x, clip = random(2, 6, 3, 3).requires_grad_(), torch.tensor(0.8, requires_grad=True)
        (function(x, QParams(clip, CLIP[1], spec)) * random(2, 6, 3, 3, seed=1)).sum().backward()
        grads.append((x.grad, clip.grad))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "fields, said",
    [
        (dict(bits=4, rows="row", axis=1), "rows: 'row' is not one of tensor, token"),
        (dict(bits=4, rows="token"), "a dynamic format has an axis"),
        (dict(bits=32, rows="token", axis=1), "2 to 16 bits"),
        (dict(bits=4, group=16), "group: of the indices of an axis"),
        (dict(bits=4, rows="token", axis=1, group=0), "valid: 1 or more"),
    ],
)
def test_formats_without_meaning_are_refused(fields, said):
    with pytest.raises(ValueError, match=said):
        QuantSpec(**fields)


def test_time_groups_are_refused(uncond_pipe):
    spec = QuantSpec(4, axis=1, rows="token")
    with pytest.raises(ValueError, match="time groups: a dynamic format"):
        Quantizer(spec, groups=TimeGroups([9, 4]))
    student = swap(uncond_pipe, 4, 4, groups=TimeGroups([999, 400]))
    with pytest.raises(ValueError, match="time groups: a dynamic format"):
        make_dynamic(student.unet, "token")
    quantizer = Quantizer(QuantSpec(4), groups=TimeGroups([9, 4]))
    quantizer.spec = spec
    with pytest.raises(ValueError, match="time groups: a dynamic format"):
        quantizer(torch.zeros(1, 1))


@pytest.mark.parametrize("kernel", ["integer", "triton"])
def test_other_kernels_refuse_them_by_name(kernel):
    layer = dynamic_layer(nn.Linear(6, 5), QuantSpec(4, axis=-1, rows="token", group=4))
    parameters = layer.input_quantizer.qparams
    said = get(kernel).supports(layer.qweight, layer.weight_quantizer.spec, parameters)
    assert said == "input: scales dynamic per token in groups of 4"
    static = QParams(*CLIP, QuantSpec(8))
    said = get(kernel).supports_attention(static, static, QParams(*CLIP, QuantSpec(8, axis=-2, rows="tensor")), static)
    assert said == "v: scales dynamic per tensor"


@pytest.fixture(scope="module")
def student(class_pipe):
    """A tiny denoiser with groups of 16, of which the first layer has 8 bits and shortcuts stay in float."""
    new = swap(class_pipe, 4, 4, keep={"conv_in": 8, "*.conv_shortcut": 32})
    for _, layer in quant_layers(new.unet):
        layer.choose_weight_range(ranges.minmax)
    make_dynamic(new.unet, "token", 16, symmetric=True)
    return new


def test_scales_lie_on_the_dimension_that_a_product_sums_over(student):
    specs = {name: q.spec for name, q in input_quantizers(student.unet).items()}
    assert specs["conv_in.input_quantizer"] == QuantSpec(8, True, 1, rows="token", group=16)
    assert specs["time_embedding.linear_1.input_quantizer"] == QuantSpec(4, True, -1, rows="token", group=16)
    attention = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor"
    assert specs[f"{attention}.q"] == specs[f"{attention}.k"] == QuantSpec(4, True, -1, rows="token", group=16)
    assert specs[f"{attention}.v"] == QuantSpec(4, True, -2, rows="token", group=16)
    assert specs[f"{attention}.p"] == QuantSpec(8, False, -1, rows="token", group=16)  # never negative
    shortcut = next(name for name in specs if "conv_shortcut" in name)
    assert specs[shortcut] == QuantSpec(FLOAT)


def test_products_of_attention_are_their_sums_of_codes():
    """q k^T has one sum for each row, column and group of channels; p v one for each group of keys."""
    q, k, v = (random(3, *shape, seed=i) for i, shape in enumerate([(5, 6), (7, 6), (7, 6)]))
    specs = [QuantSpec(8, axis=axis, rows="token", group=4) for axis in (-1, -1, -2, -1)]
    params = [QParams(*CLIP, spec) for spec in specs]

    def product(a, b, spec_a, spec_b):
        a, b = quantize(a, QParams(*CLIP, spec_a)), quantize(b, QParams(*CLIP, spec_b))
        y = 0
        for group in torch.arange(a.shape[-1]).split(4):
            sums = (a.codes - a.zero_point)[..., group].double() @ (b.codes - b.zero_point)[:, group].double()
            scale = a.scale[..., group[:1]] * b.scale[:, group[:1]]
            assert torch.equal(sums, sums.round())
            y = y + sums * scale
        return y

    logits = product(q, k.transpose(1, 2), specs[0], QuantSpec(8, axis=1, rows="token", group=4))
    p = (logits * 0.3).softmax(-1).float()
    expected = product(p, v, specs[3], specs[2])
    torch.testing.assert_close(reference.attention(q, k, v, params, 0.3).double(), expected, rtol=1e-5, atol=1e-5)


def test_save_and_load(student, class_pipe, class_calibration, tmp_path):
    inputs = class_calibration.inputs(torch.tensor([0, 1]))
    with torch.no_grad():
        expected = student.unet(**inputs).sample
    path = tmp_path / "model.safetensors"
    quest.save(student, path)
    loaded = quest.load(class_pipe, path, kernel="reference")
    with torch.no_grad():
        assert torch.equal(loaded.unet(**inputs).sample, expected)
    for name, q in input_quantizers(loaded.unet).items():
        assert q.spec == student.unet.get_submodule(name).spec
    if core.available():  # only the reference kernel computes attention in groups, and the placement says so
        refused = place(loaded.unet, "integer").refused
        assert refused["down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor"].startswith(
            "q: scales dynamic per token in groups of 16"
        )
        layers = dict(quant_layers(loaded.unet))
        assert {n for n in layers if n in refused} == {n for n in layers if "conv_shortcut" in n}


def test_headers_say_what_dynamic_formats_are_and_nothing_of_others(student, tmp_path):
    path = tmp_path / "model.safetensors"
    quest.save(student, path)
    found = header.read(path)
    assert found["format"] == 2 and found["granularity"]["activations"] == "dynamic per token in groups of 16"
    assert found["layers"]["conv_in"][1] == dict(bits=8, symmetric=True, axis=1, wide=False, rows="token", group=16)
    assert found["layers"]["conv_in"][0] == dict(bits=8, symmetric=False, axis=0, wide=False)
    for index, change, said in (
        (1, {"axis": None}, r"layers.conv_in\[1\].rows"),
        (1, {"rows": "row"}, r"layers.conv_in\[1\].rows"),
        (1, {"group": 0}, r"layers.conv_in\[1\].group"),
        (0, {"rows": "token"}, r"layers.conv_in\[0\].rows"),
        (0, {"group": 0}, r"layers.conv_in\[0\].group"),
    ):
        wrong = json.loads(json.dumps(found))
        wrong["layers"]["conv_in"][index] |= change
        with pytest.raises(ValueError, match=said):
            header.check(wrong, path)
    with pytest.raises(ValueError, match="no time groups"):
        header.check(found | {"time_groups": [999, 400]}, path)


NOTHING_ELSE = dict.fromkeys(("static_scale_bits", "weight_scale_bits", "branch_macs", "branch_bops"), 0)


def test_what_scales_cost(class_pipe, class_calibration):
    """Counted here for one convolution, one linear layer and one attention of the tiny denoiser."""
    inputs = class_calibration.inputs(torch.tensor([0]))

    def of(layers, **fields):
        new = swap(class_pipe, 4, 4, keep={"*": 32})
        for name in layers:
            module = new.unet.get_submodule(name)
            for kind in ("weight", "input"):
                getattr(module, f"{kind}_quantizer").spec = QuantSpec(4, axis=0 if kind == "weight" else None)
        for _, layer in quant_layers(new.unet):
            layer.choose_weight_range(ranges.minmax)
        if fields:
            make_dynamic(new.unet, **fields)
        else:
            for _, layer in quant_layers(new.unet):
                layer.input_quantizer.scale.data.fill_(1.0)
                layer.input_quantizer.zero_point.fill_(0.0)
        return overhead(new.unet, inputs)

    conv = "down_blocks.0.resnets.0.conv1"  # 32 -> 32 channels, 3 x 3, on 8 x 8 pixels
    assert of([conv]) == {"scale_bits": 0, "float_fmas": 64 * 32, "float_additions": 0} | NOTHING_ELSE
    assert of([conv], rows="tensor") == {"scale_bits": 24, "float_fmas": 64 * 32, "float_additions": 0} | NOTHING_ELSE
    assert (
        of([conv], rows="token")
        == {"scale_bits": 64 * 24, "float_fmas": 64 * 32 * 9, "float_additions": 0} | NOTHING_ELSE
    )
    grouped = of([conv], rows="token", group=16, symmetric=True)
    assert grouped == {"scale_bits": 64 * 2 * 16, "float_fmas": 64 * 32 * 9 * 2, "float_additions": 0} | NOTHING_ELSE
    assert of([conv], rows="tensor", group=16)["float_fmas"] == 64 * 32 * 2
    assert (
        of(["time_embedding.linear_1"], rows="token", group=16)
        == {
            "scale_bits": 2 * 24,
            "float_fmas": 128 * 2,
            "float_additions": 0,
        }
        | NOTHING_ELSE
    )
    attention = swap(class_pipe, 32, 32, keep={"*": 32})
    processor = attention.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2.processor  # 4 heads of 8
    for quantizer in (processor.q, processor.k, processor.v, processor.p):
        quantizer.spec = QuantSpec(8)
    make_dynamic(attention.unet, "token", 4)  # 64 queries, 2 keys
    heads, queries, keys = 4, 64, 2
    scales = heads * (queries * 2 + keys * 2 + 8 + queries)  # of q, k, v and p
    fmas = heads * (queries * keys * 2 + queries * 8)
    found = overhead(attention.unet, inputs)
    assert found == {"scale_bits": 24 * scales, "float_fmas": fmas, "float_additions": 0} | NOTHING_ELSE


def test_the_summary_has_them_beside_bit_operations(student, class_calibration):
    found = cost.summary(student.unet, 4, 4, class_calibration)["footprint"]
    inputs = class_calibration.inputs(torch.tensor([0]))
    counted = overhead(student.unet, inputs)
    assert all(found[name] == count for name, count in counted.items()) and found["float_fmas"] > 0
    assert found["bops"] == cost.bops(student.unet, cost.macs(student.unet, inputs))
    assert measured(torch.zeros(1, 1), QParams(*CLIP, QuantSpec(8))).scale is CLIP[0]  # a static format is as given


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(
    "plain, shape, axis", [(nn.Conv2d(10, 5, 3, padding=1), (2, 10, 6, 6), 1), (nn.Linear(10, 5), (2, 7, 10), -1)]
)
def test_static_groups_are_quantized_apart(plain, shape, axis, symmetric):
    """A static scale for 4 channels (the last 2 of 10): a group is that of a quantizer of its own; sums are whole."""
    layer = quantized(plain.requires_grad_(False), QuantSpec(4, axis=0), QuantSpec(4), None)
    layer.choose_weight_range(ranges.mse)
    layer.input_quantizer.spec = QuantSpec(4, symmetric, axis, group=4)
    x = random(*shape) * torch.arange(1, 11).view(-1, *[1] * (2 if axis == 1 else 0))
    x.narrow(axis, 8, 2).fill_(0.5)  # constant: its range reaches from zero
    layer.input_quantizer.calibrate(x, ranges.mse_zero_point)
    qparams = layer.input_quantizer.qparams
    y = torch.zeros_like(plain(x), dtype=torch.float64)
    weight = layer.qweight
    for group in torch.arange(10).split(4):
        part, alone = x.index_select(axis, group), QuantSpec(4, symmetric, narrow=symmetric or None)
        choose = ranges.minmax if group[0] == 8 else ranges.mse_zero_point
        own = QParams(*choose(part, alone), alone)
        dequantized = fake_quantize(part, own)
        assert torch.equal(fake_quantize(x, qparams).index_select(axis, group), dequantized)
        centred = quantize(part, own).codes - own.zero_point
        w = (weight.codes - weight.zero_point).double()[:, group]
        sums = F.linear(centred.double(), w) if axis == -1 else F.conv2d(centred.double(), w, padding=1)
        assert torch.equal(sums, sums.round())
        y += sums * own.scale.double()
    scale = weight.scale.double().flatten()
    y = y * scale + plain.bias if axis == -1 else y * scale[:, None, None] + plain.bias[:, None, None]
    torch.testing.assert_close(layer(x).double(), y, rtol=1e-5, atol=1e-5)
    # A group of all channels is a tensor; a file with another number of scales is refused when it is read.
    layer.input_quantizer.spec = QuantSpec(4, symmetric, axis, group=16)
    layer.input_quantizer.calibrate(x, ranges.mse_zero_point)
    whole = ranges.mse_zero_point(x, QuantSpec(4, symmetric, narrow=symmetric or None))
    assert all(
        torch.equal(a.unique(), b.view(1)) for a, b in zip(layer.input_quantizer.qparams[:2], whole, strict=True)
    )
    with pytest.raises(ValueError, match="group: of the indices of an axis"):
        QuantSpec(4, group=16)
