import copy
import json

import pytest
import torch
from safetensors import safe_open

import quest
from quest import checkpoint
from quest.layers import quant_layers, swap


@pytest.fixture(scope="module")
def quantized(uncond_pipe, uncond_calibration, tmp_path_factory):
    q = quest.quantize(uncond_pipe, "rtn", "w4a8", calibration=uncond_calibration)
    path = tmp_path_factory.mktemp("checkpoint") / "model.safetensors"
    quest.save(q, path, commit="abc")
    return q, path


@pytest.fixture(scope="module")
def timed(uncond_pipe, uncond_calibration, tmp_path_factory):
    q = quest.quantize(
        uncond_pipe, "quest", "w4a4", calibration=uncond_calibration, tla_iterations=1, cma_iterations=1, time_groups=3
    )
    path = tmp_path_factory.mktemp("checkpoint") / "timed.safetensors"
    quest.save(q, path)
    return q, path


def test_the_file_describes_itself(timed):
    with safe_open(timed[1], "pt") as f:
        header = json.loads(f.metadata()["quest"])
    assert header["method"] == "quest" and header["bits"] == "w4a4" and header["recipe"]["time_groups"] == 3
    assert len(header["time_groups"]) == 3 and len(header["timesteps"]) == 6
    assert header["layers"]["conv_in"][0]["bits"] == 8 and header["attentions"]


def test_round_trip_with_time_groups(uncond_pipe, uncond_model, timed):
    from quest.sampling import arguments

    q, path = timed
    loaded = quest.load(uncond_pipe, path, kernel="reference")
    a, b = (p(**arguments(uncond_model, "evaluation", [0, 1]), output_type="latent").images for p in (q, loaded))
    assert torch.equal(a, b)
    assert all(torch.equal(v, loaded.unet.state_dict()[k]) for k, v in q.unet.state_dict().items())


def test_unquantized_pipelines_cannot_be_saved(uncond_pipe, tmp_path):
    with pytest.raises(ValueError, match="not quantized"):
        quest.save(uncond_pipe, tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_of_another_model_lists_the_shapes(class_pipe, quantized):
    with pytest.raises(ValueError, match=r"another model: .*\(.*\) in the file, .*in the model"):
        quest.load(class_pipe, quantized[1])


def test_loading_twice(quantized):
    with pytest.raises(ValueError, match="already quantized"):
        quest.load(*quantized)


def test_a_scheduler_that_leaves_the_calibrated_steps(uncond_pipe, timed):
    other = copy.copy(uncond_pipe)
    other.scheduler = type(uncond_pipe.scheduler).from_config(uncond_pipe.scheduler.config, timestep_spacing="trailing")
    with pytest.raises(ValueError, match="time groups were calibrated for"):
        quest.load(other, timed[1])


def test_files_that_are_no_checkpoint(uncond_pipe, uncond_calibration, quantized, tmp_path):
    text = tmp_path / "text.safetensors"
    text.write_text("hello")
    with pytest.raises(ValueError, match=r"text\.safetensors"):
        quest.load(uncond_pipe, text)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(quantized[1].read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"cut\.safetensors"):
        quest.load(uncond_pipe, cut)
    uncond_calibration.save(tmp_path / "calibration.safetensors")
    with pytest.raises(ValueError, match="not a quantized checkpoint"):
        quest.load(uncond_pipe, tmp_path / "calibration.safetensors")
    with pytest.raises(FileNotFoundError):
        quest.load(uncond_pipe, tmp_path / "nothing.safetensors")


def test_starting_from_another_method_s_weights(uncond_pipe, quantized):
    q, path = quantized
    start = swap(uncond_pipe, 4, 4)
    checkpoint.load_weights(start.unet, path)
    other = dict(quant_layers(q.unet))
    for name, layer in quant_layers(start.unet):
        assert torch.equal(layer.weight, other[name].weight)
        assert torch.equal(layer.weight_quantizer.scale, other[name].weight_quantizer.scale)
    with pytest.raises(ValueError, match="4-bit weights, not 8"):
        checkpoint.load_weights(swap(uncond_pipe, 8, 8).unet, path)
