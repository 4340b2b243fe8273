import copy
import json
import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import quest
from quest.quantization import checkpoint, packing
from quest.quantization import header as headers
from quest.quantization.header import effort
from quest.quantization.header import read as read_header
from quest.quantization.layers import quant_layers
from quest.quantization.swapping import swap


@pytest.fixture(scope="module")
def quantized(uncond_pipe, uncond_calibration, tmp_path_factory):
    q = quest.quantize(uncond_pipe, "rtn", "w4a8", calibration=uncond_calibration)
    path = tmp_path_factory.mktemp("checkpoint") / "model.safetensors"
    quest.save(q, path, commit="abc")
    return q, path


@pytest.fixture(scope="module")
def timed(uncond_pipe, uncond_calibration, tmp_path_factory):
    q = quest.quantize(
        uncond_pipe,
        "quest-suite",
        "w4a4",
        calibration=uncond_calibration,
        tla_iterations=1,
        cma_iterations=1,
        time_groups=3,
    )
    path = tmp_path_factory.mktemp("checkpoint") / "timed.safetensors"
    quest.save(q, path)
    return q, path


def test_the_file_describes_itself(timed):
    with safe_open(timed[1], "pt") as f:
        header = json.loads(f.metadata()["quest"])
    assert header["method"] == "quest-suite" and header["bits"] == "w4a4" and header["recipe"]["time_groups"] == 3
    assert len(header["time_groups"]) == 3 and len(header["timesteps"]) == 6
    assert header["layers"]["conv_in"][0]["bits"] == 8 and header["attentions"]


def test_round_trip_with_time_groups(uncond_pipe, uncond_model, timed):
    from quest.diffusion.sampling import arguments

    q, path = timed
    loaded = quest.load(uncond_pipe, path, kernel="reference")
    a, b = (p(**arguments(p, uncond_model, "evaluation", [0, 1]), output_type="latent").images for p in (q, loaded))
    assert torch.equal(a, b)
    for name, layer in quant_layers(loaded.unet):
        other = q.unet.get_submodule(name)
        assert torch.equal(layer.operand, other.operand) and layer.weight.equal(other.weight)
        assert layer.operand.stride() == other.operand.stride()
    own, theirs = loaded.unet.state_dict(), q.unet.state_dict()
    assert own.keys() == theirs.keys() and all(torch.equal(own[k], v) for k, v in theirs.items())


def test_codes_are_saved_and_saved_again_they_are_the_same(uncond_pipe, timed, tmp_path):
    q, path = timed
    header, tensors = checkpoint.read(path)
    assert header["weights"] == "codes"
    for name, layer in quant_layers(q.unet):
        bits, codes = layer.weight_quantizer.spec.bits, tensors[f"{name}.codes"]
        assert f"{name}.weight" not in tensors and codes.dtype == torch.uint8
        assert codes.numel() == layer.weight.numel() * bits // 8  # every row of these layers is even
    assert path.stat().st_size < 0.45 * sum(4 * p.numel() for p in uncond_pipe.unet.parameters())
    quest.save(quest.load(uncond_pipe, path), tmp_path / "again.safetensors")
    again, same = checkpoint.read(tmp_path / "again.safetensors")
    assert again["hashes"] == header["hashes"] and tensors.keys() == same.keys()


@pytest.mark.parametrize("kernel", ["reference", "auto"])
def test_codes_reach_their_kernel_as_they_are(uncond_pipe, timed, kernel, monkeypatch):
    """Nothing is quantized again, and the pipeline's own weights are neither copied nor changed."""
    path = timed[1]
    monkeypatch.setattr("quest.quantization.layers.quantize", None)
    before = {n: p.clone() for n, p in uncond_pipe.unet.named_parameters()}
    denoiser = quest.load(uncond_pipe, path, kernel=kernel).unet
    _, tensors = checkpoint.read(path)
    for name, layer in quant_layers(denoiser):
        codes = packing.unpack(tensors[f"{name}.codes"], layer.weight_quantizer.spec, layer.weight_shape)
        assert torch.equal(layer.weight.codes, codes) and layer.origin is None, name
    state = denoiser.state_dict()
    assert all(torch.equal(state[n], t) for n, t in tensors.items()) and state.keys() == tensors.keys()
    assert all(torch.equal(p, before[n]) for n, p in uncond_pipe.unet.named_parameters())
    assert not any(t.is_meta for t in (*denoiser.parameters(), *denoiser.buffers()))


def test_float_weights_are_kept_where_asked(uncond_pipe, quantized, tmp_path):
    q, _ = quantized
    quest.save(q, tmp_path / "start.safetensors", floats=True)
    assert read_header(tmp_path / "start.safetensors")["weights"] == "float"
    loaded = quest.load(uncond_pipe, tmp_path / "start.safetensors")
    own, theirs = loaded.unet.state_dict(), q.unet.state_dict()
    assert own.keys() == theirs.keys() and all(torch.equal(own[k], v) for k, v in theirs.items())


