"""Whole denoisers on the integer kernel: what they hold in memory, what they compute, what stays on the reference.

Tests with `isa` compute with every instruction set of this machine.
"""

import copy
import os
import subprocess
import sys
from dataclasses import replace
from functools import cache

import pytest
import torch
from operands import needs_core
from torch import nn

import quest
from quest import kernels
from quest.affine import QTensor, QuantSpec
from quest.diffusion.calibration_set import collect
from quest.diffusion.models import MODELS
from quest.diffusion.sampling import arguments, generate
from quest.kernels.cpu import integer
from quest.quantization import checkpoint, cost, packing
from quest.quantization.layers import QuantLayer, attentions, quant_layers, quantized
from quest.quantization.placement import deviation, on_reference, place
from quest.quantization.swapping import swap

pytestmark = [needs_core, pytest.mark.usefixtures("no_gradients")]


def in_memory(layer: QuantLayer) -> int:
    """Bytes of every tensor that a layer holds for its weight: all but the bias and the quantizers of activations."""
    tensors = {**dict(layer.named_parameters()), **dict(layer.named_buffers()), **vars(layer)}
    other = ("bias", "input_quantizer.", "output_quantizer.")
    found = [t for n, t in tensors.items() if isinstance(t, torch.Tensor) and not n.startswith(other)]
    assert any(t is layer.operand for t in found)
    return sum(t.untyped_storage().nbytes() for t in found if not t.is_meta)


@pytest.fixture(scope="module")
def shipped():
    """A model that ships, its convolutions with channels innermost."""
    model = MODELS["scenes-class"]
    pipe = model.load()
    return pipe, collect(pipe, replace(model, steps=2), "calibration", 1)


@pytest.mark.parametrize("bits, most", [("w4a4", 0.165), ("w8a8", 0.29)])
def test_a_loaded_model_holds_the_codes_of_its_weights_only(shipped, bits, most, tmp_path):
    """All else is as if the float weights were there."""
    (pipe, calibration), path = shipped, tmp_path / "m.safetensors"
    made = quest.quantize(pipe, "rtn", bits, calibration=calibration, samples=1)
    quest.save(made, path)
    denoiser, twin = (quest.load(pipe, path, kernel=kernel).unet for kernel in ("integer", "reference"))
    layers = dict(quant_layers(denoiser))
    assert all(isinstance(layer.weight, QTensor) and layer.origin is None for layer in layers.values())
    assert sum(map(in_memory, layers.values())) <= most * sum(4 * layer.weight.numel() for layer in layers.values())
    own, expected = denoiser.state_dict(), twin.state_dict()
    assert list(own) == list(expected)
    assert all(torch.equal(own[n], t) and own[n].stride() == t.stride() for n, t in expected.items())
    assert cost.parameters(denoiser) == cost.parameters(twin) and cost.stored(denoiser) == cost.stored(twin)

    inputs = calibration.inputs(torch.arange(2))
    copied, on_integers, e = copy.deepcopy(denoiser), denoiser(**inputs).sample, twin(**inputs).sample
    assert not torch.equal(on_integers, e)
    with on_reference(denoiser):
        assert torch.equal(denoiser(**inputs).sample, e)
    assert all(layer.kernel_name == "integer" and layer.codes is None for layer in layers.values())
    assert torch.equal(denoiser(**inputs).sample, on_integers) and torch.equal(copied(**inputs).sample, on_integers)
    for floats in (False, True):
        for name, unet in (("own", denoiser), ("twin", twin)):
            made.unet = unet
            quest.save(made, tmp_path / name, floats)
        own, expected = (checkpoint.read(tmp_path / name)[1] for name in ("own", "twin"))
        assert own.keys() == expected.keys() and all(torch.equal(own[n], t) for n, t in expected.items())
    place(copied, "integer")  # once more
    assert torch.equal(copied(**inputs).sample, on_integers)
    for _, layer in quant_layers(copied):
        layer.thaw()
        assert isinstance(layer.weight, nn.Parameter)
    place(copied, "reference")
    assert torch.equal(copied(**inputs).sample, e)


