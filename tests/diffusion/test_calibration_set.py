import threading

import pytest
import torch
from safetensors.torch import save_file

import quest
from quest.diffusion import sampling
from quest.diffusion.calibration_set import TENSORS, CalibrationSet, collect
from quest.diffusion.sampling import timesteps


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


@pytest.mark.parametrize("name", ["mask", "conditioning.", "conditioning.timestep"])
def test_an_unknown_tensor_is_refused(uncond_calibration, tmp_path, name):
    path, rows = tmp_path / "set.safetensors", len(uncond_calibration)
    tensors = {each: getattr(uncond_calibration, each).contiguous() for each in TENSORS}
    save_file(tensors | {"conditioning.mask": torch.ones(rows)}, path)
    assert CalibrationSet.load(path).conditioning.keys() == {"mask"}
    save_file(tensors | {name: torch.ones(rows)}, path)
    with pytest.raises(ValueError, match=rf"set\.safetensors is not a calibration set: its tensor {name} is unknown"):
        CalibrationSet.load(path)


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


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda kept: kept["sample"].reshape(-1)[:1].fill_(torch.nan), "sample is not finite"),
        (lambda kept: kept.update(timestep=kept["timestep"].int()), "timestep is torch.int32"),
        (lambda kept: kept.update(call=kept["call"] - 99), "call is torch.int64"),
        (lambda kept: kept.update(trajectory=kept["trajectory"][1:]), "trajectory is"),
        (lambda kept: kept.update(target=kept["target"][:, :, 1:].contiguous()), "predictions"),
    ],
)
def test_a_set_that_is_none_is_refused_whatever_its_hashes(uncond_calibration, tmp_path, change, words):
    path = tmp_path / "forged.safetensors"
    names = ("sample", "timestep", "target", "trajectory", "call")
    kept = {name: getattr(uncond_calibration, name).clone() for name in names}
    change(kept)
    CalibrationSet(**kept).save(path)
    with pytest.raises(ValueError, match=rf"forged\.safetensors: .*{words}"):
        CalibrationSet.load(path)


def test_calls_of_other_threads_are_not_recorded(uncond_pipe, uncond_model, uncond_calibration, monkeypatch):
    """While trajectories are collected, another thread draws from the same denoiser."""
    real = sampling.generate

    def disturbed(pipe, *args, **kwargs):
        for batch in real(pipe, *args, **kwargs):
            sample = torch.zeros(2, pipe.unet.config.in_channels, 8, 8)
            thread = threading.Thread(target=pipe.unet, args=(sample, 5))
            thread.start()
            thread.join()
            yield batch

    monkeypatch.setattr(sampling, "generate", disturbed)
    again = collect(uncond_pipe, uncond_model, "calibration", 4)
    assert torch.equal(again.sample, uncond_calibration.sample)
    assert torch.equal(again.target, uncond_calibration.target)
