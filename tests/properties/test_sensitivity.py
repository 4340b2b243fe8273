"""One class of layers at few bits: nothing else changes."""

import pytest
import torch

from quest.affine import FLOAT
from quest.metrics.noise_prediction import eps_error
from quest.properties.sensitivity import PRODUCTS, lowered, parts, sensitivities
from quest.quantization.layers import quant_layers


def test_parts_hold_every_layer_and_attention_once(class_pipe):
    found = parts(class_pipe.unet)
    names = [name for of_class in found.values() for name in of_class]
    layers = {n for n, m in class_pipe.unet.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)}
    assert len(names) == len(set(names)) and {n for n in names if not n.endswith(".processor")} == layers
    assert "other" not in found and len(found[PRODUCTS]) == len([n for n in layers if n.endswith(".to_q")])


def test_a_part_that_is_not_lowered_costs_nothing(class_pipe, class_calibration):
    student = lowered(class_pipe, class_calibration, [], 2, 2)
    assert eps_error(student, class_calibration)[0].max() < 1e-9
    student = lowered(class_pipe, class_calibration, ["conv_in"], 2, 2)
    assert eps_error(student, class_calibration)[0].min() > 1e-4
    bits = {n: (m.weight_quantizer.spec.bits, m.input_quantizer.spec.bits) for n, m in quant_layers(student.unet)}
    assert bits.pop("conv_in") == (2, 2) and set(bits.values()) == {(FLOAT, FLOAT)}
    with pytest.raises(ValueError, match="'conv_im' is no layer"):
        lowered(class_pipe, class_calibration, ["conv_im"], 4, 4)


def test_sensitivities_share_out_the_denoiser(uncond_pipe, uncond_calibration, monkeypatch):
    found = parts(uncond_pipe.unet)
    merged = {"boundary": found.pop("boundary"), PRODUCTS: found.pop(PRODUCTS), "other": sum(found.values(), [])}
    monkeypatch.setattr("quest.properties.sensitivity.parts", lambda _denoiser: dict(merged))
    few = uncond_calibration.subset((uncond_calibration.call < 2).nonzero().flatten())
    rows = sensitivities(uncond_pipe, few, few, 4, 4)
    assert [r["layer_class"] for r in rows if r["lowered"] == "activations"] == [*merged, "all"]
    once = [r for r in rows if r["lowered"] == "activations" and r["layer_class"] != "all"]
    assert sum(r["macs"] for r in once) == pytest.approx(1)
    assert 0.9 < sum(r["parameters"] for r in once) < 1  # norms have the rest
    assert {len(r["errors"]) for r in rows} == {4}
    # Products have no weights; the first and last layer do not count among all.
    assert [r["lowered"] for r in rows if r["layer_class"] == PRODUCTS] == ["activations"]
    assert rows[-1]["layers"] == len(merged["other"]) + len(merged[PRODUCTS])
