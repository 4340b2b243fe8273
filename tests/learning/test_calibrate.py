import pytest
import torch

from quest.learning import calibrate as calibrating_ranges
from quest.learning.calibrate import calibrate, calibrating
from quest.learning.units import Streamed
from quest.quantization.layers import input_quantizers, quant_layers
from quest.quantization.ranges import minmax, mse_zero_point
from quest.quantization.swapping import set_granularity, swap
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


class Whole(Streamed):
    """All rows at once between the layers, which still see chunks."""

    def __enter__(self):
        return self

    def __exit__(self, *_error):
        return None


@pytest.mark.parametrize(
    "how, kind", [("search", "class"), ("averages", "text"), ("averages", "uncond"), ("several scales", "uncond")]
)
def test_rows_in_chunks_set_the_ranges_of_all_rows(how, kind, request, monkeypatch):
    """Bit for bit, where layers see the same chunks: other chunks round sums differently.

    But for the gate of a feed-forward: gelu rounds the last values of a tensor, a vector's rest, in its own way.
    """
    pipe, calibration = request.getfixturevalue(f"{kind}_pipe"), request.getfixturevalue(f"{kind}_calibration")
    found = []
    for chunk, streamed in ((1000, Streamed), (3, Streamed), (3, Whole)):
        monkeypatch.setattr(calibrating_ranges, "chunk_rows", lambda *_, chunk=chunk: chunk)
        monkeypatch.setattr(calibrating_ranges, "Streamed", streamed)
        groups = TimeGroups(calibration.timesteps[::3]) if how == "search" else None
        q = swap(pipe, 8, 4, groups=groups)
        for _, layer in quant_layers(q.unet):
            layer.choose_weight_range()
        set_granularity(q.unet, "released" if how == "several scales" else "tensor", 4)
        momentum = 0.9 if how == "averages" else None
        calibrate(q.unet, calibration, mse_zero_point, samples=8, seed=0, momentum=momentum)
        assert not any("forward" in m.__dict__ for m in q.unet.modules())
        found.append({n: (x.scale, x.zero_point) for n, x in input_quantizers(q.unet).items()})
    at_once, chunks, whole = found
    assert len(chunks) > 20 and all(scale.isfinite().all() for scale, _ in chunks.values())
    differ = [n for n in whole if not all(map(torch.equal, whole[n], chunks[n]))]
    assert all(n.endswith("ff.net.2.input_quantizer") for n in differ)
    for name in differ:
        torch.testing.assert_close(whole[name], chunks[name], rtol=1e-5, atol=0)
    first = [n for n in whole if n.startswith(("conv_in.", "time_embedding.linear_1."))]  # no sum comes before them
    assert len(first) == 2 and all(all(map(torch.equal, at_once[n], chunks[n])) for n in first)
    middle = [(chunks[n][0] / at_once[n][0] - 1).abs().median().item() for n in whole]
    assert max(middle) < 0.2 and sorted(middle)[len(middle) // 2] < 0.05


def test_rows_in_chunks_pass_a_prologue_first(uncond_pipe, uncond_calibration, monkeypatch):
    found = []
    for chunk in (1000, 4):
        monkeypatch.setattr(calibrating_ranges, "chunk_rows", lambda *_, chunk=chunk: chunk)
        q = swap(uncond_pipe, 8, 8)
        q.unet.conv_in.scale_input(torch.tensor([0.5, 1.0, 2.0, 4.0]))
        for _, layer in quant_layers(q.unet):
            layer.choose_weight_range()
        calibrate(q.unet, uncond_calibration, mse_zero_point, samples=8, seed=0)
        found.append(q.unet.conv_in.input_quantizer)
    assert torch.equal(found[0].scale, found[1].scale) and torch.equal(found[0].zero_point, found[1].zero_point)
