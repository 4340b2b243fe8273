"""What an iteration of finetuning does to the scales of activations: of several time groups, and dynamic ones."""

import pytest
import torch

import quest
from quest.diffusion.calibration_set import collect
from quest.metrics.noise_prediction import eps_error
from quest.quantization import checkpoint
from quest.quantization.layers import input_quantizers

ROWS = dict(time_groups=3, batch=6)


@pytest.mark.parametrize("groups", [1, 3])
def test_an_iteration_moves_the_scales_of_its_groups(groups, uncond_pipe, uncond_calibration):
    recipe = ROWS | dict(samples=8, groups_per_step=groups, tla_iterations=0)
    scales = []
    for iterations in (0, 1):
        student = quest.quantize(
            uncond_pipe, "quest-suite", "w4a4", calibration=uncond_calibration, cma_iterations=iterations, **recipe
        )
        scales.append(student.unet.conv_in.input_quantizer.scale)
    assert (scales[0] != scales[1]).sum() == groups


def test_scales_of_tokens_are_finetuned_by_their_clip_ratios(class_pipe, class_model, class_calibration, tmp_path):
    held_out = collect(class_pipe, class_model, "validation", 4)
    before, after = (
        quest.quantize(
            class_pipe, "quest-suite", "w4a4", calibration=class_calibration, dynamic="token", tla_iterations=tla,
            cma_iterations=cma, **ROWS,
        )
        for tla, cma in ((0, 0), (5, 25))
    )  # fmt: skip
    assert all(q.spec.rows == "token" for q in input_quantizers(before.unet).values() if q.spec.bits < 32)
    old, new = (checkpoint.state(one.unet, floats=True) for one in (before, after))
    changed = {name for name, value in new.items() if not torch.equal(value, old[name])}
    assert any(name.endswith("input_quantizer.scale") for name in changed)
    assert any(name.endswith("weight") for name in changed)
    quest.save(after, tmp_path / "token.safetensors")
    loaded = quest.load(class_pipe, tmp_path / "token.safetensors", "reference")
    a, b, c = (eps_error(q, held_out)[0].mean() for q in (before, after, loaded))
    assert b < 0.9 * a and b == c, (a, b, c)
