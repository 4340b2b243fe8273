"""Published weights become the folders that models load; what is missing or wrong is said with what would be right."""

import hashlib
import json
import shutil
from dataclasses import replace

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

import quest
from quest.diffusion import models, published, random_checkpoints, sampling
from quest.diffusion.calibration_set import collect
from quest.diffusion.models import MODELS
from quest.diffusion.pipelines import LatentDiffusionPipeline
from quest.diffusion.samplers import QuadraticDDIMScheduler
from quest.runtime.download import sha256_of

TOKENIZER = models.ZOO / "scenes-text" / "tokenizer"


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    """The folder that models load from."""
    monkeypatch.setattr(models, "PREPARED", tmp_path / "models")
    return tmp_path / "models"


def checkpoint(name, path):
    torch.save({"state_dict": random_checkpoints.state_dict(name)}, path)
    return path


@pytest.mark.parametrize("name", random_checkpoints.MODELS)
def test_a_prepared_model_is_quantized_saved_and_sampled(name, prepared, tmp_path):
    model = MODELS[name]
    path = checkpoint(name, tmp_path / "model.ckpt")
    published.prepare(model, path, prepared / name, tokenizer=TOKENIZER)
    told = json.loads((prepared / name / "origin.json").read_text(encoding="utf-8"))
    assert (told["sha256"], told["checkpoint"]) == (sha256_of(path), "model.ckpt")

    pipe = model.load()
    model = replace(model, steps=2, batch_size=1)
    calibration = collect(pipe, model, "calibration", 2)
    recipe = {"time_groups": 2, "selection": model.selection, "samples": 2, "tla_iterations": 1, "cma_iterations": 1}
    quantized = quest.quantize(pipe, bits="w4a4", calibration=calibration, **recipe)
    quest.save(quantized, tmp_path / "model.safetensors")
    again = quest.load(model.load(), tmp_path / "model.safetensors", kernel="reference")
    heads = {layer.heads for layer in again.unet.modules() if hasattr(layer, "to_q")}
    assert heads == {"tiny-bedrooms": {2}, "tiny-imagenet": {1}}.get(name, {8})
    found = next(sampling.generate(again, model, "evaluation", 2, (1, 2)))
    assert found[0].tolist() == [1] and found[2].shape == (1, 64, 64, 3)
    assert torch.equal(found[1], next(sampling.generate(quantized, model, "evaluation", 2, (1, 2)))[1])
    plain = next(sampling.generate(pipe, model, "evaluation", 2, (1, 2)))[1]
    assert found[1].isfinite().all() and (found[1] - plain).norm() > 0.01 * plain.norm()


def test_what_is_not_prepared_says_how(prepared):
    with pytest.raises(FileNotFoundError) as error:
        MODELS["lsun-bedrooms"].load()
    for told in ("models.lsun-bedrooms.checkpoint", "lsun_beds256", "snakemake results/models/lsun-bedrooms"):
        assert told in str(error.value)


def test_a_missing_checkpoint_names_key_and_file(prepared, tmp_path):
    with pytest.raises(FileNotFoundError, match="models.imagenet.checkpoint: no .*none.ckpt; valid: model.ckpt of cin"):
        published.prepare(MODELS["imagenet"], tmp_path / "none.ckpt", prepared / "imagenet")
    assert not (prepared / "imagenet").exists()


def test_a_checkpoint_of_another_model_leaves_nothing(prepared, tmp_path):
    path = checkpoint("tiny-bedrooms", tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match="model.ckpt does not fit the configuration; keys .* missing: .*unknown: "):
        published.prepare(MODELS["tiny-imagenet"], path, prepared / "tiny-imagenet")
    assert not list(prepared.glob("*"))


def captions(path, count):
    path.write_text("".join(f"a photo of number {i}\n" for i in range(count)), encoding="utf-8")
    return path


def test_captions_one_line_too_few(prepared, tmp_path):
    sd = MODELS["sd14"]
    path = checkpoint("tiny-sd", tmp_path / "model.ckpt")
    needed = 10_000 + sd.trajectories
    with pytest.raises(ValueError, match=rf"c.txt: {needed - 1} captions, {needed} needed \(1 too few\)"):
        published.prepare(sd, path, prepared / "sd14", captions=captions(tmp_path / "c.txt", needed - 1))
    gap = captions(tmp_path / "gap.txt", needed)
    gap.write_text(gap.read_text(encoding="utf-8").replace("number 7\n", "number 7\n\n"), encoding="utf-8")
    with pytest.raises(ValueError, match="gap.txt: line 9 is empty"):
        published.prepare(sd, path, prepared / "sd14", captions=gap)
    with pytest.raises(FileNotFoundError, match="none.txt: no such file; put captions there"):
        published.prepare(sd, path, prepared / "sd14", captions=tmp_path / "none.txt")