def test_weights_that_are_not_finite_are_not_packed(uncond_pipe, uncond_calibration, tmp_path):
    q = quest.quantize(uncond_pipe, "rtn", "w4a8", calibration=uncond_calibration)
    q.unet.conv_in.thaw()
    q.unet.conv_in.weight.data[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="layer conv_in: its weight is not finite"):
        quest.save(q, tmp_path / "m.safetensors")
    with pytest.raises(FloatingPointError, match="layer conv_in: its weight is not finite"):
        q.unet.conv_in.freeze()
    with pytest.raises(FloatingPointError, match="conv_in.weight is not finite"):
        quest.save(q, tmp_path / "m.safetensors", floats=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["conv_in.bias", "conv_in.input_quantizer.scale"])
def test_other_values_that_are_not_finite_are_not_saved(uncond_pipe, uncond_calibration, tmp_path, name):
    q = quest.quantize(uncond_pipe, "rtn", "w4a8", calibration=uncond_calibration)
    q.unet.get_parameter(name).data.reshape(-1)[0] = torch.inf
    with pytest.raises(FloatingPointError, match=f"tensor {name} is not finite"):
        quest.save(q, tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())


def test_nothing_starts_from_a_method_that_diverged(uncond_pipe, uncond_calibration, tmp_path):
    path = tmp_path / "m.safetensors"
    told = {"model": "scenes-uncond", "seconds": 3.0, "peak_memory": 200}
    checkpoint.save_diverged(
        path, "distillation, iteration 7: the loss is nan", method="efficient-dm", bits="w4a4", **told
    )
    said = "m.safetensors: efficient-dm w4a4 diverged, .*: distillation, iteration 7: the loss is nan"
    with pytest.raises(FloatingPointError, match=said):
        quest.load(uncond_pipe, path)
    for method in ("quest-suite", "qalora"):  # which read the header, and the whole file
        with pytest.raises(FloatingPointError, match=said):
            quest.quantize(uncond_pipe, method, "w4a4", calibration=uncond_calibration, init=str(path))
    with pytest.raises(FloatingPointError, match=said):
        read_header(path)
    header = read_header(path, diverged=True)
    assert header["diverged"].startswith("distillation") and header["provenance"]["versions"]
    found = effort(path)
    assert (found["seconds"], found["peak_memory"], found["seconds_before"]) == (3.0, 200, 0)
    assert math.isnan(found["iterations"])


@pytest.mark.parametrize("field, value", [("diverged", 3), ("diverged", None), ("seconds", -1), ("bits", "4")])
def test_a_header_without_a_denoiser_is_checked_too(field, value, tmp_path):
    path = tmp_path / "m.safetensors"
    checkpoint.save_diverged(path, "why", **({"bits": "w4a4"} | {field: value} if field != "diverged" else {}))
    if field == "diverged":
        header = {"format": headers.FORMATS[0], "diverged": value}
        save_file({}, path, {"quest": json.dumps(header | {"hash": headers.header_hash(header)})})
    with pytest.raises(ValueError, match=f"header field {field} is"):
        read_header(path, diverged=True)


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
    text.write_text("hello", encoding="utf-8")
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


def changed(path, target, old: bytes, new: bytes):
    """A copy of a file with the last occurrence of some bytes replaced by as many others."""
    before, found, after = path.read_bytes().rpartition(old)
    assert found and len(old) == len(new)
    target.write_bytes(before + new + after)
    return target


def test_changed_bytes_are_noticed(uncond_pipe, quantized, tmp_path):
    path = quantized[1]
    content = bytearray(path.read_bytes())
    content[-7] ^= 1
    (tmp_path / "tensor.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"tensor\.safetensors is corrupted: its tensor .* is not what was saved"):
        quest.load(uncond_pipe, tmp_path / "tensor.safetensors")
    header = changed(path, tmp_path / "header.safetensors", rb"\"time_groups\": null", rb"\"time_groups\": [99]")
    with pytest.raises(ValueError, match=r"header\.safetensors is corrupted: its header is not what was saved"):
        quest.load(uncond_pipe, header)


def test_a_file_of_an_older_version(uncond_pipe, quantized, tmp_path):
    older = changed(quantized[1], tmp_path / "m.safetensors", rb"\"format\": 2", rb"\"format\": 1")
    with pytest.raises(ValueError, match="checkpoint format 1, this version reads 2 and 3: quantize again"):
        quest.load(uncond_pipe, older)


def test_starting_from_another_method_s_weights(uncond_pipe, quantized, tmp_path):
    q, packed = quantized
    with pytest.raises(ValueError, match=r"model\.safetensors holds codes.*floats=True"):
        checkpoint.load_weights(swap(uncond_pipe, 4, 4).unet, packed)
    path = tmp_path / "start.safetensors"
    quest.save(q, path, floats=True)
    start = swap(uncond_pipe, 4, 4)
    checkpoint.load_weights(start.unet, path)
    other = dict(quant_layers(q.unet))
    for name, layer in quant_layers(start.unet):
        assert torch.equal(layer.weight, other[name].float_weight)
        assert torch.equal(layer.weight_quantizer.scale, other[name].weight_quantizer.scale)
    with pytest.raises(ValueError, match="4-bit weights, not 8"):
        checkpoint.load_weights(swap(uncond_pipe, 8, 8).unet, path)
