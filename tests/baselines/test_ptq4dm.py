"""PTQ4DM: which calibration rows it draws, the released range search, and what the released code quantizes."""

import pytest
import torch

import quest
from baselines import ptq4dm
from quest.affine import QParams, QuantSpec, fake_quantize
from quest.diffusion.calibration_set import CalibrationSet
from quest.quantization import ranges
from quest.quantization.layers import attentions, input_quantizers, quant_layers


def trajectories(steps, images, halves=1):
    """A calibration set whose sample holds (call, trajectory, half)."""
    call, trajectory, half = torch.meshgrid(*(torch.arange(n) for n in (steps, images, halves)), indexing="ij")
    order = torch.randperm(call.numel(), generator=torch.Generator().manual_seed(0))
    order = torch.cat([order[order % halves == h].sort().values for h in range(halves)])
    call, trajectory, half = (v.flatten()[order] for v in (call, trajectory, half))
    sample = torch.stack([call, trajectory, half], 1).float()[..., None, None]
    timestep = (steps - 1 - call) * 5 + 1
    return CalibrationSet(sample, timestep, sample, trajectory, call, {"encoder_hidden_states": half.float()[:, None]})


def test_steps_are_normal_around_four_tenths_of_the_sampler():
    drawn = ptq4dm.ndtc(trajectories(200, 30), rows=4000, seed=0)
    step = 199 - drawn.call
    # The mean of N(80, 80) clamped to 0..199 is 85.1, and 15.9 % of it lie at the cleanest step.
    assert len(drawn) == 4000 and step.float().mean() == pytest.approx(85.1, abs=3)
    assert (step == 0).float().mean() == pytest.approx(0.16, abs=0.02) and step.max() == 199
    assert drawn.trajectory.bincount().max() - drawn.trajectory.bincount().min() <= 1
    one_call = drawn.trajectory[drawn.call == 120]
    assert len(one_call) > 10 and len(one_call.unique()) == len(one_call)


@pytest.mark.parametrize("halves", [1, 2])
def test_samples_and_timesteps_belong_together_but_in_the_released_code(halves):
    calibration = trajectories(100, 7, halves)
    drawn = ptq4dm.ndtc(calibration, rows=300, seed=0)
    call, trajectory, half = drawn.sample.flatten(1).T
    assert torch.equal(drawn.timestep, (99 - call.long()) * 5 + 1) and torch.equal(drawn.trajectory, trajectory.long())
    if halves == 2:
        assert half.tolist() == [0, 1] * 150 and torch.equal(call[::2], call[1::2])
    bug = ptq4dm.ndtc(calibration, rows=300, seed=0, bug=True)
    assert torch.equal(bug.timestep, drawn.timestep)
    assert torch.equal(bug.sample[:, 0].flatten(), 99 - call)  # stopped after as many steps as it should have left


def test_the_denoiser_answers_drawn_rows_as_in_its_trajectory(class_pipe, class_calibration):
    for bug in (False, True):
        drawn = ptq4dm.ndtc(class_calibration, rows=12, seed=0, bug=bug)
        prediction = class_pipe.unet(**drawn.inputs(torch.arange(len(drawn)))).sample
        assert torch.allclose(prediction, drawn.target, atol=1e-4) != bug


@pytest.mark.parametrize("axis", [None, 0])
def test_thresholds_are_the_loop_over_thresholds_and_channels(axis):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, 50, generator=g) ** 3
    x[1], x[2] = x[1].abs(), -x[2].abs()
    spec = QuantSpec(4, axis=axis)
    low, high = ptq4dm.thresholds(x, spec)
    for i, row in enumerate([x.flatten()] if axis is None else x):
        errors = []
        for step in range(1, 101):
            t = row.abs().max() * step / 100
            ends = (-t if row.min() < 0 else 0 * t, t if row.max() > 0 else 0 * t)
            scale = (ends[1] - ends[0]) / 15
            x_hat = fake_quantize(row, QParams(scale, (-ends[0] / scale).round(), QuantSpec(4)))
            errors.append(((x_hat - row).abs().pow(2.4).mean().item(), ends))
        _, (first, last) = min(errors, key=lambda e: e[0])
        torch.testing.assert_close(torch.stack([low[i], high[i]]), torch.stack([first, last]), rtol=1e-5, atol=1e-7)
    scale, zero_point = ranges.from_range(low, high, x, QuantSpec(8, axis=axis))
    assert zero_point.flatten()[0] == 128  # two-sided: half of 255, ties to even


@pytest.mark.parametrize("kind", ["uncond", "class"])
def test_as_released(kind, request):
    pipe, calibration = request.getfixturevalue(f"{kind}_pipe"), request.getfixturevalue(f"{kind}_calibration")
    q = quest.quantize(pipe, "ptq4dm-as-released", "w4a6", calibration=calibration, rows=32).unet
    outside = {n for n, _ in attentions(q) if "transformer_blocks" not in n}
    floats = {f"{n}.{part}" for n in outside for part in ("to_q", "to_k", "to_v", "to_out.0")}
    expected = dict.fromkeys((n for n, _ in quant_layers(q)), (4, 6)) | dict.fromkeys(floats, (32, None))
    expected |= {"time_embedding.linear_1": (8, 6), "conv_out": (8, None)}
    found = {
        n: (m.weight_quantizer.spec.bits, (m.output_quantizer and m.output_quantizer.spec.bits))
        for n, m in quant_layers(q)
    }
    assert found == expected
    assert all(m.input_quantizer.spec.bits == 32 for _, m in quant_layers(q))
    assert all(getattr(m.processor, n).spec.bits == 32 for _, m in attentions(q) for n in "qkvp")
    assert all(m.choose is None and m.scale.isfinite().all() for m in input_quantizers(q).values())
    # Nearest codes of the float weight; what leaves a layer has as many values as its bits allow.
    layer = q.mid_block.resnets[0].conv1
    assert torch.equal(layer.float_weight, pipe.unet.mid_block.resnets[0].conv1.weight)
    seen = []
    layer.register_forward_hook(lambda _m, args, y: seen.append((args[0], y)))
    q(**calibration.inputs(torch.arange(2)))
    assert len(seen[0][1].unique()) <= 64 < len(seen[0][0].unique())


def test_its_weights_are_rounded_on_its_own_rows(uncond_pipe, uncond_calibration, tmp_path):
    few = dict(calibration=uncond_calibration, rows=16, weight_iterations=6, batch=8)
    path = tmp_path / "model.safetensors"
    start = quest.quantize(uncond_pipe, "adaround-ndtc", "w3a32", **few)
    quest.save(start, path, floats=True)
    here, there = (
        quest.quantize(uncond_pipe, "ptq4dm", "w3a8", **few, activation_iterations=2, samples=8, init=init)
        for init in (None, str(path))
    )
    states = [q.unet.state_dict() for q in (here, there)]
    assert all(torch.equal(v, states[1][k]) for k, v in states[0].items())
    uniform = quest.quantize(uncond_pipe, "adaround", "w3a32", **few, split=False)
    assert any(not m.weight.equal(uniform.unet.get_submodule(n).weight) for n, m in quant_layers(start.unet))
