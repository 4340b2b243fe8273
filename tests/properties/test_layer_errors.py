"""Errors of single layers, on the inputs that they have in full precision."""

import pytest
import torch
from torch import nn

import quest
from quest.diffusion.denoisers import denoiser_of
from quest.properties.layer_errors import layer_errors


@pytest.mark.parametrize("of", ["uncond", "text"])
def test_every_layer_has_an_error_which_fewer_bits_enlarge(request, of):
    pipe, calibration = request.getfixturevalue(f"{of}_pipe"), request.getfixturevalue(f"{of}_calibration")
    errors = {}
    for bits in ("w8a8", "w4a4"):
        student = quest.quantize(pipe, method="rtn", bits=bits, calibration=calibration)
        errors[bits] = layer_errors(pipe, student, calibration)
    layers = [n for n, m in denoiser_of(pipe).named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    for found in errors.values():
        assert set(found) <= set(layers) and len(found) > 0.9 * len(layers)
    medians = {bits: torch.tensor(list(found.values())).median().item() for bits, found in errors.items()}
    assert 0 < medians["w8a8"] < 0.2 * medians["w4a4"]


def test_the_error_is_that_of_the_layer_alone_on_the_ranges_of_its_group(class_pipe, class_calibration):
    """Against one layer computed by hand, at the last call, with a range for each of three groups."""
    calibration = class_calibration
    student = quest.quantize(
        class_pipe, method="quest-suite", bits="w4a4", calibration=calibration, tla_iterations=0, cma_iterations=0,
        time_groups=3,
    )  # fmt: skip
    found = layer_errors(class_pipe, student, calibration)["conv_in"]
    exact, quantized, errors = denoiser_of(class_pipe), denoiser_of(student), []
    for call in (0, round(calibration.call.max().item() / 2), int(calibration.call.max())):
        rows = (calibration.call == call).nonzero().flatten()[:4]
        inputs = calibration.inputs(rows)
        with torch.no_grad(), quantized.time_groups.inside(inputs["timestep"]):
            right = exact.conv_in(inputs["sample"])
            errors.append(((quantized.conv_in(inputs["sample"]) - right).norm() / right.norm()).item())
    assert found == pytest.approx(sum(errors) / 3, rel=1e-4)
