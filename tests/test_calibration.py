import pytest
import torch

import quest
from quest.calibration import CalibrationSet, activation_ranges, calibrate, calibrating, collect, eps_error
from quest.layers import input_quantizers, quant_layers, swap
from quest.ranges import minmax
from quest.sampling import timesteps
from quest.timegroups import TimeGroups


@pytest.mark.parametrize("kind, halves", [("uncond", 1), ("class", 2), ("text", 2)])
def test_trajectories_are_the_samplers_own(kind, halves, request, tmp_path):
    pipe, model = request.getfixturevalue(f"{kind}_pipe"), request.getfixturevalue(f"{kind}_model")
    found = collect(pipe, model, "calibration", 3)
    schedule = timesteps(model, pipe)
    assert len(found) == 3 * halves * len(schedule)
    assert found.trajectory.unique().tolist() == [0, 1, 2]
    for call, t in enumerate(schedule):
        assert (found.timestep[found.call == call] == t).all()
    # Every row pairs input, condition and the full-precision answer.
    rows = torch.randperm(len(found), generator=torch.Generator().manual_seed(0))[:5]
    torch.testing.assert_close(pipe.unet(**found.inputs(rows)).sample, found.target[rows], rtol=1e-4, atol=1e-5)
    # Guidance: every latent twice, once with its condition and once without.
    if halves == 2:
        first = found.call == 0
        a, b = found.sample[first].chunk(2)
        assert torch.equal(a, b)
        c = found.conditioning["encoder_hidden_states"][first]
        assert torch.equal(c[0], c[1]) and not torch.equal(c[0], c[3])
    found.save(tmp_path / "c.safetensors")
    again = CalibrationSet.load(tmp_path / "c.safetensors")
    assert torch.equal(again.sample, found.sample) and again.conditioning.keys() == found.conditioning.keys()
    assert again.timesteps == found.timesteps == sorted(set(schedule), reverse=True)
    # A padded batch leaves no trace.
    more = collect(pipe, model, "calibration", 4)
    assert torch.equal(more.sample[more.trajectory < 3], found.sample)


def test_splits_do_not_share_trajectories(uncond_pipe, uncond_model):
    a, b = (collect(uncond_pipe, uncond_model, split, 1) for split in ("calibration", "evaluation"))
    assert not torch.equal(a.sample[0], b.sample[0])


def test_draws_do_not_share_trajectories(uncond_pipe, uncond_model):
    size = uncond_model.batch_size
    drawn = [collect(uncond_pipe, uncond_model, "calibration", 2, draw) for draw in (0, 1, 2)]
    assert [set(found.trajectory.tolist()) for found in drawn] == [{first, first + 1} for first in (0, size, 2 * size)]
    assert len({found.sample[0].numpy().tobytes() for found in drawn}) == 3


def test_not_a_calibration_set(uncond_pipe, uncond_calibration, tmp_path):
    q = quest.quantize(uncond_pipe, "rtn", "w8a8", calibration=uncond_calibration)
    quest.save(q, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="not a calibration set: it lacks call, sample"):
        CalibrationSet.load(tmp_path / "m.safetensors")


def test_a_calibration_set_that_changed_is_refused(uncond_calibration, tmp_path):
    path = tmp_path / "calibration.safetensors"
    uncond_calibration.save(path, {"model": "tiny-uncond"})
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"calibration\.safetensors is corrupted: its tensor .* is not what was saved"):
        CalibrationSet.load(path)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"calibration\.safetensors is corrupted, or no safetensors file"):
        CalibrationSet.load(path)


