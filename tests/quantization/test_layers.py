import copy
import pickle

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from torch import nn
from torch.nn.utils import parametrize, prune

from quest.affine import FLOAT, QParams, QuantSpec, fake_quantize
from quest.kernels import reference
from quest.quantization import placement, ranges
from quest.quantization.layer_names import LAYER_CLASSES, layer_class
from quest.quantization.layers import attentions, input_quantizers, quant_layers, quantized
from quest.quantization.swapping import swap


def calibrated(layer, x, w, a):
    new = quantized(copy.deepcopy(layer), QuantSpec(w, axis=0), QuantSpec(a), None)
    new.choose_weight_range(ranges.mse)
    new.input_quantizer.calibrate(x, ranges.minmax)
    return new


CASES = [
    (nn.Linear(7, 5), (3, 11, 7)),
    (nn.Linear(7, 5, bias=False), (3, 7)),
    (nn.Conv2d(6, 4, 3, padding=1), (2, 6, 9, 9)),
    (nn.Conv2d(6, 4, 3, stride=2, padding=1, bias=False), (2, 6, 9, 9)),
    (nn.Conv2d(6, 6, 3, groups=3, dilation=2), (2, 6, 9, 9)),
]


@pytest.mark.parametrize("layer, shape", CASES, ids=lambda v: str(v)[:40])
@pytest.mark.parametrize("w, a", [(4, 4), (8, 8)])
def test_a_layer_is_its_float_self_on_fake_quantized_input_and_weight(layer, shape, w, a):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    q = calibrated(layer, x, w, a)
    expected = copy.deepcopy(layer)
    expected.weight.data = fake_quantize(layer.weight.data, q.weight_quantizer.qparams)
    y = expected(fake_quantize(x, q.input_quantizer.qparams))
    torch.testing.assert_close(q(x), y, rtol=1e-5, atol=1e-6)
    live = q(x)
    q.freeze()
    assert torch.equal(q(x), live)


def test_sixteen_bits_are_almost_float():
    layer, shape = CASES[2]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert (calibrated(layer, x, 16, 16)(x) - layer(x)).abs().max() < 1e-3


@pytest.mark.parametrize(
    "write",
    [
        lambda q, d: setattr(q.weight, "data", d),
        lambda q, d: q.weight.data.add_(d),  # fusing LoRA weights
        lambda q, d: q.weight.add_(d),
        lambda q, d: q.weight.copy_(d),
        lambda q, d: setattr(q, "weight", q.weight + d),
        lambda q, d: setattr(q, "weight", d),
        lambda q, d: torch.add(d, d, out=q.weight),
        lambda q, d: prune.l1_unstructured(q, "weight", 0.5),
        lambda q, d: parametrize.register_parametrization(q, "weight", nn.Identity()),
        lambda q, d: q.load_state_dict(q.state_dict() | {"weight": d}),
        lambda q, d: q.load_state_dict({"weight": d}, strict=False),
        lambda q, d: q.choose_weight_range(),
    ],
)
def test_a_write_into_a_frozen_weight_is_refused(write):
    layer, shape = CASES[0]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    q = calibrated(layer, x, 8, 8)
    q.freeze()
    before, delta = q(x), torch.full((5, 7), 0.1)
    with pytest.raises((AttributeError, TypeError, ValueError, RuntimeError), match="QTensor|frozen|cannot|Unexpected"):
        write(q, delta)
    assert q.is_frozen and torch.equal(q(x), before)
    q.thaw()
    assert torch.equal(q(x), before)
    q.weight.data.add_(delta)
    assert not torch.equal(q(x), before)


def test_a_parameter_in_place_of_a_frozen_weight_thaws_the_layer():
    layer, shape = CASES[2]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    q, expected = calibrated(layer, x, 8, 8), calibrated(layer, x, 8, 8)
    q.freeze()
    q.weight = nn.Parameter(0.5 * layer.weight.detach())
    expected.weight.data.mul_(0.5)
    assert not q.is_frozen and torch.equal(q(x), expected(x))
    q.freeze()
    assert torch.equal(q(x), expected(x))


