"""Quantized denoisers in diffusers' folders: `from_pretrained` gives what `quest.load` gives."""

import copy
import importlib
import json
import shutil
import sys

import accelerate
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file

import quest
from quest.diffusion.loading import load_pipeline
from quest.diffusion.pipelines import LatentDiffusionPipeline
from quest.diffusion.samplers import Correction, correct
from quest.quantization import checkpoint, registry
from quest.quantization.layers import quant_layers
from quest.quantization.placement import place

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def saved(text_pipe, text_calibration, tmp_path_factory):
    """A quantized pipeline with time groups, its folder, and what quest.save wrote of it."""
    recipe = dict(time_groups=3, tla_iterations=0, cma_iterations=0, samples=8)
    pipe = quest.quantize(text_pipe, "quest-suite", "w4a8", calibration=text_calibration, **recipe)
    folder = tmp_path_factory.mktemp("pretrained")
    pipe.save_pretrained(folder / "pipe")
    quest.save(pipe, folder / "model.safetensors")
    return pipe, folder / "pipe", folder / "model.safetensors"


@torch.no_grad()
def test_equal_bits(saved, text_pipe, text_calibration, tmp_path):
    _, folder, file = saved
    told = json.loads((folder / "unet" / "config.json").read_text(encoding="utf-8"))
    assert told["quantization_config"] == {"quant_method": "quest-suite"}
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    alone = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    expected, inputs = quest.load(text_pipe, file).unet, text_calibration.inputs(torch.arange(2))
    for unet in (pipe.unet, alone):
        assert type(unet) is UNet2DConditionModel and unet.placement == expected.placement
        assert torch.equal(unet(**inputs).sample, expected(**inputs).sample)
    pictures = [
        p("a red circle", num_inference_steps=6, generator=torch.manual_seed(0), output_type="np").images
        for p in (pipe, quest.load(text_pipe, file))
    ]
    assert (pictures[0] == pictures[1]).all()
    judged = load_pipeline(folder)  # as `python -m quest judge` loads it
    assert torch.equal(judged.unet(**inputs).sample, expected(**inputs).sample)
    place(expected, "reference")
    place(alone, "reference")
    assert torch.equal(alone(**inputs).sample, expected(**inputs).sample)
    for name, layer in quant_layers(alone):
        assert layer.operand.stride() == expected.get_submodule(name).operand.stride()
    again = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, torch_dtype=torch.float32)
    again.save_pretrained(tmp_path / "again")
    hashes = [checkpoint.read(path)[0]["hashes"] for path in (file, tmp_path / "again" / "unet" / WEIGHTS)]
    assert hashes[0] == hashes[1]
    quest.load(text_pipe, tmp_path / "again" / "unet" / WEIGHTS)
    for change in (again.unet.half, lambda: quest.quantize(again, "rtn"), lambda: again.unet.set_attention_slice(1)):
        with pytest.raises(ValueError, match="quantized"):
            change()


def test_accelerate_does_not_take_layers_apart(saved, text_pipe, text_calibration):
    """In whichever way a pipeline came to its quantized denoiser; moving it whole is allowed."""
    quantized, folder, file = saved
    inputs = text_calibration.inputs(torch.arange(2))
    loaded = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    by_hand = copy.copy(text_pipe)
    by_hand.unet = quest.load(text_pipe, file, kernel="reference").unet
    for pipe in (loaded, by_hand):
        with torch.no_grad():
            expected = pipe.unet(**inputs).sample
            with pytest.raises(ValueError, match="accelerate cannot move .*; a quantized denoiser stays whole, on one"):
                accelerate.cpu_offload(pipe.unet, torch.device("cpu"), offload_buffers=True)
            assert torch.equal(pipe.unet(**inputs).sample, expected)
            accelerate.cpu_offload_with_hook(pipe.unet, torch.device("cpu"))
            assert torch.equal(pipe.unet(**inputs).sample, expected)
    parts = {name: part for name, part in loaded.components.items() if name != "vae"}
    again = StableDiffusionPipeline(**parts, vae=copy.deepcopy(loaded.vae), requires_safety_checker=False)
    with pytest.raises(ValueError, match="stays whole, on one device"):
        again.enable_sequential_cpu_offload(device="cpu")


def test_a_pipeline_of_our_own(uncond_pipe, uncond_calibration, tmp_path):
    quantized = quest.quantize(uncond_pipe, "rtn", "w8a8", calibration=uncond_calibration)
    quantized.save_pretrained(tmp_path)
    again, inputs = LatentDiffusionPipeline.from_pretrained(tmp_path), uncond_calibration.inputs(torch.arange(2))
    place(again.unet, "reference")
    with torch.no_grad():
        assert torch.equal(again.unet(**inputs).sample, quantized.unet(**inputs).sample)


