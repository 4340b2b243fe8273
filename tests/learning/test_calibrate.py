import pytest
import torch

from quest.learning.calibrate import calibrate, calibrating
from quest.quantization.layers import input_quantizers, quant_layers
from quest.quantization.ranges import minmax
from quest.quantization.swapping import swap
from quest.quantization.timegroups import TimeGroups


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