def test_ranges_come_from_the_group_s_own_rows(uncond_pipe, uncond_calibration):
    groups = TimeGroups(uncond_calibration.timesteps)
    q = swap(uncond_pipe, 8, 8, groups=groups)
    for _, layer in quant_layers(q.unet):
        layer.choose_weight_range()
    calibrate(q.unet, uncond_calibration, minmax, samples=100, seed=0)
    quantizer = q.unet.conv_in.input_quantizer
    for g, t in enumerate(uncond_calibration.timesteps):
        x = uncond_calibration.sample[uncond_calibration.timestep == t]
        scale, zero_point = minmax(x, quantizer.spec)
        assert torch.equal(quantizer.scale[g], scale) and torch.equal(quantizer.zero_point[g], zero_point)
    assert all(q.choose is None for q in input_quantizers(q.unet).values())


def test_running_ranges_are_averages_over_the_group_s_batches(uncond_pipe, uncond_calibration):
    groups = TimeGroups(uncond_calibration.timesteps[::3])
    q = swap(uncond_pipe, 8, 8, groups=groups)
    for _, layer in quant_layers(q.unet):
        layer.choose_weight_range()
    calibrate(q.unet, uncond_calibration, minmax, samples=5, seed=3, momentum=0.95)
    generator = torch.Generator().manual_seed(3)
    for g in range(len(groups)):
        rows = (groups.index(uncond_calibration.timestep) == g).nonzero().flatten()
        rows = rows[torch.randperm(len(rows), generator=generator)]
        first = uncond_calibration.sample[rows[:5]]
        low, high = first.min(), first.max()
        for batch in rows.split(5):
            x = uncond_calibration.sample[batch]
            low, high = 0.95 * low + 0.05 * x.min(), 0.95 * high + 0.05 * x.max()
        scale = q.unet.conv_in.input_quantizer.scale[g]
        torch.testing.assert_close(scale, (high - low) / 255)
    assert all(q.choose is None for q in input_quantizers(q.unet).values())


def test_calibrating_ends_with_an_error_too(uncond_pipe):
    q = swap(uncond_pipe, 8, 8)
    with pytest.raises(RuntimeError), calibrating(q.unet, minmax):
        raise RuntimeError
    assert all(q.choose is None for q in input_quantizers(q.unet).values())


def test_missing_and_uncovered_timesteps(uncond_pipe, uncond_calibration):
    for starts, said in (
        ([9999, *uncond_calibration.timesteps], "no calibration row of time group 0"),
        ([10], "above the first"),
    ):
        q = swap(uncond_pipe, 8, 8, groups=TimeGroups(starts))
        with pytest.raises(ValueError, match=said):
            calibrate(q.unet, uncond_calibration, minmax, samples=4, seed=0)


@pytest.mark.parametrize("kind", ["uncond", "text"])
def test_eps_error(kind, request):
    pipe, model = request.getfixturevalue(f"{kind}_pipe"), request.getfixturevalue(f"{kind}_model")
    calibration = request.getfixturevalue(f"{kind}_calibration")
    errors, steps = eps_error(pipe, calibration)
    assert steps == timesteps(model, pipe) and errors.shape == (4, len(steps))
    assert errors.max() < 1e-6  # of itself

    class Half(torch.nn.Module):
        """Answers half of the full-precision prediction: a relative squared error of a quarter."""

        def forward(self, **inputs):
            out = pipe.unet(**inputs)
            out.sample = out.sample / 2
            return out

    import copy

    wrong = copy.copy(pipe)
    wrong.__dict__["unet"] = Half()
    errors, _ = eps_error(wrong, calibration)
    torch.testing.assert_close(errors, torch.full_like(errors, 0.25), rtol=1e-4, atol=1e-5)


def test_activation_ranges(uncond_pipe, uncond_calibration):
    rows = activation_ranges(uncond_pipe, uncond_calibration)
    by_class = {r["layer_class"]: r for r in rows}
    assert {"time embedding", "boundary", "attention q, k, v"} <= by_class.keys()
    assert len(rows) == len(by_class) * len(uncond_calibration.timesteps)
    assert all(r["low"] < r["high"] and r["layers"] > 0 for r in rows)