@pytest.mark.parametrize("kernel", ["integer", "triton"])
def test_what_was_learned_is_kept_beside_the_codes(kernel):
    """A method goes on from there; what is loaded from codes is made of them."""
    torch.manual_seed(0)
    layer = quantized(nn.Conv2d(6, 20, 3, padding=1), QuantSpec(4, axis=0), QuantSpec(8), None)
    layer.choose_weight_range()
    weight = layer.weight.detach().clone()
    on_codes, codes = layer.qweight.dequantize(), layer.qweight.codes
    layer.freeze(kernel)
    assert torch.equal(layer.float_weight, weight) and torch.equal(layer.weight.codes, codes)
    state = layer.state_dict()
    assert torch.equal(state["codes"], packing.pack(codes, QuantSpec(4))) and "weight" not in state
    layer.thaw()
    assert torch.equal(layer.weight, weight)
    layer.weight.data = weight.contiguous(memory_format=torch.channels_last)
    layer.load_state_dict(state)
    layer.freeze(kernel)
    assert layer.origin is None and torch.equal(layer.float_weight, on_codes)
    assert layer.weight.dequantize().is_contiguous(memory_format=torch.channels_last)
    layer.freeze("reference")
    assert torch.equal(layer.operand, on_codes) and layer.operand.is_contiguous(memory_format=torch.channels_last)
    layer.thaw()
    assert torch.equal(layer.weight, on_codes)


@pytest.fixture(scope="module")
def pairs(request, tmp_path_factory):
    """(kind, bits) -> one checkpoint on both kernels, made once, and its calibration set. Tests get copies."""

    @cache
    def make(kind, bits):
        pipe, calibration = (request.getfixturevalue(f"{kind}_{what}") for what in ("pipe", "calibration"))
        path = tmp_path_factory.mktemp("kernels") / "m.safetensors"
        quest.save(quest.quantize(pipe, "rtn", bits, calibration=calibration, samples=8), path)
        return {k: quest.load(pipe, path, kernel=k) for k in ("reference", "integer")}, calibration

    return make


@pytest.fixture(params=["w8a8", "w4a8", "w4a4"])
def placed(request, pairs):
    """kind -> the same checkpoint on both kernels."""

    def make(kind):
        pipes, calibration = pairs(kind, request.param)
        return {kernel: copy.deepcopy(pipe) for kernel, pipe in pipes.items()}, calibration

    return make


@pytest.mark.parametrize("kind", ["uncond", "class", "text"])
def test_layers_of_a_denoiser_given_the_same_inputs(isa, placed, kind):
    """Every layer and attention, with its own time group's ranges, on the inputs that it meets on the reference."""
    pipes, calibration = placed(kind)
    assert pipes["integer"].unet.placement == ("integer", {})
    twins = dict(pipes["integer"].unet.named_modules())
    compared = []

    def compare(name, twin):
        def hook(module, args, output):
            twin_output = twin(*args) if isinstance(module, QuantLayer) else nn.Module.__call__(twin, *args)
            difference = (twin_output - output).abs() / output.abs().max()
            if isinstance(module, QuantLayer):
                assert difference.max() < 3e-6, name
            else:  # a probability at a tie may take the neighbouring code
                assert difference.max() < 0.05 and (difference > 1e-5).float().mean() < 0.01, name
            compared.append(name)

        return hook

    reference_denoiser = pipes["reference"].unet
    handles = [m.register_forward_hook(compare(n, twins[n])) for n, m in quant_layers(reference_denoiser)]
    handles += [
        m.processor.register_forward_hook(compare(n, twins[n].processor)) for n, m in attentions(reference_denoiser)
    ]
    inputs = calibration.inputs(calibration.timestep == calibration.timesteps[1])
    pipes["integer"].unet(**inputs)
    reference_denoiser(**inputs)
    assert len(compared) == len(handles)


@pytest.mark.parametrize("kind", ["uncond", "class", "text"])
def test_whole_denoisers(isa, placed, kind):
    """Codes at ties differ, and what follows multiplies the difference; it stays below the error of quantization."""
    pipes, calibration = placed(kind)
    difference = error = 0.0
    for timestep in calibration.timesteps[::3]:
        rows = (calibration.timestep == timestep).nonzero().flatten()
        a, e = (pipes[k].unet(**calibration.inputs(rows)).sample for k in ("integer", "reference"))
        difference += (a - e).square().sum()
        error += (e - calibration.target[rows]).square().sum()
    assert 0 < difference < 0.5 * error