def test_captions_of_the_splits_differ(prepared, tmp_path, monkeypatch):
    """The architecture is the small one; what is looked at is which line goes to which image."""
    sd = replace(MODELS["sd14"], origin=replace(MODELS["sd14"].origin, compvis="tiny-sd"))
    path, file = checkpoint("tiny-sd", tmp_path / "model.ckpt"), captions(tmp_path / "c.txt", 10_128)
    published.prepare(sd, path, prepared / "sd14", tokenizer=TOKENIZER, captions=file)
    assert sd.conditions("evaluation", [9_999, 0]) == {"prompt": ["a photo of number 9999", "a photo of number 0"]}
    told = json.loads((prepared / "sd14/origin.json").read_text(encoding="utf-8"))
    lines = (prepared / "sd14/captions.txt").read_bytes().rstrip(b"\n")
    assert told["captions"]["sha256"] == hashlib.sha256(lines).hexdigest()
    assert sd.conditions("calibration", [127]) == {"prompt": ["a photo of number 10127"]}
    for split, index in (("evaluation", 10_000), ("calibration", 128), ("validation", 0)):
        with pytest.raises(ValueError, match=f"sd14: split '{split}' has fewer than {index + 1} captions"):
            sd.conditions(split, [index])

    # The hub's layout of the same model, and that of another.
    published.prepare(sd, prepared / "sd14", tmp_path / "again", captions=file)
    assert (tmp_path / "again/text_encoder/config.json").is_file()
    with pytest.raises(
        ValueError, match="its denoiser is not that of sd14: .* parameters differ, the first conv_in.bias"
    ):
        published.prepare(MODELS["sd14"], prepared / "sd14", tmp_path / "full", captions=file)
    with pytest.raises(ValueError, match="a folder without model_index.json"):
        published.convert(sd, prepared / "sd14" / "unet")


