"""Conformance: what every method in METHODS must do, on tiny random pipelines."""

import copy
import inspect

import pytest
import torch

import quest
from baselines import METHODS
from quest.layers import input_quantizers, is_quantized, quant_layers

FAST = {"quest": dict(tla_iterations=2, cma_iterations=2, time_groups=3, batch=4, samples=8)}
QUANTIZING = [m for m in METHODS if m != "fp"]


@pytest.fixture(params=["uncond", "class", "text"])
def kind(request):
    return request.param


@pytest.fixture
def pipe(kind, request):
    return request.getfixturevalue(f"{kind}_pipe")


@pytest.fixture
def model(kind, request):
    return request.getfixturevalue(f"{kind}_model")


@pytest.fixture
def calibration(kind, request):
    return request.getfixturevalue(f"{kind}_calibration")


def same_images(a, b, model):
    from quest.sampling import arguments

    return torch.equal(*(p(**arguments(model, "evaluation", [0, 1]), output_type="latent").images for p in (a, b)))


def state(pipe):
    return {k: v.clone() for k, v in pipe.unet.state_dict().items()}


@pytest.mark.parametrize("method", QUANTIZING)
def test_conformance(method, pipe, model, calibration, tmp_path):
    """One quantization per kind and method, looked at from every side: a method costs seconds."""
    before = state(pipe)
    q = quest.quantize(pipe, method, "w4a8", calibration=calibration, **FAST.get(method, {}))

    # The given pipeline is as it was; nothing of it is shared that could change.
    assert not is_quantized(pipe.unet) and all(torch.equal(v, before[k]) for k, v in pipe.unet.state_dict().items())
    assert q.scheduler is not pipe.scheduler and not any(p.requires_grad for p in q.unet.parameters())

    # Every Linear, Conv2d and attention is quantized with the bits asked for; declared exceptions keep 8.
    for name, module in pipe.unet.named_modules():
        if type(module) in (torch.nn.Linear, torch.nn.Conv2d):
            layer = q.unet.get_submodule(name)
            bits = (layer.weight_quantizer.spec.bits, layer.input_quantizer.spec.bits)
            assert bits == ((8, 8) if name in ("conv_in", "conv_out") else (4, 8)), name
            codes = layer.packed / layer.weight_quantizer.scale[0] + layer.weight_quantizer.zero_point[0]
            assert (codes - codes.round()).abs().max() < 1e-2
            assert codes.min() > -0.5 and codes.max() < 2 ** bits[0] - 0.5
    for name, quantizer in input_quantizers(q.unet).items():
        assert quantizer.scale.isfinite().all() and (quantizer.scale > 0).all(), name
        assert quantizer.spec.bits == 8

    # Saving and loading gives the same pipeline, bit for bit.
    quest.save(q, tmp_path / "model.safetensors", commit="abc")
    loaded = quest.load(pipe, tmp_path / "model.safetensors")
    assert same_images(q, loaded, model)
    assert loaded.unet.quantization["method"] == method and loaded.unet.quantization["bits"] == "w4a8"

    # Deterministic.
    again = quest.quantize(pipe, method, "w4a8", calibration=calibration, **FAST.get(method, {}))
    assert all(torch.equal(v, state(q)[k]) for k, v in state(again).items())


@pytest.mark.parametrize("method", QUANTIZING)
def test_w8a8_is_near_full_precision_and_nearer_than_w4a4(method, pipe, calibration):
    from quest.calibration import eps_error

    error = {}
    for bits in ("w8a8", "w4a4"):
        q = quest.quantize(pipe, method, bits, calibration=calibration, **FAST.get(method, {}))
        error[bits] = eps_error(q, calibration)[0].mean()
    assert error["w8a8"] < 0.01 and error["w8a8"] < error["w4a4"] / 5, error


@pytest.mark.parametrize("method", METHODS)
def test_hyperparameters_have_defaults_and_typos_are_errors(method, uncond_pipe, uncond_calibration):
    parameters = list(inspect.signature(METHODS[method]).parameters.values())
    assert all(p.kind == p.KEYWORD_ONLY and p.default is not p.empty for p in parameters[4:])
    with pytest.raises(TypeError, match="epoch"):
        quest.quantize(uncond_pipe, method, "w4a8", calibration=uncond_calibration, epoch=3)


@pytest.mark.parametrize("method", QUANTIZING)
def test_quantized_or_half_precision_pipelines_are_refused(method, uncond_pipe, uncond_calibration):
    q = quest.quantize(uncond_pipe, "rtn", "w8a8", calibration=uncond_calibration)
    with pytest.raises(ValueError, match="already quantized"):
        quest.quantize(q, method, "w4a8", calibration=uncond_calibration, **FAST.get(method, {}))
    half = copy.copy(uncond_pipe)
    half.unet = copy.deepcopy(uncond_pipe.unet).half()
    with pytest.raises(ValueError, match="float16.*float32"):
        quest.quantize(half, method, "w4a8", calibration=uncond_calibration, **FAST.get(method, {}))


@pytest.mark.parametrize("bits", ["W4A4", "w4", "4/8", ""])
def test_malformed_bits(bits, uncond_pipe, uncond_calibration):
    with pytest.raises(ValueError, match="w<2 to 8>a<2 to 8> in small letters"):
        quest.quantize(uncond_pipe, "rtn", bits, calibration=uncond_calibration)


def test_unknown_method_lists_the_known(uncond_pipe, uncond_calibration):
    with pytest.raises(ValueError, match="rtn-mse.*quest"):
        quest.quantize(uncond_pipe, "qest", "w4a8", calibration=uncond_calibration)


def test_a_callable_is_a_method(uncond_pipe, uncond_calibration):
    q = quest.quantize(uncond_pipe, METHODS["rtn"], "w8a8", calibration=uncond_calibration, ranges="mse")
    named = quest.quantize(uncond_pipe, "rtn-mse", "w8a8", calibration=uncond_calibration)
    assert all(torch.equal(v, state(named)[k]) for k, v in state(q).items())


def test_a_constant_or_nan_calibration_input_names_the_layer(class_pipe, class_calibration):
    for value, said in ((float("nan"), "NaN"), (0.5, "constant")):
        broken = copy.deepcopy(class_calibration)
        broken.conditioning["encoder_hidden_states"][:] = value
        with pytest.raises(ValueError, match=rf"attn2\.to_k.*{said}"):
            quest.quantize(class_pipe, "rtn", "w8a8", calibration=broken)


def test_keep_names_layers(uncond_pipe, uncond_calibration):
    q = quest.quantize(uncond_pipe, "rtn", "w4a4", calibration=uncond_calibration, keep={"*conv_shortcut": 8})
    kept = {n for n, m in quant_layers(q.unet) if m.weight_quantizer.spec.bits == 8}
    assert kept and all(n.endswith("conv_shortcut") for n in kept)
    with pytest.raises(ValueError, match="conv_inn"):
        quest.quantize(uncond_pipe, "rtn", "w4a4", calibration=uncond_calibration, keep={"conv_inn": 8})