def test_samples_are_those_of_the_file_and_of_any_threads(isa, placed, uncond_model, tmp_path):
    pipes, _ = placed("uncond")
    pipe = pipes["integer"]
    model = replace(uncond_model, steps=2)
    given = dict(**arguments(pipe, model, "evaluation", [0, 1]), output_type="latent")
    first = pipe(**given).images
    torch.set_num_threads(2)
    second = pipe(**(given | arguments(pipe, model, "evaluation", [0, 1]))).images
    torch.set_num_threads(1)
    copied = copy.deepcopy(pipe.unet)
    assert torch.equal(first, second)
    assert [layer.kernel_name for _, layer in quant_layers(copied)] == ["integer"] * len(list(quant_layers(copied)))


def test_a_placed_denoiser_is_a_module_like_others(placed):
    """It takes its own state dict, its reference twin's, and another's; memory formats leave its codes."""
    pipes, calibration = placed("uncond")
    denoiser, twin = pipes["integer"].unet, pipes["reference"].unet
    inputs = calibration.inputs(torch.arange(2))
    before, e = denoiser(**inputs).sample, twin(**inputs).sample
    for own, other in ((denoiser, denoiser), (denoiser, twin), (twin, denoiser)):
        own.load_state_dict(other.state_dict())
    denoiser.to(memory_format=torch.channels_last)
    for copied in (denoiser, copy.deepcopy(denoiser)):
        assert torch.equal(copied(**inputs).sample, before)
    assert torch.equal(twin(**inputs).sample, e)
    with pytest.raises(AttributeError, match="fuse LoRA weights before quantizing"):
        denoiser.conv_in.weight.data += 0.1
    for layer in denoiser.mid_block.resnets[0].conv1, denoiser.conv_out:
        layer.thaw()
        layer.weight.data.mul_(-1)
        layer.choose_weight_range()
        layer.input_quantizer.scale.data.mul_(2)
    place(denoiser, "integer")
    other, after = copy.deepcopy(denoiser.state_dict()), denoiser(**inputs).sample
    denoiser.load_state_dict(twin.state_dict())
    assert torch.equal(denoiser(**inputs).sample, before)
    denoiser.load_state_dict(other)
    assert torch.equal(denoiser(**inputs).sample, after) and not torch.equal(before, after)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["scenes-uncond", "scenes-class", "scenes-text"])
def test_a_whole_run_of_a_shipped_model(name):
    """Latents of integer and reference differ by at most 5 % of what quantization itself changes in them."""
    model = MODELS[name]
    pipe = model.load()
    calibration = collect(pipe, model, "calibration", 8)
    quantized = quest.quantize(
        pipe, "rtn-mse", "w4a8", calibration=calibration, keep=model.keep, softmax_bits=model.softmax_bits
    )

    def latents(pipe):
        return torch.cat([latents for _, latents, _ in generate(pipe, model, "evaluation", model.batch_size)])

    exact = latents(pipe)
    found = {}
    for kernel in ("reference", "integer"):
        assert place(quantized.unet, kernel).refused == {}
        found[kernel] = latents(quantized)
    difference = (found["integer"] - found["reference"]).square().mean()
    error = (found["reference"] - exact).square().mean()
    assert 0 < difference <= 0.05 * error


def test_layers_that_are_refused_stay_on_the_reference(uncond_pipe, uncond_calibration):
    q = quest.quantize(uncond_pipe, "rtn", "w8a8", calibration=uncond_calibration, samples=8)
    q.unet.conv_in.input_quantizer.zero_point[:] = 1e6
    processor = next(attentions(q.unet))[1].processor
    processor.p.spec = QuantSpec(16)
    refused = place(q.unet, "integer").refused
    assert "exceeds 16 bits" in refused.pop("conv_in")
    assert list(refused.values()) == ["p: 16 bits, more than 8"] and processor.kernel_name == "reference"
    assert q.unet.conv_in.kernel_name == "reference" and q.unet.conv_out.kernel_name == "integer"
    inputs = uncond_calibration.inputs(torch.arange(2))
    on_integers = q.unet(**inputs).sample
    assert place(q.unet, "reference") == ("reference", {})
    assert all(layer.kernel_name == "reference" for _, layer in quant_layers(q.unet))
    e = q.unet(**inputs).sample
    assert (on_integers - e).square().mean() < 0.5 * (e - uncond_calibration.target[:2]).square().mean()


