"""Checkpoints whose bytes are damaged, and such as somebody forges who knows how the hashes are made."""

import copy
import json

import pytest
import torch
from cases import contents, damaged, forged, refusals
from safetensors.torch import save

import quest
from quest.diffusion import samplers
from quest.learning.calibrate import calibrating
from quest.quantization import audit, checkpoint, ranges
from quest.quantization.header import header_hash
from quest.quantization.layers import quant_layers
from quest.quantization.splitting import concatenation_splits
from quest.quantization.swapping import swap
from quest.quantization.timegroups import TimeGroups, grouped
from quest.runtime.hashing import tensor_hash

pytestmark = pytest.mark.fuzz
FIELDS = ("format", "weights", "denoiser", "splits", "layers", "shapes", "attentions", "time_groups", "method", "bits")
FIELDS += ("recipe", "timesteps", "cost")


def everything(pipe, calibration, w, a):
    """All that a checkpoint can hold: time groups, splits, codes of 4, 5 and 8 bits, corrections of a sampler."""
    splits = concatenation_splits(pipe.unet, calibration.inputs(torch.arange(2)))
    groups = TimeGroups(grouped(calibration.timesteps, 3))
    keep = {"conv_in": 5, "conv_out": 8, "time_embedding.linear_1": 32}
    new = swap(pipe, w, a, keep=keep, groups=groups, splits=splits)
    for _, layer in quant_layers(new.unet):
        layer.choose_weight_range(ranges.minmax)
    with torch.no_grad(), calibrating(new.unet, ranges.minmax):
        for rows in groups.rows(calibration.timestep):
            new.unet(**calibration.inputs(rows[:4]))
    steps = torch.tensor(sorted(set(calibration.timesteps)))
    statistics = [torch.rand(len(steps), *more) * 0.1 for more in ((), (4,), (), ())]
    new.scheduler = samplers.correct(new.scheduler, samplers.Correction(steps, *statistics))
    return new


@pytest.fixture(scope="module")
def saved(class_pipe, class_calibration, tmp_path_factory):
    """(header, tensors) of a file of codes and of a file of floats, and a denoiser to read weights into."""
    torch.manual_seed(0)
    pipe = quest.quantize(class_pipe, everything, "w4a6", calibration=class_calibration)
    folder, files = tmp_path_factory.mktemp("checkpoints"), {}
    for weights in ("codes", "float"):
        quest.save(pipe, folder / "whole.safetensors", floats=weights == "float")
        files[weights] = contents(folder / "whole.safetensors")
    return files, swap(class_pipe, 4, 6).unet


@pytest.mark.fuzz(share=0.25)
@pytest.mark.parametrize("weights", ["codes", "float"])
@pytest.mark.parametrize("by", ["damage", "forgery"])
def test_checkpoints(by, weights, draw, saved, class_pipe, class_calibration, tmp_path):
    """Refused, or read as what it says: saved again it is the same, and its denoiser computes."""
    path, again = tmp_path / "model.safetensors", tmp_path / "again.safetensors"
    header, tensors = copy.deepcopy(saved[0][weights])
    if by == "damage":
        path.write_bytes(damaged(draw, save(tensors, {"quest": json.dumps(header)})))
    else:
        header, tensors = forged(draw, {k: v for k, v in header.items() if k != "hash"} | {"hashes": {}}, tensors)
        if isinstance(header.get("hashes"), dict):
            header["hashes"] |= {name: tensor_hash(value) for name, value in tensors.items()}
        path.write_bytes(save(tensors, {"quest": json.dumps(header | {"hash": header_hash(header)})}))
    with refusals(path):
        checkpoint.load_weights(copy.deepcopy(saved[1]), path)
    with refusals(path):
        pipe = quest.load(class_pipe, path, kernel=draw.choice(("reference", "auto")))
        header, _ = contents(path)
        assert path.name in audit.report(path)
        assert by == "forgery" or header == saved[0][weights][0]
        quest.save(pipe, again, floats=header["weights"] == "float")
        found, _ = contents(again)
        assert {k: header.get(k) for k in FIELDS} == {k: found.get(k) for k in FIELDS}
        assert header["hashes"] == found["hashes"], "a tensor was read as something else"
        try:
            with torch.no_grad():
                pipe.unet(**class_calibration.inputs(torch.arange(2)))
        except ValueError as error:  # the integer kernel: values that are valid, but far from any model's
            assert "holds NaN" in str(error), error