def test_cifar10_is_read_from_diffusers_layout(prepared, tmp_path):
    torch.manual_seed(0)
    config = {
        "sample_size": 32,
        "block_out_channels": (8, 8),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": None,
        "layers_per_block": 1,
        "norm_num_groups": 4,
    }
    unet = UNet2DModel(**config)
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "pipeline")
    unet.save_pretrained(tmp_path / "model")
    cifar = MODELS["cifar10"]
    for layout in ("pipeline", "model"):
        published.prepare(cifar, tmp_path / layout, prepared / "cifar10")
        pipe = cifar.load()
        assert type(pipe) is LatentDiffusionPipeline and pipe.vae is None
        assert type(pipe.scheduler) is QuadraticDDIMScheduler
        assert torch.equal(pipe.unet.conv_in.weight, unet.conv_in.weight)
    model = replace(cifar, steps=3, batch_size=2)
    _, latents, images = next(sampling.generate(pipe, model, "evaluation", 2))
    assert images.shape == (2, 32, 32, 3) and latents.shape == (2, 3, 32, 32)
    expected = ((latents / 2 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1)
    assert (torch.from_numpy(images) == expected).all()

    UNet2DModel(**config | {"sample_size": 64}).save_pretrained(tmp_path / "large")
    with pytest.raises(ValueError, match="a U-Net for 64 pixels, not for CIFAR-10's 32"):
        published.convert(cifar, tmp_path / "large")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: no config.json with diffusion_pytorch_model.safetensors"):
        published.convert(cifar, tmp_path / "empty")


def test_weights_in_several_files_are_hashed_together_and_none_are_named(tmp_path):
    folder = tmp_path / "sharded"
    (folder / "unet").mkdir(parents=True)
    with pytest.raises(ValueError, match="sharded: no weights of a denoiser"):
        published.weights_hash(folder)
    parts = [folder / f"unet/diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for number, part in enumerate(parts):
        part.write_bytes(bytes([number]) * 9)
    both = published.weights_hash(folder)
    assert len(both) == 64
    parts[1].write_bytes(b"other")
    assert published.weights_hash(folder) != both
    (folder / "unet/diffusion_pytorch_model.safetensors").write_bytes(b"whole")
    assert published.weights_hash(folder) == hashlib.sha256(b"whole").hexdigest()


def test_a_prepared_model_whose_bytes_have_changed_is_refused(prepared, tmp_path):
    model = MODELS["tiny-bedrooms"]
    published.prepare(model, checkpoint(model.name, tmp_path / "model.ckpt"), prepared / model.name)
    model.load()
    file = next((prepared / model.name / "unet").glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="safetensors: SHA-256 is .*the file has changed"):
        model.load()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """tiny-sd in the hub's layout."""
    place = tmp_path_factory.mktemp("published")
    path = checkpoint("tiny-sd", place / "model.ckpt")
    published.prepare(MODELS["tiny-sd"], path, place / "tiny-sd", tokenizer=TOKENIZER)
    return place / "tiny-sd"


OTHERWISE = {
    ("scheduler", "DDIMScheduler"): {"_class_name": "DDIMScheduler"},
    ("scheduler", "EulerDiscreteScheduler"): {"_class_name": "EulerDiscreteScheduler"},
    ("scheduler", "prediction_type 'v_prediction', not 'epsilon'"): {"prediction_type": "v_prediction"},
    ("scheduler", "beta_schedule 'linear', not 'scaled_linear'"): {"beta_schedule": "linear"},
    ("scheduler", "beta_end 0.02, not 0.012"): {"beta_end": 0.02},
    ("scheduler", "trained_betas"): {"trained_betas": [0.01] * 1000},
    ("scheduler", "timestep_spacing 'trailing', not 'leading'"): {"timestep_spacing": "trailing"},
    ("scheduler", "num_train_timesteps 500, not 1000"): {"num_train_timesteps": 500},
    ("scheduler", "skip_prk_steps False, not True"): {"skip_prk_steps": False},
    ("scheduler", "set_alpha_to_one True, not False"): {"set_alpha_to_one": True},
    ("unet", "attention_head_dim 4, not 8"): {"attention_head_dim": 4},
    ("unet", "act_fn 'gelu', not 'silu'"): {"act_fn": "gelu"},
    ("unet", "norm_eps 0.1"): {"norm_eps": 0.1},
    ("unet", "flip_sin_to_cos False, not True"): {"flip_sin_to_cos": False},
    ("unet", "cond_proj.weight"): {"time_cond_proj_dim": 8},
    ("vae", "scaling_factor 0.5"): {"scaling_factor": 0.5},
    ("vae", "shift_factor 0.1, not None"): {"shift_factor": 0.1},
}


@pytest.mark.parametrize("part, told", OTHERWISE)
def test_a_folder_that_is_set_up_otherwise_than_the_protocol(part, told, folder, tmp_path):
    assert published.convert(MODELS["tiny-sd"], folder).scheduler.config.steps_offset == 1
    shutil.copytree(folder, tmp_path / "other", ignore=shutil.ignore_patterns("SHA256SUMS"))
    file = tmp_path / "other" / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    config = json.loads(file.read_text(encoding="utf-8")) | OTHERWISE[part, told]
    file.write_text(json.dumps(config), encoding="utf-8")
    index = tmp_path / "other" / "model_index.json"
    if "_class_name" in OTHERWISE[part, told]:
        named = json.loads(index.read_text(encoding="utf-8")) | {"scheduler": ["diffusers", config["_class_name"]]}
        index.write_text(json.dumps(named), encoding="utf-8")
    with pytest.raises(ValueError, match=told):
        published.prepare(MODELS["tiny-sd"], tmp_path / "other", tmp_path / "out", tokenizer=TOKENIZER)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change, told",
    [
        ({"betas": torch.linspace(1e-4, 2e-2, 1000)}, "its betas are 1000 from 0.0001 to 0.02"),
        ({"alphas_cumprod": torch.linspace(1, 0, 1000)}, "its alphas_cumprod are not"),
        ({"scale_factor": torch.tensor(0.5)}, "its scale_factor is 0.5"),
    ],
)
def test_a_checkpoint_of_another_schedule_or_scale(change, told, tmp_path):
    torch.save({"state_dict": random_checkpoints.state_dict("tiny-sd") | change}, tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match=told):
        published.convert(MODELS["tiny-sd"], tmp_path / "model.ckpt", TOKENIZER)


@pytest.mark.parametrize(
    "scheduler, told",
    [
        ({"prediction_type": "sample"}, "prediction_type sample, not epsilon"),
        ({"beta_schedule": "squaredcos_cap_v2"}, "betas"),
        ({"num_train_timesteps": 4000}, "num_train_timesteps 4000, not 1000"),
    ],
)
def test_cifar10_of_another_training(scheduler, told, tmp_path):
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
    unet = UNet2DModel(sample_size=32, norm_num_groups=4, **blocks)
    DDPMPipeline(unet, DDPMScheduler(**scheduler)).save_pretrained(tmp_path / "pipeline")
    with pytest.raises(ValueError, match=told):
        published.convert(MODELS["cifar10"], tmp_path / "pipeline")
    learned = UNet2DModel(sample_size=32, norm_num_groups=4, out_channels=6, **blocks)
    DDPMPipeline(learned, DDPMScheduler(variance_type="learned")).save_pretrained(tmp_path / "learned")
    with pytest.raises(ValueError, match="a U-Net with 6 outputs"):
        published.convert(MODELS["cifar10"], tmp_path / "learned")