def _corrupted(folder, pipe):
    file = folder / WEIGHTS
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)


def _without_header(folder, pipe):
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS)


def _other_heads(folder, pipe):
    file = folder / "config.json"
    told = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(told | {"attention_head_dim": 8}), encoding="utf-8")


def _later_version(folder, pipe):
    file = folder / "config.json"
    told = json.loads(file.read_text(encoding="utf-8"))
    told["quantization_config"] |= {"version": 2}
    file.write_text(json.dumps(told), encoding="utf-8")


def _corrected(folder, pipe):
    values = {name: torch.zeros(6) for name in ("slope", "std", "r_squared")} | {"bias": torch.zeros(6, 4)}
    pipe.scheduler = correct(pipe.scheduler, Correction(timesteps=torch.arange(6), **values))
    with pytest.raises(ValueError, match=r"save_pretrained: not of a corrected scheduler.*quest.save\(pipe, path\)"):
        pipe.save_pretrained(folder.parent / "corrected")
    quest.save(pipe, folder / WEIGHTS)


@pytest.mark.parametrize(
    "change, words, told",
    [
        (_corrupted, {}, "is corrupted: its tensor"),
        (_without_header, {}, "is not a quantized checkpoint"),
        (_other_heads, {}, "another model: unet.config.attention_head_dim: 4 in the file, 8 in the model"),
        (_later_version, {}, "quantization_config: unknown: version; valid: quant_method alone"),
        (_corrected, {}, "it also corrects the sampler; valid: quest.load"),
        (None, {"torch_dtype": torch.float16}, "torch_dtype: torch.float16; a quantized denoiser computes in"),
        (None, {"device_map": "cpu"}, "device_map: .*; load without it"),
    ],
)
def test_what_cannot_be_loaded_is_refused(saved, tmp_path, change, words, told):
    pipe, folder, _ = saved
    copied = tmp_path / "unet"
    copied.mkdir()
    for file in (folder / "unet").iterdir():
        (copied / file.name).write_bytes(file.read_bytes())
    if change is not None:
        own = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
        change(copied, own)
    with pytest.raises(ValueError, match=told):
        UNet2DConditionModel.from_pretrained(copied, **words)


def test_codes_without_their_configuration_are_no_random_weights(saved, text_pipe, tmp_path):
    """diffusers itself would only warn: judge, declared models, quantize and load look before."""
    shutil.copytree(saved[1], tmp_path / "pipe")
    config = tmp_path / "pipe" / "unet" / "config.json"
    told = json.loads(config.read_text(encoding="utf-8"))
    del told["quantization_config"]
    config.write_text(json.dumps(told), encoding="utf-8")
    said = "config.json: no quantization_config, but .* is quantized; valid: the config.json that save_pretrained wrote"
    with pytest.raises(ValueError, match=said):
        load_pipeline(tmp_path / "pipe")
    pipe = copy.copy(text_pipe)
    for folder in (config.parent, config.parent.parent):
        pipe.unet = copy.deepcopy(text_pipe.unet)
        pipe.unet.register_to_config(_name_or_path=str(folder))
        for act in (lambda: quest.quantize(pipe, "rtn"), lambda: quest.load(pipe, saved[2])):
            with pytest.raises(ValueError, match=said):
                act()


def test_what_cannot_be_saved_is_refused(saved, tmp_path):
    unet = saved[0].unet
    with pytest.raises(ValueError, match="safe_serialization: False; valid: True"):
        unet.save_pretrained(tmp_path, safe_serialization=False)
    unet.save_pretrained(tmp_path, max_shard_size="20KB")
    with pytest.raises(ValueError, match="one of .* files; valid: one file"):
        UNet2DConditionModel.from_pretrained(tmp_path)
    lost = copy.deepcopy(unet).to("meta")
    for save in (lambda: lost.save_pretrained(tmp_path / "lost"), lambda: checkpoint.content(lost)):
        with pytest.raises(ValueError, match="on the meta device, without its values .*; load the pipeline again"):
            save()


def test_it_is_registered_before_diffusers_is_imported_too(monkeypatch):
    """conftest.py imports diffusers before quest; here its tables are imported anew, after quest."""
    before = sys.modules[registry.TABLES]
    assert before.AUTO_QUANTIZER_MAPPING[registry.NAME] is registry.quantizer
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.setattr(sys.modules["diffusers.quantizers"], "auto", before)
    monkeypatch.delitem(sys.modules, registry.TABLES)
    registry.register()
    tables = importlib.import_module(registry.TABLES)
    assert tables is not before and tables.AUTO_QUANTIZER_MAPPING[registry.NAME] is registry.quantizer
    made = tables.DiffusersAutoQuantizer.from_config({"quant_method": registry.NAME})
    assert type(made).__module__ == "quest.quantization.pretrained"
