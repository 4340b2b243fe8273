"""Full finetuning and QALoRA: QuEST's stages, other parameters."""

import pytest
import torch

import quest
from baselines.selection import SELECTIONS, TEMPORAL, matches
from quest.affine import quantize
from quest.quantization import checkpoint
from quest.quantization.layers import QuantLinear, quant_layers

FAST = dict(time_groups=3, batch=4, samples=8)


def run(method, pipe, calibration, iterations):
    recipe = dict(tla_iterations=iterations, cma_iterations=iterations, **FAST)
    return quest.quantize(pipe, method, "w4a4", calibration=calibration, **recipe)


@pytest.fixture(scope="module")
def start(uncond_pipe, uncond_calibration):
    return run("quest-suite", uncond_pipe, uncond_calibration, 0)


def moved(a, b):
    b = checkpoint.state(b.unet, floats=True)
    return {k for k, v in checkpoint.state(a.unet, floats=True).items() if not torch.equal(v, b[k])}


def selected(pipe):
    return {n for n, _ in quant_layers(pipe.unet) if matches(n, TEMPORAL) or matches(n, SELECTIONS["lsun"])}


def test_full_finetuning_moves_every_weight_and_scale(start, uncond_pipe, uncond_calibration):
    end = run("full-finetune", uncond_pipe, uncond_calibration, 3)
    layers = dict(quant_layers(start.unet))
    weights = {f"{n}.{p}" for n, layer in layers.items() for p in ("weight", "bias") if getattr(layer, p) is not None}
    scales = {k for k in start.unet.state_dict() if k.endswith("scale") and "weight_quantizer" not in k}
    changed = moved(start, end)
    assert changed == weights | scales
    assert [s["stage"] for s in end.unet.stages] == ["temporal layer alignment", "critical module alignment"]
    learned = sum(layer.weight.numel() + (0 if layer.bias is None else len(layer.bias)) for layer in layers.values())
    assert end.unet.stages[0]["parameters"] > learned


def test_qalora_moves_the_layers_of_quest_by_a_low_rank(start, uncond_pipe, uncond_calibration):
    end = run("qalora", uncond_pipe, uncond_calibration, 3)
    changed = moved(start, end)
    names = selected(start)
    assert {f"{n}.weight" for n in names} <= changed
    scales = {k for k in start.unet.state_dict() if k.endswith("scale") and "weight_quantizer" not in k}
    assert changed <= {f"{n}.{p}" for n in names for p in ("weight", "bias")} | scales
    before, after = dict(quant_layers(start.unet)), dict(quant_layers(end.unet))
    for name in names:
        assert type(after[name]) is QuantLinear
        nearest = quantize(after[name].float_weight, after[name].weight_quantizer.qparams)
        assert torch.equal(after[name].weight.codes, nearest.codes)
        difference = after[name].float_weight - before[name].float_weight
        if min(difference.shape) > 32:
            assert torch.linalg.matrix_rank(difference, rtol=1e-3) <= 32, name
    assert set(start.unet.state_dict()) == set(end.unet.state_dict())
