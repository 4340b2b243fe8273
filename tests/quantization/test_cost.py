"""The account of a quantized denoiser: counted against arithmetic done here."""

import json

import pytest
import torch
from torch import nn

import quest
from quest.learning.calibrate import calibrate
from quest.quantization import cost, ranges
from quest.quantization.layers import quant_layers
from quest.quantization.swapping import swap


@pytest.fixture(scope="module")
def kept(class_pipe, class_calibration):
    keep = {"conv_in": 8, "*.conv_shortcut": 32, "*.processor": [8, 32]}
    pipe = swap(class_pipe, 4, 4, keep=keep)
    for _, layer in quant_layers(pipe.unet):
        layer.choose_weight_range()
    calibrate(pipe.unet, class_calibration, ranges.minmax, samples=8, seed=0)
    return pipe.unet, keep


def test_macs(class_pipe, class_calibration):
    counted = cost.macs(class_pipe.unet, class_calibration.inputs(torch.tensor([0])))
    assert counted["conv_in"] == 8 * 8 * 32 * 4 * 3 * 3
    assert counted["time_embedding.linear_1"] == 32 * 128
    layers = {n for n, m in class_pipe.unet.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    assert layers <= set(counted)
    attention = "down_blocks.0.attentions.0.transformer_blocks.0"
    assert counted[f"{attention}.attn1.processor"] == 2 * 64 * 64 * 32
    assert counted[f"{attention}.attn2.processor"] == 2 * 64 * 2 * 32  # two context tokens
    assert counted[f"{attention}.attn2.to_k"] == 2 * 32 * 32


def test_macs_of_unconditional_attention(uncond_pipe, uncond_calibration):
    counted = cost.macs(uncond_pipe.unet, uncond_calibration.inputs(torch.tensor([0])))
    assert counted["down_blocks.0.attentions.0.processor"] == 2 * 64 * 64 * 32


def test_quantizing_changes_no_count(kept, class_pipe, class_calibration):
    inputs = class_calibration.inputs(torch.tensor([0]))
    assert cost.macs(kept[0], inputs) == cost.macs(class_pipe.unet, inputs)


def test_summary(kept, class_pipe, class_calibration):
    denoiser, _ = kept
    cost.record(denoiser, "nothing", [torch.zeros(2), torch.zeros(3, 1)], iterations=7, batch=2)
    found = json.loads(json.dumps(cost.summary(denoiser, 4, 4, class_calibration)))
    assert found["weights"] == "per channel 0" and found["activations"] == "per tensor"
    shortcuts = [m for n, m in class_pipe.unet.named_modules() if n.endswith("conv_shortcut")]
    share = sum(p.numel() for m in shortcuts for p in m.parameters()) / sum(
        p.numel() for p in class_pipe.unet.parameters()
    )
    assert set(found["kept"]) == {"w8a8", "w32a32"} and found["kept"]["w8a8"]["names"] == ["conv_in"]
    assert found["kept"]["w32a32"]["layers"] == len(shortcuts)
    assert found["kept"]["w32a32"]["parameters"] == pytest.approx(share)
    counted = cost.macs(denoiser, class_calibration.inputs(torch.tensor([0])))
    assert found["kept"]["w8a8"]["macs"] == pytest.approx(counted["conv_in"] / sum(counted.values()))
    assert found["attention"]["qkv_bits"] == [8] and found["attention"]["softmax_bits"] == [32]
    # Four trajectories of six steps, both halves of every call.
    assert found["calibration"] == {"rows": 48, "trajectories": 4, "timesteps": 6, "halves": 2}
    assert found["stages"] == [{"stage": "nothing", "parameters": 5, "iterations": 7, "batch": 2}]


def test_the_share_of_a_kept_layer_counts_its_weight_also_as_codes(class_pipe, class_calibration):
    q = quest.quantize(class_pipe, "rtn", "w4a4", calibration=class_calibration, keep={"*.conv1": 8}, samples=4)
    own = {n: p for n, p in class_pipe.unet.named_parameters() if n.rpartition(".")[0].endswith(".conv1")}
    assert all(layer.is_frozen for _, layer in quant_layers(q.unet)) and any(n.endswith(".bias") for n in own)
    share = sum(p.numel() for p in own.values()) / sum(p.numel() for p in class_pipe.unet.parameters())
    assert q.unet.quantization["cost"]["kept"]["w8a8"]["parameters"] == pytest.approx(share)


def test_bit_operations_are_of_the_operands_that_are_multiplied(kept, class_pipe, class_calibration):
    denoiser, _ = kept
    work = cost.macs(denoiser, class_calibration.inputs(torch.tensor([0])))
    assert cost.bops(class_pipe.unet, work) == 1024 * sum(work.values())
    expected = 0
    for name, count in work.items():
        if name.endswith(".processor"):  # q, k and v at 8 bits, probabilities in float
            expected += count // 2 * 8 * 8 + count // 2 * 32 * 8
        else:
            bits = 8 if name == "conv_in" else 32 if name.endswith("conv_shortcut") else 4
            expected += count * bits**2
    assert cost.bops(denoiser, work) == expected
    found = cost.summary(denoiser, 4, 4, class_calibration)["footprint"]
    assert found["bops"] == expected and found["macs"] == sum(work.values())
    assert found["parameters"] == sum(p.numel() for p in class_pipe.unet.parameters())
    assert found["effective_bits"] == 8 * found["bytes"] / found["parameters"]


def test_undeclared(kept, class_pipe, undeclared):
    denoiser, keep = kept
    assert undeclared(denoiser, 4, 4, keep) == []
    said = undeclared(denoiser, 4, 4, {"conv_in": 8, "*.processor": [8, 32]})
    assert said and all("conv_shortcut: (32, 32), not (4, 4)" in line for line in said)
    assert any(".processor: (8, 32), not (4, 8)" in line for line in undeclared(denoiser, 4, 4, {"conv_in": 8}))
    # A float denoiser lacks everything, its attention products included.
    float_lines = undeclared(class_pipe.unet, 4, 4, {})
    assert any(line.startswith("conv_in") for line in float_lines)
    assert any(".processor: (32, 32), not (4, 8)" in line for line in float_lines)


def test_peak_memory_grows():
    before = cost.peak_memory()
    held = torch.ones(60_000_000)  # 240 MB, touched
    assert cost.peak_memory() >= max(before, 240) and held[0] == 1
