"""Branches: parts of a weight that a layer multiplies in float beside its codes."""

import copy
import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import quest
from quest.affine import FLOAT, QuantSpec
from quest.kernels.cpu import core
from quest.learning.calibrate import calibrate
from quest.learning.lowrank import factored, kept_channels
from quest.quantization import audit, branch, cost, header, placement, ranges
from quest.quantization.branch import Branch
from quest.quantization.checkpoint import load_weights
from quest.quantization.layers import quant_layers, quantized
from quest.quantization.overhead import overhead
from quest.quantization.splitting import split
from quest.quantization.swapping import swap

LAYERS = [
    (nn.Conv2d(12, 5, 3, padding=1), (2, 12, 7, 7)),
    (nn.Conv2d(12, 5, (3, 2), stride=2, padding=1, dilation=(1, 2), bias=False), (2, 12, 7, 7)),
    (nn.Conv2d(12, 5, 1), (2, 12, 4, 4)),
    (nn.Linear(12, 5), (2, 9, 12)),
]


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def made(layer, bits=FLOAT):
    new = quantized(copy.deepcopy(layer).requires_grad_(False), QuantSpec(bits, axis=0), QuantSpec(bits), None)
    return new


@pytest.mark.parametrize("layer, shape", LAYERS, ids=lambda v: str(v)[:60])
def test_a_branch_is_the_layer_of_its_part_of_the_weight(layer, shape):
    x, q = random(*shape), made(layer)
    part = factored(layer.weight, 3)
    q.add_branch(part)
    torch.testing.assert_close(q(x), layer(x), rtol=1e-5, atol=1e-5)  # in float nothing changes
    own = copy.deepcopy(layer).requires_grad_(False)
    own.weight.copy_(part.product(layer.weight))
    assert torch.linalg.matrix_rank(own.weight.flatten(1)) == 3
    conv = {} if layer.weight.ndim == 2 else {n: getattr(layer, n) for n in ("stride", "padding", "dilation")}
    expected = own(x) if own.bias is None else own(x) - own.bias.view(-1, *[1] * (2 if conv else 0))
    torch.testing.assert_close(part(x, **conv), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="frozen or has one"):
        q.add_branch(part)


@pytest.mark.parametrize("layer, shape", LAYERS, ids=lambda v: str(v)[:60])
def test_channels_that_are_kept_whole(layer, shape):
    q, x = made(layer, 4), random(*shape)
    largest = torch.ones(12)
    largest[[2, 7]] = 100
    part = kept_channels(layer.weight, largest, 1)
    assert len(part.channels) >= 2 and {2, 7} <= set(part.channels.tolist())
    q.add_branch(part)
    kept = q.weight[:, part.channels]
    assert kept.abs().max() < 1e-3 * layer.weight.abs().max()  # float16 leaves something
    q.choose_weight_range()
    q.input_quantizer.spec = QuantSpec(FLOAT)
    only = torch.zeros_like(x)
    index = (slice(None), part.channels) if x.ndim == 4 else (..., part.channels)
    only[index] = x[index]
    torch.testing.assert_close(q(only), layer(only), rtol=1e-2, atol=1e-2)
    assert (q(x) - layer(x)).abs().max() > 0.02


def test_the_bias_comes_last_and_the_branch_sees_what_the_prologue_leaves():
    q, x = made(LAYERS[0][0], 4), random(*LAYERS[0][1])
    q.scale_input(random(12).abs() + 0.5)
    q.add_branch(factored(q.weight, 2))
    q.choose_weight_range(ranges.mse)
    q.input_quantizer.calibrate(q.prepared(x)[0], ranges.minmax)
    prepared, qparams = q.prepared(x)[0], q.input_quantizer.qparams
    codes = ((prepared / qparams.scale).round() + qparams.zero_point).clamp(0, 15)
    product = F.conv2d((codes - qparams.zero_point) * qparams.scale, q.qweight.dequantize(), padding=1)
    expected = product + q.branch(prepared, padding=1) + q.bias[:, None, None]
    torch.testing.assert_close(q(x), expected, rtol=1e-6, atol=1e-6)
    q.freeze()
    torch.testing.assert_close(q(x), expected, rtol=1e-6, atol=1e-6)


def test_what_is_not_possible_is_refused():
    q = made(nn.Conv2d(4, 4, 3, groups=2))
    with pytest.raises(RuntimeError, match="grouped convolution"):
        q.add_branch(Branch(torch.ones(1, 2, 3, 3), torch.ones(4, 1)))
    q = made(nn.Conv2d(4, 4, 3))
    q.add_branch(factored(q.weight, 1))
    for change in (lambda: q.rotate_input(4), lambda: q.scale_input(torch.full((4,), 2.0))):
        with pytest.raises(RuntimeError, match="has a branch"):  # its factors are of the input as it was
            change()
    with pytest.raises(NotImplementedError, match="before it gets a prologue or a branch"):
        split(q, 2)