def test_dynamic_scales_of_samples(isa, text_pipe, text_calibration):
    """All layers run on integers, in fused blocks too; the products of attention do not."""
    q = quest.quantize(text_pipe, "dynamic", "w8a8", calibration=text_calibration, dynamic="tensor")
    refused = place(q.unet, "integer").refused
    assert set(refused) == {f"{n}.processor" for n, _ in attentions(q.unet)}
    assert set(refused.values()) == {"q: scales dynamic per tensor"}
    inputs = text_calibration.inputs(torch.arange(3))
    on_integers = q.unet(**inputs).sample
    place(q.unet, "reference")
    e = q.unet(**inputs).sample
    assert 0 < (on_integers - e).square().mean() < 0.5 * (e - text_calibration.target[:3]).square().mean()


def test_dynamic_scales_of_tokens(isa, text_pipe, text_calibration):
    """Everything runs on integers, in fused blocks too, which see a new clip ratio."""
    q = quest.quantize(text_pipe, "dynamic", "w8a8", calibration=text_calibration, dynamic="token")
    inputs, found = text_calibration.inputs(torch.arange(3)), []
    for kernel in ("integer", "reference"):
        assert place(q.unet, kernel).refused == {}
        for clip in (1.0, 0.8):
            for _, layer in quant_layers(q.unet):
                layer.input_quantizer.scale.data.fill_(clip)
            found.append(q.unet(**inputs).sample)
    for own, e in zip(found[:2], found[2:], strict=True):
        assert 0 < (own - e).norm() < 0.02 * e.norm() < 0.2 * (found[3] - found[2]).norm()


def test_deviation_from_the_reference(placed, monkeypatch):
    pipes, calibration = placed("uncond")
    denoiser = pipes["integer"].unet
    assert deviation(pipes["reference"].unet, calibration) == 0
    inputs = calibration.inputs(torch.arange(2))
    before, packed = denoiser(**inputs).sample, denoiser.conv_in.operand
    with on_reference(denoiser):
        assert torch.equal(denoiser(**inputs).sample, pipes["reference"].unet(**inputs).sample)
    assert 0 <= deviation(denoiser, calibration) < 1
    assert torch.equal(denoiser(**inputs).sample, before) and denoiser.conv_in.operand is packed
    assert denoiser.placement.kernel == "integer" and denoiser.conv_in.kernel_name == "integer"
    conv2d = integer.conv2d
    monkeypatch.setattr(integer, "conv2d", lambda *args, **kwargs: 100 * conv2d(*args, **kwargs))
    with pytest.raises(RuntimeError, match="the integer kernel's prediction differs by"):
        deviation(denoiser, calibration)


def test_kernels_are_chosen_by_name(uncond_pipe):
    q = swap(uncond_pipe, 8, 8)
    with pytest.raises(ValueError, match="kernel: 'cublas' is not one of auto, reference, integer, triton"):
        place(q.unet, "cublas")
    with pytest.raises(ValueError, match="integer is not available: it computes on a CPU, not on meta"):
        kernels.choose("integer", torch.device("meta"))
    assert kernels.choose("auto", torch.device("cpu")) == "integer"


def test_only_float32_denoisers_run_on_integers(uncond_pipe):
    denoiser = nn.Module.double(swap(uncond_pipe, 8, 8).unet)  # past the method that refuses it
    with pytest.raises(ValueError, match="integer is not available: it computes in float32, not in torch.float64"):
        place(denoiser, "integer")
    assert place(denoiser, "auto").kernel == "reference"


def test_without_a_compiled_core_the_reference_computes(tmp_path):
    """A copy of the package without the core imports, says why, and still answers."""
    code = """
import logging, torch
logging.basicConfig()
from quest import kernels
from quest.kernels.cpu import core as compiled
compiled.EXTENSION_SUFFIXES = []
assert kernels.choose("auto", torch.device("cpu")) == "reference"
try:
    kernels.choose("integer", torch.device("cpu"))
except ValueError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    assert "kernel: integer is not available:" in done.stdout and "no compiled core" in done.stdout
    assert "kernel integer is not available" in done.stderr