@pytest.mark.parametrize("layer, shape", CASES, ids=lambda v: str(v)[:40])
@pytest.mark.parametrize("kernel", ["reference", "integer"])
def test_a_frozen_layer_is_a_module_like_others(layer, shape, kernel):
    """Copies, pickles, state dicts, devices and memory formats keep its codes."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    layer = copy.deepcopy(layer).requires_grad_(False)
    q, other = calibrated(layer, x, 4, 8), calibrated(layer, 2 * x, 4, 8)
    if kernel == "integer" and placement.refusal(q, kernel):
        pytest.skip("not on integers")
    other.weight.data.mul_(0.3)
    other.choose_weight_range()
    for one in (q, other):
        one.freeze(kernel)
    y, weight = q(x), q.weight
    assert not other.weight.equal(weight)
    learned = calibrated(layer, x, 4, 8)
    for state in (q.state_dict(), pickle.loads(pickle.dumps(q.state_dict()))):
        assert "weight" not in state
        for one in (other, learned):
            one.load_state_dict(state)
            assert one.is_frozen and one.weight.equal(weight)
        assert torch.equal(other(x), y)
    learned.freeze(kernel)
    for one in (learned, copy.deepcopy(q), pickle.loads(pickle.dumps(q))):
        assert one.weight.equal(weight) and torch.equal(one(x), y)
    q.to(memory_format=torch.channels_last)
    assert q.weight.equal(weight) and torch.allclose(q(x), y, rtol=1e-5, atol=1e-6)
    q.to("meta").to_empty(device="cpu")
    q.load_state_dict(other.state_dict())
    assert torch.allclose(q(x), y, rtol=1e-5, atol=1e-6)
    without = {k: v for k, v in other.state_dict().items() if k != "codes"}
    with pytest.raises(RuntimeError, match="Missing key.*codes"):
        q.load_state_dict(without)
    q.load_state_dict(without, strict=False)
    with pytest.raises(RuntimeError, match="codes: a frozen weight takes 4-bit codes"):
        q.load_state_dict(other.state_dict() | {"codes": torch.zeros(3, 3, dtype=torch.uint8)})


def test_a_compiled_layer_computes_the_same():
    layer, shape = CASES[2]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    q = calibrated(layer, x, 8, 8)
    compiled = torch.compile(q, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), q(x))
        q.freeze()
        assert torch.equal(compiled(x), q(x))


@pytest.mark.parametrize("kind", ["uncond", "class", "text"])
def test_swapped_denoiser_with_fine_codes_is_the_float_denoiser(kind, request):
    """The quantized attention computes what diffusers' own processor does, and no layer is forgotten."""
    pipe, calibration = request.getfixturevalue(f"{kind}_pipe"), request.getfixturevalue(f"{kind}_calibration")
    from quest.learning.calibrate import calibrate

    q = swap(pipe, 16, 16, softmax_bits=16)
    for _, layer in quant_layers(q.unet):
        layer.choose_weight_range(ranges.minmax)
    calibrate(q.unet, calibration, ranges.minmax, samples=len(calibration), seed=0)
    inputs = calibration.inputs(torch.arange(4))
    y, expected = q.unet(**inputs).sample, pipe.unet(**inputs).sample
    assert (y - expected).abs().max() < 2e-3 * expected.abs().max()
    assert len(list(attentions(q.unet))) == len(list(attentions(pipe.unet))) > 0
    floats = [n for n, m in q.unet.named_modules() if type(m) in (nn.Linear, nn.Conv2d)]
    assert not floats
    assert len(input_quantizers(q.unet)) == len(list(quant_layers(q.unet))) + 4 * len(list(attentions(q.unet)))