@pytest.fixture(scope="module")
def student(class_pipe, class_calibration):
    """Every second layer has a branch, some of them of whole channels."""
    new = swap(class_pipe, 4, 8)
    for number, (_, layer) in enumerate(quant_layers(new.unet)):
        if number % 2:
            layer.scale_input(random(layer.weight_shape[1], seed=number).abs() + 0.5)
            whole = kept_channels(layer.weight, torch.ones(layer.weight_shape[1]), 1)
            layer.add_branch(whole if number % 4 == 1 else factored(layer.weight, 2))
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
    found = audit.account(path)
    assert found["parameters"] == sum(p.numel() for p in class_pipe.unet.parameters())
    branches = [layer.branch for _, layer in quant_layers(student.unet) if layer.branch is not None]
    size = sum(b.numel() * b.element_size() for own in branches for b in own.buffers())
    assert sum(found["bytes"]["branches"].values()) == size > 0
    assert "low-rank branches, float16" in audit.report(path)
    footprint = {"bytes": 1, "macs": 2, "bops": 3, "branch_bops": 5e12}
    quest.save(student, path, floats=floats, cost={"footprint": footprint})
    assert "of branches beside 5e12 more" in audit.report(path)
    with pytest.raises(ValueError, match="header field cost"):
        quest.save(student, tmp_path / "wrong", cost={"footprint": footprint | {"branch_bops": "5"}})
        header.read(tmp_path / "wrong")
    work = cost.macs(student.unet, class_calibration.inputs(torch.tensor([0])))
    if not floats:
        assert cost.footprint(student.unet, work)["bytes"] == sum(sum(v.values()) for v in found["bytes"].values())
        assert cost.parameters(student.unet) == found["parameters"]
    other = swap(class_pipe, 4, 8)
    if floats:
        load_weights(other.unet, path)
        for name, layer in quant_layers(other.unet):
            own = student.unet.get_submodule(name)
            assert torch.equal(layer.weight, own.float_weight)
            assert (layer.branch is None) == (own.branch is None)
            assert own.branch is None or torch.equal(
                layer.branch.product(layer.weight), own.branch.product(layer.weight)
            )


@pytest.mark.skipif(not core.available(), reason="no compiled core: installed without a C++ compiler")
def test_codes_beside_a_branch_are_multiplied_on_integers(student, class_pipe, class_calibration, tmp_path):
    quest.save(student, tmp_path / "m")
    loaded = quest.load(class_pipe, tmp_path / "m", kernel="integer")
    assert not loaded.unet.placement.refused
    seen = set()
    for name, layer in quant_layers(loaded.unet):
        own, size = student.unet.get_submodule(name), layer.weight_shape[1]
        x = random(2, 8, size) if len(layer.weight_shape) == 2 else random(2, size, 8, 8)
        torch.testing.assert_close(layer(x), own(x), rtol=1e-5, atol=2e-5 * own(x).abs().max().item())
        if layer.branch is not None:
            layer.branch.register_forward_hook(lambda *_, name=name: seen.add(name))
    predicted(loaded, class_calibration)  # no block of layers in one call of the core leaves a branch out
    assert seen == {name for name, layer in quant_layers(loaded.unet) if layer.branch is not None}
    assert all(placement.refusal(layer, "integer") is None for _, layer in quant_layers(loaded.unet))
    inputs = class_calibration.inputs(torch.tensor([0]))
    work, beside = cost.macs(class_pipe.unet, inputs), overhead(student.unet, inputs)["branch_macs"]
    total = sum(work.values())
    assert placement.realizable(loaded.unet, work) == total / (total + beside) < 1  # branches are in float


def test_what_branches_cost(class_pipe, class_calibration):
    new, inputs = swap(class_pipe, 4, 8), class_calibration.inputs(torch.tensor([0]))
    conv = new.unet.down_blocks[0].resnets[0].conv1  # 32 channels to 32, 8 x 8 pixels
    for _, layer in quant_layers(new.unet):
        layer.choose_weight_range()
    calibrate(new.unet, class_calibration, ranges.minmax, samples=4, seed=0)
    before, work = overhead(new.unet, inputs), cost.macs(new.unet, inputs)
    conv.add_branch(factored(conv.weight, 4))
    after = overhead(new.unet, inputs)
    macs = 64 * 4 * (32 * 9 + 32)
    assert before | {"branch_macs": macs, "branch_bops": 256 * macs} == after and before["branch_macs"] == 0
    assert cost.macs(new.unet, inputs) == work  # those of the layers stay what they were
    conv.branch = None
    conv.add_branch(Branch(torch.ones(32, 2, 3, 3), None, torch.tensor([1, 2])))
    assert overhead(new.unet, inputs)["branch_macs"] == 64 * 32 * 2 * 9


def test_damaged_branches_are_refused(student, class_pipe, tmp_path):
    path = tmp_path / "m"
    quest.save(student, path)
    found = header.read(path)
    name = next(n for n, b in found["branches"].items() if not b["channels"])
    for change in ({"rank": 0}, {"rank": "2"}, {"channels": None}, {"more": 1}):
        wrong = json.loads(json.dumps(found))
        wrong["branches"][name] |= change
        with pytest.raises(ValueError, match="branches"):
            header.check(wrong, path)
    with pytest.raises(ValueError, match="branches.nowhere"):
        header.check(found | {"branches": {"nowhere": found["branches"][name]}}, path)
    layer = student.unet.get_submodule(name)
    own = {f"{name}.branch.{part}": getattr(layer.branch, part) for part in ("down", "up")}
    for change, tensors in (
        ({"rank": 1}, own),
        ({"channels": True}, own),
        ({}, own | {f"{name}.branch.up": own[f"{name}.branch.up"].float()}),
        ({}, own | {f"{name}.branch.channels": torch.tensor([0])}),
        ({}, {}),
    ):
        wrong = {"branches": {name: found["branches"][name] | change}}
        with pytest.raises(ValueError, match=f"the branch of {name} does not fit its weight"):
            branch.restore({name: layer}, wrong, tensors, path)
