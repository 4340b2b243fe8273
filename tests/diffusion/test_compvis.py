"""CompVis checkpoints against what the original implementation computes from the same small networks.

`golden/compvis/<model>/expected.npz` holds one call of the original denoiser (`x, t[, context] -> eps`), of its decoder
(`z -> image`) and a whole run of its sampler (`x_T -> samples`, settings in `sampling.json`), on the weights that
`quest.diffusion.random_checkpoints.state_dict` draws; LSUN's with the averaged ones.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel, UNet2DModel, VQModel
from safetensors.torch import save_file

from quest.diffusion import compvis, random_checkpoints
from quest.diffusion.compvis import networks
from quest.diffusion.compvis.networks import FixedHeadsUNet2DModel
from quest.diffusion.pipelines import LatentDiffusionPipeline

GOLDEN = Path(__file__).parents[1] / "golden" / "compvis"
TOKENIZER = Path(__file__).parents[2] / "resources/zoo/scenes-text/tokenizer"
MODELS = {
    "lsun_bedrooms": "tiny-bedrooms",
    "lsun_churches": "tiny-churches",
    "imagenet": "tiny-imagenet",
    "stable_diffusion": "tiny-sd",
}
KINDS = {
    "lsun_bedrooms": (UNet2DModel, VQModel),
    "lsun_churches": (FixedHeadsUNet2DModel, AutoencoderKL),
    "imagenet": (UNet2DConditionModel, VQModel),
    "stable_diffusion": (UNet2DConditionModel, AutoencoderKL),
}


def state_of(name):
    return random_checkpoints.state_dict(MODELS[name], text=False)


def config_of(name):
    return yaml.safe_load((GOLDEN / name / "config.yaml").read_text(encoding="utf-8"))


def written(state, path):
    torch.save({"state_dict": state, "epoch": 0, "global_step": 0}, path)
    return path


@pytest.fixture(scope="session")
def loaded(tmp_path_factory):
    """Model -> pipeline and what the original computes, each made once."""
    folder, made = tmp_path_factory.mktemp("compvis"), {}

    def get(name):
        if name not in made:
            path = written(state_of(name), folder / f"{name}.ckpt")
            pipe = compvis.load(path, GOLDEN / name / "config.yaml")
            pipe.set_progress_bar_config(disable=True)
            with np.load(GOLDEN / name / "expected.npz") as file:
                made[name] = pipe, {key: torch.from_numpy(value) for key, value in file.items()}
        return made[name]

    return get


def relative(found, expected):
    """Largest error of an image over the largest value of that image."""
    return ((found - expected).abs().flatten(1).amax(1) / expected.abs().flatten(1).amax(1)).max().item()


@torch.no_grad()
def predict(unet, expected):
    context = {"encoder_hidden_states": expected["context"]} if "context" in expected else {}
    return unet(expected["x"], expected["t"], **context).sample


@pytest.mark.parametrize("name", MODELS)
def test_predictions_and_images_are_the_originals(name, loaded):
    pipe, expected = loaded(name)
    assert (type(pipe.unet), type(pipe.vae)) == KINDS[name]
    assert relative(predict(pipe.unet, expected), expected["eps"]) < 1e-4
    with torch.no_grad():
        image = pipe.vae.decode(expected["z"] / pipe.vae.config.scaling_factor).sample
    assert relative(image, expected["image"]) < 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_whole_sampler_runs_are_the_originals(name, loaded):
    pipe, expected = loaded(name)
    settings = json.loads((GOLDEN / name / "sampling.json").read_text(encoding="utf-8"))
    call = {"latents": expected["x_T"], "num_inference_steps": settings["steps"], "output_type": "latent"}
    if settings["sampler"] == "plms":
        call |= {"prompt_embeds": expected["cond"], "negative_prompt_embeds": expected["uncond"]}
        call |= {"height": 32, "width": 32}
    else:
        call |= {"class_labels": [3, 42]} if "labels" in expected else {"batch_size": 2}
    seen = []
    handle = pipe.unet.register_forward_pre_hook(lambda module, inputs: seen.append(int(inputs[1])))
    try:
        samples = pipe(**call, guidance_scale=settings["guidance"]).images
    finally:
        handle.remove()
    assert relative(samples, expected["samples"]) < 1e-3
    times = expected["timesteps"].tolist()
    if settings["sampler"] == "plms":  # 51 calls for 50 steps: the second timestep is met twice
        times = [*times[:2], times[1], *times[2:]]
        assert len(seen) == 51
    assert seen == times


def test_class_embedder_is_the_originals(loaded):
    pipe, expected = loaded("imagenet")
    assert expected["labels"].tolist() == [7, 999, 1000]  # the last row stands for no class
    assert torch.equal(pipe.class_embedder(expected["labels"]), expected["context"])


@pytest.mark.parametrize("name", MODELS)
def test_saved_pipelines_come_back_the_same(name, loaded, tmp_path):
    pipe, expected = loaded(name)
    pipe.save_pretrained(tmp_path)
    if name == "stable_diffusion":  # these have no text encoder, which diffusers wants to be told
        again = StableDiffusionPipeline.from_pretrained(tmp_path, text_encoder=None, tokenizer=None)
    else:
        again = LatentDiffusionPipeline.from_pretrained(tmp_path)
    assert type(again.unet) is type(pipe.unet)
    assert torch.equal(predict(again.unet, expected), predict(pipe.unet, expected))
    assert again.vae.config.scaling_factor == pipe.vae.config.scaling_factor


def test_churches_have_eight_heads_at_every_width(loaded, tmp_path):
    pipe, expected = loaded("lsun_churches")
    pipe.unet.save_pretrained(tmp_path)
    layers = [m for m in FixedHeadsUNet2DModel.from_pretrained(tmp_path).modules() if hasattr(m, "to_q")]
    assert {(layer.inner_dim, layer.heads, layer.scale) for layer in layers} == {(32, 8, 4**-0.5), (64, 8, 8**-0.5)}
    # Heads of one size, as UNet2DModel has them, are another function of the same weights.
    other = UNet2DModel(
        **{k: v for k, v in pipe.unet.config.items() if k not in ("num_attention_heads", "attention_head_dim")},
        attention_head_dim=8,
    )
    other.load_state_dict(pipe.unet.state_dict())
    assert relative(predict(other, expected), expected["eps"]) > 1e-2


def test_heads_that_do_not_divide_a_width_are_refused():
    config = config_of("lsun_churches")
    config["model"]["params"]["unet_config"]["params"]["num_heads"] = 5
    with pytest.raises(ValueError, match="num_attention_heads: 5 do not divide 32"):
        networks.denoiser(config, "meta")


def test_averaged_weights_are_used_unless_told_otherwise(loaded, tmp_path):
    averaged, expected = loaded("lsun_bedrooms")
    path, config = written(state_of("lsun_bedrooms"), tmp_path / "model.ckpt"), config_of("lsun_bedrooms")
    config["model"]["params"]["use_ema"] = False
    raw = compvis.load(path, config).unet
    assert relative(predict(raw, expected), predict(averaged.unet, expected)) > 0.1
    weight = state_of("lsun_bedrooms")["model.diffusion_model.out.2.weight"]
    assert torch.equal(raw.conv_out.weight, weight)

    raw_only = {k: v for k, v in state_of("lsun_bedrooms").items() if not k.startswith("model_ema.")}
    path = written(raw_only, tmp_path / "raw.ckpt")
    config["model"]["params"]["use_ema"] = True
    with pytest.raises(ValueError, match="128 missing: model_ema.diffusion_modelinput_blocks00bias, .* and 118 more"):
        compvis.load(path, config)
    del config["model"]["params"]["use_ema"]
    assert torch.equal(compvis.load(path, config).unet.conv_out.weight, weight)


def test_the_other_attention_order_is_read(loaded, tmp_path):
    """The same network stored [q k v, head, channel] instead of [head, q k v, channel]."""
    pipe, expected = loaded("lsun_churches")
    state, config = state_of("lsun_churches"), config_of("lsun_churches")
    for name, value in state.items():
        if "qkv" in name:
            state[name] = value.unflatten(0, (8, 3, -1)).transpose(0, 1).flatten(0, 2)
    config["model"]["params"]["unet_config"]["params"]["use_new_attention_order"] = True
    again = compvis.load(written(state, tmp_path / "model.ckpt"), config)
    assert torch.equal(predict(again.unet, expected), predict(pipe.unet, expected))


def test_safetensors_and_half_precision(loaded, tmp_path):
    pipe, _ = loaded("imagenet")
    save_file({k: v.half() for k, v in state_of("imagenet").items()}, tmp_path / "model.safetensors")
    again = compvis.load(tmp_path / "model.safetensors", config_of("imagenet"))
    assert again.unet.dtype == again.vae.dtype == torch.float32
    for a, b in zip(pipe.unet.parameters(), again.unet.parameters(), strict=True):
        assert torch.equal(a, b)  # the weights are drawn in float16


def test_scale_factor_comes_from_the_checkpoint(loaded, tmp_path):
    assert loaded("lsun_churches")[0].vae.config.scaling_factor == pytest.approx(0.2345)
    assert loaded("stable_diffusion")[0].vae.config.scaling_factor == 0.18215
    assert loaded("lsun_bedrooms")[0].vae.config.scaling_factor == 1
    state = state_of("lsun_churches")
    del state["scale_factor"]
    with pytest.raises(ValueError, match="key scale_factor is missing; the configuration says scale_by_std"):
        compvis.load(written(state, tmp_path / "model.ckpt"), config_of("lsun_churches"))


def test_betas_of_the_checkpoint_are_those_of_the_configuration(tmp_path):
    state, config = state_of("lsun_churches"), config_of("lsun_churches")
    betas = np.linspace(0.0015**0.5, 0.0155**0.5, 1000, dtype=np.float64) ** 2
    state["betas"] = torch.from_numpy(betas.astype(np.float32))
    path = written(state, tmp_path / "model.ckpt")
    compvis.load(path, config)
    config["model"]["params"]["linear_end"] = 0.0195  # Bedrooms'
    with pytest.raises(ValueError, match="its betas are 1000 from 0.0015 to 0.0155, the config.* to 0.0195"):
        compvis.load(path, config)


def test_missing_and_unknown_names_are_listed(tmp_path):
    state = state_of("imagenet")
    del state["model.diffusion_model.middle_block.1.norm.bias"], state["cond_stage_model.embedding.weight"]
    state["model.diffusion_model.middle_block.3.bias"] = torch.zeros(1)
    with pytest.raises(ValueError) as error:
        compvis.load(written(state, tmp_path / "model.ckpt"), config_of("imagenet"))
    assert "model.ckpt does not fit the configuration" in str(error.value)
    assert (
        "2 missing: cond_stage_model.embedding.weight, model.diffusion_model.middle_block.1.norm.bias; "
        "1 unknown: model.diffusion_model.middle_block.3.bias"
    ) in str(error.value)


def test_what_training_left_in_a_checkpoint_is_not_unknown(tmp_path):
    state = state_of("imagenet") | {"logvar": torch.zeros(1000), "first_stage_model.loss.logvar": torch.zeros(1)}
    state |= {"posterior_variance": torch.zeros(1000), "model_ema.decay": torch.tensor(0.9999)}
    compvis.load(written(state, tmp_path / "model.ckpt"), config_of("imagenet"))


def test_tensors_of_another_shape_are_listed(tmp_path):
    state = state_of("lsun_bedrooms")
    state["first_stage_model.quantize.embedding.weight"] = torch.zeros(32, 3)
    with pytest.raises(ValueError, match=r"embedding.weight is \[32, 3\], \[64, 3\] by the configuration"):
        compvis.load(written(state, tmp_path / "model.ckpt"), config_of("lsun_bedrooms"))


def changed(name, keys, value):
    config = config_of(name)
    place = config["model"]
    for key in keys[:-1]:
        place = place[key]
    if value is None:
        del place[keys[-1]]
    else:
        place[keys[-1]] = value
    return config


UNET = ("params", "unet_config", "params")


@pytest.mark.parametrize(
    ("name", "keys", "value", "message"),
    [
        ("imagenet", ("target",), "ldm.DDPM", "model.target: DDPM is not read; valid: LatentDiffusion"),
        ("imagenet", ("params", "linear_end"), None, "model.params: linear_end missing"),
        (
            "imagenet",
            ("params", "parameterization"),
            "v",
            "model.params.parameterization: 'v' is not read; valid: 'eps'",
        ),
        ("imagenet", (*UNET, "num_classes"), 10, "unet_config.params: num_classes is not read; valid: attention_res"),
        ("imagenet", (*UNET, "num_heads"), None, "give one of num_heads and num_head_channels"),
        ("imagenet", (*UNET, "resblock_updown"), True, "resblock_updown: true is not read together with spatial"),
        ("lsun_bedrooms", (*UNET, "use_spatial_transformer"), True, "use_spatial_transformer: True does not go with"),
        (
            "lsun_bedrooms",
            ("params", "first_stage_config", "target"),
            "ldm.AutoencoderKL",
            "AutoencoderKL with double_z",
        ),
        ("lsun_bedrooms", ("params", "cond_stage_config"), {"target": "a.BERT"}, "BERT is not known; valid: __is_unc"),
    ],
)
def test_other_architectures_are_refused_by_key(name, keys, value, message, tmp_path):
    path = written({}, tmp_path / "model.ckpt")
    with pytest.raises(ValueError) as error:
        compvis.load(path, changed(name, keys, value))
    assert message in str(error.value)


def test_a_configuration_that_is_none(tmp_path):
    path = written({}, tmp_path / "model.ckpt")
    with pytest.raises(FileNotFoundError, match="none.yaml: no such file; give the YAML configuration"):
        compvis.load(path, tmp_path / "none.yaml")
    with pytest.raises(ValueError, match="config: no model.target and model.params"):
        compvis.load(path, {"model": None})


def test_text_encoders_come_with_their_tokenizer(tmp_path):
    path = written(random_checkpoints.state_dict("tiny-sd"), tmp_path / "model.ckpt")
    config = random_checkpoints.COMPVIS / "tiny-sd.yaml"
    pipe = compvis.load(path, config, TOKENIZER)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.text_encoder.config.num_hidden_layers == 2
    red, blue = (
        pipe(
            [f"a {colour} circle"], num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np"
        )
        for colour in ("red", "blue")
    )
    assert red.images.shape == (1, 64, 64, 3) and np.abs(red.images - blue.images).max() > 1e-3

    with pytest.raises(ValueError, match="tokenizer: .*model.ckpt holds a text encoder; give the folder"):
        compvis.load(path, config)
    state = random_checkpoints.state_dict("tiny-sd")
    words = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
    with pytest.raises(ValueError, match="has 299 tokens .* 200 and 20"):
        compvis.load(written(state | {words: state[words][:200]}, path), config, TOKENIZER)
    del state["cond_stage_model.transformer.text_model.final_layer_norm.bias"]
    with pytest.raises(ValueError, match="1 missing: cond_stage_model.transformer.text_model.final_layer_norm.bias"):
        compvis.load(written(state, path), config, TOKENIZER)


# QuEST's models: parameters of the denoiser in millions and its size in MiB, as computed from the released
# configurations; the paper's full-precision sizes (tables 3 to 5), here last, lie within 0.35 of the latter.
FULL = {
    "lsun-bedrooms": (274.06, 1045.4, 1045.6),
    "lsun-churches": (294.97, 1125.2, 1125.4),
    "imagenet": (400.92, 1529.4, 1529.7),
    "sd14": (859.52, 3278.8, 3279.1),
}


@pytest.mark.parametrize("name", FULL)
def test_full_size_configurations_have_the_papers_parameters(name):
    million, size, published = FULL[name]
    config = random_checkpoints.COMPVIS / f"{name}.yaml"
    unet = networks.denoiser(config, "meta")
    count = sum(parameter.numel() for parameter in unet.parameters())
    assert {parameter.device.type for parameter in unet.parameters()} == {"meta"}
    assert round(count / 1e6, 2) == million
    assert round(count * 4 / 2**20, 1) == size
    assert abs(count * 4 / 2**20 - published) < 0.35
    vae = networks.autoencoder(config, "meta")
    side = unet.config.sample_size * 2 ** (len(vae.config.block_out_channels) - 1)
    assert side == vae.config.sample_size == (512 if name == "sd14" else 256)


def test_small_and_full_size_share_everything_but_their_sizes():
    """What the small networks show of the converter holds for the full ones."""

    def kinds(config):
        found = yaml.safe_load((random_checkpoints.COMPVIS / f"{config}.yaml").read_text(encoding="utf-8"))["model"][
            "params"
        ]
        unet = found["unet_config"]["params"]
        flags = ("use_spatial_transformer", "use_scale_shift_norm", "resblock_updown", "transformer_depth")
        heads = [key for key in ("num_heads", "num_head_channels") if key in unet]
        return [unet.get(flag) for flag in flags], heads, found["first_stage_config"]["target"], found["linear_end"]

    for small, full in zip(random_checkpoints.MODELS, FULL, strict=True):
        assert kinds(small) == kinds(full)