@pytest.mark.parametrize("kind", ["uncond", "class", "text"])
def test_with_all_quantizers_off_the_denoiser_is_the_float_one_bit_for_bit(kind, request):
    """Against diffusers' attention as two products, which the quantized one is, not its fused one."""
    pipe, calibration = request.getfixturevalue(f"{kind}_pipe"), request.getfixturevalue(f"{kind}_calibration")
    inputs = calibration.inputs(torch.arange(4))
    off, plain = swap(pipe, FLOAT, FLOAT).unet, copy.deepcopy(pipe.unet)
    for _, attention in attentions(plain):
        attention.set_processor(AttnProcessor())
    with torch.no_grad():
        assert torch.equal(off(**inputs).sample, plain(**inputs).sample)


def test_uncalibrated_quantizers_do_not_pass_unnoticed(uncond_pipe):
    q = swap(uncond_pipe, 8, 8)
    c = q.unet.config
    for _, layer in quant_layers(q.unet):
        layer.choose_weight_range()
    assert q.unet(torch.zeros(1, c.in_channels, 8, 8), 1).sample.isnan().all()


def test_attention_quantizes_normalised_probabilities():
    """The second product multiplies the 4-bit codes of softmax(scale q k^T)."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, 8, generator=g) for n in (5, 7, 7))
    fine = QuantSpec(16)
    wide = QParams(*ranges.minmax(torch.cat([q, k, v], 1), fine), fine)
    p = torch.softmax(0.3 * q @ k.transpose(1, 2), -1)
    coarse = QuantSpec(4)
    scale, zero_point = ranges.always_zero(p, coarse)
    y = reference.attention(q, k, v, [wide, wide, wide, QParams(scale, zero_point, coarse)], 0.3)
    torch.testing.assert_close(y, fake_quantize(p, QParams(scale, zero_point, coarse)) @ v, rtol=1e-3, atol=1e-3)
    assert zero_point == 0 and torch.isclose(scale * 15, p.max())
    assert (y - p @ v).abs().max() > 1e-2  # and that is not the float product


@pytest.mark.parametrize("kind", ["uncond", "class", "text"])
def test_every_layer_has_a_class(kind, request):
    pipe = request.getfixturevalue(f"{kind}_pipe")
    classes = {layer_class(n) for n, m in pipe.unet.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    assert "other" not in classes and classes <= {c for c, _ in LAYER_CLASSES}
    assert "time embedding" in classes and "attention q, k, v" in classes


def test_large_attentions_are_computed_in_parts(monkeypatch):
    """The same bits, gradients too, but for that of the probabilities' scale, which is summed over the parts."""
    torch.manual_seed(0)
    tensors = torch.randn(6, 5, 4), torch.randn(6, 7, 4), torch.randn(6, 7, 4)
    spec, found = QuantSpec(4), []
    for at_once in (2**26, 2 * 5 * 7):
        monkeypatch.setattr(reference, "AT_ONCE", at_once)
        given = [t.clone().requires_grad_() for t in tensors]
        scales = [torch.tensor(s, requires_grad=True) for s in (0.3, 0.2, 0.3, 0.05)]
        params = [QParams(s, torch.tensor(z), spec) for s, z in zip(scales, (7.0, 8.0, 6.0, 0.0), strict=True)]
        y = reference.attention(*given, params, 0.5)
        y.square().sum().backward()
        with torch.no_grad():
            silent = reference.attention(*given, params, 0.5)
        assert torch.equal(y, silent)
        observed = reference.observed_probabilities(*tensors[:2], 0.5)
        extremes = torch.stack([observed.amin(0), observed.amax(0)])
        assert len(observed) == (6 if at_once == 2**26 else 2)
        found.append([y, extremes, *(t.grad for t in given + scales[:3]), scales[3].grad])
    assert all(torch.equal(a, b) for a, b in zip(*(f[:-1] for f in found), strict=True))
    torch.testing.assert_close(found[0][-1], found[1][-1], rtol=1e-5, atol=1e-6)
