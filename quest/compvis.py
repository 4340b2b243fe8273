"""Checkpoints of latent diffusion (arXiv:2112.10752) and Stable Diffusion v1, in CompVis's format, to diffusers.

A configuration is the YAML file that lies beside such a checkpoint; keys in messages are its keys. Four architectures
of it are read, those of QuEST's tables: unconditional with attention blocks (LSUN; for Churches with scale-shift norm
and residual blocks that resample), and with spatial transformers, by class (ImageNet) or by text (Stable Diffusion).
Anything else in a configuration is refused, not guessed.

Every tensor of the diffusers modules is looked up under the name it has in the checkpoint, so a name that is missing
and one that nobody asked for are both found, and both are errors.
"""

import pickle
import re
from collections.abc import Iterator
from pathlib import Path

import torch
import yaml
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from torch import Tensor, nn

from quest.pipelines import ClassEmbedder, FixedHeadsUNet2DModel, LatentDiffusionPipeline

UNCONDITIONAL = "__is_unconditional__"
LISTED = 10  # names of each kind in a message; a checkpoint of another model lacks hundreds

# Of `model.params.unet_config.params`: what an architecture is built from, and what changes nothing once it is trained.
UNET_KEYS = {
    "model_channels",
    "num_res_blocks",
    "channel_mult",
    "in_channels",
    "out_channels",
    "attention_resolutions",
    "num_heads",
    "num_head_channels",
    "use_spatial_transformer",
    "transformer_depth",
    "context_dim",
    "use_scale_shift_norm",
    "resblock_updown",
    "use_new_attention_order",
    "legacy",
    "image_size",
    "dropout",
    "use_checkpoint",
    "use_fp16",
}
AUTOENCODER_KEYS = {
    "double_z",
    "z_channels",
    "resolution",
    "in_channels",
    "out_ch",
    "ch",
    "ch_mult",
    "num_res_blocks",
    "attn_resolutions",
    "dropout",
}

# Derived from the schedule, or of training only. `betas` is compared with the configuration before it is left out.
SCHEDULE_KEYS = {
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
    "lvlb_weights",
    "logvar",
    "scale_factor",
    "model_ema.decay",
    "model_ema.num_updates",
}
TRAINING_PREFIXES = ("first_stage_model.loss.",)
DENOISER, AUTOENCODER = "model.diffusion_model.", "first_stage_model."
AVERAGED = "model_ema.diffusion_model"  # and then the parameter's name without its dots
TEXT = "cond_stage_model.transformer.text_model."

# Names inside a block, diffusers to CompVis.
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
ATTENTION = {"group_norm": "norm", "to_q": "qkv", "to_k": "qkv", "to_v": "qkv", "to_out.0": "proj_out"}
AUTOENCODER_BLOCK = {
    "conv_shortcut": "nin_shortcut",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}


class ModelCheckpoint:
    """Stands in for the callback class that PyTorch Lightning of 2022 names in its checkpoints; holds nothing."""


LIGHTNING = [(ModelCheckpoint, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint")]


def load(checkpoint, config, tokenizer=None):
    """A full-precision diffusers pipeline (float32, eval mode) from a CompVis checkpoint and its configuration.

    The averaged weights (`model_ema.*`) are used where the checkpoint has them, unless the configuration says
    `use_ema: false`, and are required where it says true. The scale factor of the latents is the checkpoint's where the
    configuration says `scale_by_std`, else the configuration's.

    Args:
        checkpoint: a `.ckpt` (its pickle is read as data only) or `.safetensors` file.
        config: the configuration, a YAML file or what is in it.
        tokenizer: folder of the CLIP tokenizer; needed where the checkpoint holds a text encoder, as Stable Diffusion's
            do. A text model without one becomes a pipeline that takes `prompt_embeds`.

    Returns:
        A `StableDiffusionPipeline` for a model by text, with PLMS; otherwise a `LatentDiffusionPipeline`, with DDIM.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is truncated or holds code, a configuration that is not one of the four architectures,
            missing or unknown names, tensors of other shapes, or another noise schedule; the message says which.
    """
    state = read(checkpoint)
    params = _params(config)
    kind = conditioning(config)
    _check_schedule(state, params, checkpoint)

    unet, vae = denoiser(config, "meta"), autoencoder(config, "meta", _scale_factor(state, params, checkpoint))
    sources = {id(unet): _denoiser_sources(unet, config, state), id(vae): _autoencoder_sources(vae)}
    needed = {source for found in sources.values() for source, _ in found.values()}
    modules = [unet, vae]
    embedder = None
    if kind == "class":
        stage = params["cond_stage_config"]["params"]
        classes = stage.get("n_classes", 1000)  # with the last one, which stands for none
        with torch.device("meta"):
            embedder = ClassEmbedder(num_classes=classes - 1, tokens=1, dim=stage["embed_dim"])
        sources[id(embedder)] = {"embedding.weight": ("cond_stage_model.embedding.weight", None)}
        needed.add("cond_stage_model.embedding.weight")
        modules.append(embedder)
    text = {name for name in state if name.startswith(TEXT)} if kind == "text" else set()
    _check_names(state, needed, text, checkpoint)
    for module in modules:
        _fill(module, sources[id(module)], state, _heads(module), params, checkpoint)

    schedule = {
        "beta_start": params["linear_start"],
        "beta_end": params["linear_end"],
        "beta_schedule": "scaled_linear",  # "linear" in the configuration: linear in the square root of beta
        "num_train_timesteps": params["timesteps"],
        "steps_offset": 1,  # timesteps 1, 1 + c, 1 + 2c, ...
        "set_alpha_to_one": False,
        "timestep_spacing": "leading",
    }
    if kind == "text":
        encoder, tokenizer = _text_encoder({name: state[name] for name in text}, tokenizer, unet, checkpoint)
        return StableDiffusionPipeline(
            vae=vae,
            text_encoder=encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=PNDMScheduler(**schedule, skip_prk_steps=True),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    return LatentDiffusionPipeline(unet, vae, DDIMScheduler(**schedule, clip_sample=False), embedder)


def read(checkpoint) -> dict[str, Tensor]:
    """The tensors of a `.ckpt` or `.safetensors` file by name, on the CPU.

    Raises FileNotFoundError, and ValueError for a file that is truncated, of another kind, or holds code: a pickle is
    read as data only, so nothing in it is ever run.
    """
    path = Path(checkpoint)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give the path of a CompVis checkpoint (.ckpt or .safetensors)")
    size = f"{path.stat().st_size} bytes"
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} ({size}): truncated, or not a safetensors file: {error}") from None
    try:
        with torch.serialization.safe_globals(LIGHTNING):
            found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code:
            raise ValueError(
                f"{path}: refused, its pickle holds code ({code[1]}) and not only tensors; nothing was run. Take the "
                "file from its publisher, or save its tensors as .safetensors where you trust it"
            ) from None
        raise ValueError(f"{path} ({size}): truncated, or not a PyTorch checkpoint") from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} ({size}): truncated, or not a PyTorch checkpoint: {reason}") from None
    state = found.get("state_dict", found) if isinstance(found, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path}: holds no state_dict of tensors, as CompVis checkpoints do")
    return state


def conditioning(config) -> str:
    """ "none", "class" or "text". Raises ValueError for another condition encoder."""
    stage = _params(config).get("cond_stage_config", UNCONDITIONAL)
    if stage == UNCONDITIONAL:
        return "none"
    target = _target(stage, "model.params.cond_stage_config")
    if target == "ClassEmbedder":
        return "class"
    if target == "FrozenCLIPEmbedder":
        return "text"
    raise ValueError(
        f"model.params.cond_stage_config.target: {target} is not known; valid: {UNCONDITIONAL}, ClassEmbedder, "
        "FrozenCLIPEmbedder"
    )


def denoiser(config, device="cpu") -> UNet2DModel | UNet2DConditionModel:
    """The untrained denoiser of a configuration; on the device "meta" it takes no memory and still has its shapes."""
    params = _unet_params(config)
    channels = [params["model_channels"] * m for m in params["channel_mult"]]
    attends = _attends(params)
    common = {
        "sample_size": _params(config)["image_size"],  # the U-Net's own `image_size` is not used by the original
        "in_channels": params["in_channels"],
        "out_channels": params["out_channels"],
        "block_out_channels": tuple(channels),
        "layers_per_block": params["num_res_blocks"],
    }
    width = params.get("num_head_channels", -1)
    heads = params.get("num_heads", -1)
    transformers = params.get("use_spatial_transformer", False)
    if transformers:
        down, up = ("CrossAttnDownBlock2D", "DownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
        special = {
            "cross_attention_dim": params["context_dim"],
            "transformer_layers_per_block": params.get("transformer_depth", 1),
            # In this class, the number of heads.
            "attention_head_dim": heads if width == -1 else tuple(c // width for c in channels),
        }
        kind = UNet2DConditionModel
    else:
        resampling = "resnet" if params.get("resblock_updown", False) else "conv"
        plain = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")
        plain = plain if resampling == "resnet" else ("DownBlock2D", "UpBlock2D")
        down, up = ("AttnDownBlock2D", plain[0]), ("AttnUpBlock2D", plain[1])
        special = {
            "resnet_time_scale_shift": "scale_shift" if params.get("use_scale_shift_norm", False) else "default",
            "downsample_type": resampling,
            "upsample_type": resampling,
            "attn_norm_num_groups": 32,  # with scale_shift, the attention in the middle has no norm unless told
        }
        kind, special = (
            (FixedHeadsUNet2DModel, special | {"num_attention_heads": heads})
            if width == -1
            else (UNet2DModel, special | {"attention_head_dim": width})
        )
    with torch.device(device):
        return kind(
            **common,
            down_block_types=tuple(down[not a] for a in attends),
            up_block_types=tuple(up[not a] for a in reversed(attends)),
            **special,
        ).eval()


def autoencoder(config, device="cpu", scale_factor: float = 1.0) -> VQModel | AutoencoderKL:
    """The untrained first stage of a configuration. A VQModel quantizes to its codebook when it decodes."""
    stage = _params(config)["first_stage_config"]
    name = "model.params.first_stage_config"
    target, params = _target(stage, name), stage["params"]
    dd = params["ddconfig"]
    _known(dd, AUTOENCODER_KEYS, f"{name}.params.ddconfig")
    if dd.get("attn_resolutions"):
        raise ValueError(f"{name}.params.ddconfig.attn_resolutions: {dd['attn_resolutions']} is not read; valid: []")
    levels = len(dd["ch_mult"])
    common = {
        "in_channels": dd["in_channels"],
        "out_channels": dd["out_ch"],
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": tuple(dd["ch"] * m for m in dd["ch_mult"]),
        "layers_per_block": dd["num_res_blocks"],
        "latent_channels": dd["z_channels"],
        "sample_size": dd["resolution"],
        "scaling_factor": scale_factor,
    }
    if target == "VQModelInterface" and not dd["double_z"]:
        kind, special = VQModel, {"num_vq_embeddings": params["n_embed"], "vq_embed_dim": params["embed_dim"]}
    elif target == "AutoencoderKL" and dd["double_z"] and params["embed_dim"] == dd["z_channels"]:
        kind, special = AutoencoderKL, {}
    else:
        raise ValueError(
            f"{name}: {target} with double_z {dd['double_z']}, embed_dim {params['embed_dim']} and z_channels "
            f"{dd['z_channels']} is not read; valid: VQModelInterface with double_z false, AutoencoderKL with double_z "
            "true and embed_dim as z_channels"
        )
    with torch.device(device):
        return kind(**common, **special).eval()


def _params(config) -> dict:
    """`model.params` of a configuration, the parts of it that are not about shapes checked."""
    if not isinstance(config, dict):
        path = Path(config)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; give the YAML configuration of the checkpoint")
        config = yaml.safe_load(path.read_text())
    model = config.get("model") if isinstance(config, dict) else None
    if not isinstance(model, dict) or "target" not in model or not isinstance(model.get("params"), dict):
        raise ValueError("config: no model.target and model.params in it, as CompVis configurations have")
    target, params = _target(model, "model"), model["params"]
    if target != "LatentDiffusion":
        raise ValueError(f"model.target: {target} is not read; valid: LatentDiffusion")
    needed = ("linear_start", "linear_end", "timesteps", "image_size", "unet_config", "first_stage_config")
    missing = [key for key in needed if key not in params]
    if missing:
        raise ValueError(f"model.params: {', '.join(missing)} missing in the configuration")
    for key, only in (("parameterization", "eps"), ("beta_schedule", "linear")):
        if params.get(key, only) != only:
            raise ValueError(f"model.params.{key}: {params[key]!r} is not read; valid: {only!r}")
    return params


def _unet_params(config) -> dict:
    name = "model.params.unet_config"
    stage = _params(config)["unet_config"]
    if _target(stage, name) != "UNetModel":
        raise ValueError(f"{name}.target: {stage['target']} is not read; valid: UNetModel")
    params = stage["params"]
    _known(params, UNET_KEYS, f"{name}.params")
    if (params.get("num_heads", -1) == -1) == (params.get("num_head_channels", -1) == -1):
        raise ValueError(f"{name}.params: give one of num_heads and num_head_channels")
    transformers = params.get("use_spatial_transformer", False)
    if transformers != (conditioning(config) != "none"):
        raise ValueError(
            f"{name}.params.use_spatial_transformer: {transformers} does not go with cond_stage_config; a model by "
            "class or text has spatial transformers, an unconditional one attention blocks"
        )
    if transformers:
        for key in ("use_scale_shift_norm", "resblock_updown"):
            if params.get(key, False):
                raise ValueError(f"{name}.params.{key}: true is not read together with spatial transformers")
    return params


def _attends(params: dict) -> list[bool]:
    """Whether each level of the U-Net has attention; its resolution is that of the latents over 2^level."""
    return [2**level in params["attention_resolutions"] for level in range(len(params["channel_mult"]))]


def _target(stage: dict, name: str) -> str:
    """The class name at the end of a configuration's `target`."""
    if not isinstance(stage, dict) or "target" not in stage:
        raise ValueError(f"{name}: no target in the configuration")
    return stage["target"].rpartition(".")[2]


def _known(params: dict, known: set[str], name: str) -> None:
    unknown = sorted(set(params) - known)
    if unknown:
        raise ValueError(f"{name}: {', '.join(unknown)} is not read; valid: {', '.join(sorted(known))}")


def _scale_factor(state: dict, params: dict, path) -> float:
    """What latents are multiplied with before the denoiser sees them (arXiv:2112.10752, section G)."""
    if params.get("scale_by_std", False):
        if "scale_factor" not in state:
            raise ValueError(f"{path}: key scale_factor is missing; the configuration says scale_by_std")
        return float(state["scale_factor"])
    return float(params.get("scale_factor", 1.0))


def _check_schedule(state: dict, params: dict, path) -> None:
    """A checkpoint that carries its betas must carry those of the configuration."""
    if "betas" not in state:
        return
    ends = torch.tensor([params["linear_start"], params["linear_end"]], dtype=torch.float64).sqrt()
    betas = torch.linspace(ends[0], ends[1], params["timesteps"], dtype=torch.float64) ** 2
    found = state["betas"].double()
    if found.shape != betas.shape or not torch.allclose(found, betas, rtol=1e-4, atol=0):
        raise ValueError(
            f"{path}: its betas are {len(found)} from {found[0]:.6g} to {found[-1]:.6g}, the configuration's (timesteps"
            f", linear_start, linear_end) {params['timesteps']} from {params['linear_start']} to {params['linear_end']}"
        )


def _denoiser_sources(unet, config, state: dict) -> dict[str, tuple[str, int | None]]:
    """Parameter of the denoiser -> its name in the checkpoint, and which third of it (q, k, v), if not all."""
    params = _params(config)
    averaged = params.get("use_ema", any(name.startswith(AVERAGED) for name in state))
    blocks = dict(_denoiser_blocks(_unet_params(config)))
    names = ATTENTION if not isinstance(unet, UNet2DConditionModel) else {}
    sources = {}
    for name in unet.state_dict():
        source = _renamed(name, blocks, RESNET | names)
        source = AVERAGED + _flat(source) if averaged else DENOISER + source
        part = re.search(r"\.to_([qkv])\.", name) if names else None
        sources[name] = (source, "qkv".index(part[1]) if part else None)
    return sources


def _denoiser_blocks(params: dict) -> Iterator[tuple[str, str]]:
    """Prefixes of the U-Net's blocks, diffusers and CompVis. CompVis counts blocks through all levels."""
    yield "time_embedding.linear_1", "time_embed.0"
    yield "time_embedding.linear_2", "time_embed.2"
    yield "conv_in", "input_blocks.0.0"
    attends, layers = _attends(params), params["num_res_blocks"]
    # In a block: the residual block, attention where the level has it, and after the last one of a level a resampling.
    resampling = "" if params.get("resblock_updown", False) else ".conv"
    number = 1
    for level, attention in enumerate(attends):
        for layer in range(layers):
            yield f"down_blocks.{level}.resnets.{layer}", f"input_blocks.{number}.0"
            if attention:
                yield f"down_blocks.{level}.attentions.{layer}", f"input_blocks.{number}.1"
            number += 1
        if level < len(attends) - 1:
            theirs = f"input_blocks.{number}.0" + (".op" if resampling else "")
            yield f"down_blocks.{level}.downsamplers.0{resampling}", theirs
            number += 1
    yield "mid_block.resnets.0", "middle_block.0"
    yield "mid_block.attentions.0", "middle_block.1"
    yield "mid_block.resnets.1", "middle_block.2"
    number = 0
    for place, attention in enumerate(reversed(attends)):
        for layer in range(layers + 1):
            yield f"up_blocks.{place}.resnets.{layer}", f"output_blocks.{number}.0"
            if attention:
                yield f"up_blocks.{place}.attentions.{layer}", f"output_blocks.{number}.1"
            if layer == layers and place < len(attends) - 1:
                theirs = f"output_blocks.{number}.{1 + attention}{resampling}"
                yield f"up_blocks.{place}.upsamplers.0{resampling}", theirs
            number += 1
    yield "conv_norm_out", "out.0"
    yield "conv_out", "out.2"


def _autoencoder_sources(vae) -> dict[str, tuple[str, None]]:
    blocks = {}
    levels = len(vae.config.block_out_channels)
    for coder in ("encoder", "decoder"):
        blocks |= {
            f"{coder}.mid_block.resnets.0": f"{coder}.mid.block_1",
            f"{coder}.mid_block.attentions.0": f"{coder}.mid.attn_1",
            f"{coder}.mid_block.resnets.1": f"{coder}.mid.block_2",
            f"{coder}.conv_norm_out": f"{coder}.norm_out",
        }
    for level in range(levels):
        blocks[f"encoder.down_blocks.{level}.downsamplers.0"] = f"encoder.down.{level}.downsample"
        # The decoder's levels are numbered by resolution in CompVis, in the order they are run in diffusers.
        theirs = levels - 1 - level
        blocks[f"decoder.up_blocks.{level}.upsamplers.0"] = f"decoder.up.{theirs}.upsample"
        for layer in range(vae.config.layers_per_block + 1):
            blocks[f"encoder.down_blocks.{level}.resnets.{layer}"] = f"encoder.down.{level}.block.{layer}"
            blocks[f"decoder.up_blocks.{level}.resnets.{layer}"] = f"decoder.up.{theirs}.block.{layer}"
    return {name: (AUTOENCODER + _renamed(name, blocks, AUTOENCODER_BLOCK), None) for name in vae.state_dict()}


def _renamed(name: str, blocks: dict[str, str], inside: dict[str, str]) -> str:
    """A diffusers name in CompVis's words: the block it lies in, then the layer of that block, if they differ."""
    parts = name.split(".")
    for n in range(len(parts), 0, -1):
        block = ".".join(parts[:n])
        if block in blocks:
            layer, _, leaf = ".".join(parts[n:]).rpartition(".")
            return ".".join(filter(None, (blocks[block], inside.get(layer, layer), leaf)))
    return name


def _heads(module: nn.Module) -> dict[str, int]:
    """Attention layers that hold q, k and v as one in the checkpoint, and their numbers of heads."""
    if not isinstance(module, UNet2DModel):
        return {}
    return {name: layer.heads for name, layer in module.named_modules() if hasattr(layer, "to_q")}


def _fill(module: nn.Module, sources: dict, state: dict, heads: dict[str, int], params: dict, path) -> None:
    """Give a module on the meta device its tensors, in float32."""
    together = params["unet_config"]["params"].get("use_new_attention_order", False)
    tensors, differ = {}, []
    for name, own in module.state_dict().items():
        source, part = sources[name]
        value = state[source].float()
        if part is not None:
            # Rows are [head, q k v, channel], or with the new order [q k v, head, channel].
            count = heads[name.partition(".to_")[0]]
            if value.shape[0] == 3 * own.shape[0]:
                order = (3, count, -1) if together else (count, 3, -1)
                value = value.unflatten(0, order).select(0 if together else 1, part).flatten(0, 1)
        if value.ndim > own.ndim and set(value.shape[own.ndim :]) == {1}:
            value = value.flatten(own.ndim - 1)  # a convolution over one pixel is a linear layer here
        if value.shape != own.shape:
            differ.append(f"{source} is {list(state[source].shape)}, {list(own.shape)} by the configuration")
        tensors[name] = value.contiguous()
    if differ:
        raise ValueError(f"{path}: other shapes than the configuration's: {_listed(differ, '; ')}")
    module.load_state_dict(tensors, assign=True)
    module.eval()


def _check_names(state: dict, needed: set[str], text: set[str], path) -> None:
    """Raise ValueError that lists names the modules need and the checkpoint lacks, and names that nothing reads."""
    missing = sorted(needed - set(state))
    # Of raw and averaged weights one set is used; the other may be there, under the same names.
    other = {AVERAGED + _flat(name) for name in needed if name.startswith(DENOISER)}
    flat = {name.removeprefix(AVERAGED) for name in needed if name.startswith(AVERAGED)}
    other |= {name for name in state if name.startswith(DENOISER) and _flat(name) in flat}
    known = needed | other | text | SCHEDULE_KEYS
    unknown = sorted(name for name in state if name not in known and not name.startswith(TRAINING_PREFIXES))
    told = [f"{len(missing)} missing: {_listed(missing)}"] * bool(missing)
    told += [f"{len(unknown)} unknown: {_listed(unknown)}"] * bool(unknown)
    if told:
        raise ValueError(f"{path} does not fit the configuration; keys {'; '.join(told)}")


def _flat(name: str) -> str:
    """The part of the denoiser's raw name that its averaged name has behind AVERAGED."""
    return name.removeprefix(DENOISER).replace(".", "")


def _listed(names: list[str], separator: str = ", ") -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return separator.join(names[:LISTED]) + more


def _text_encoder(tensors: dict[str, Tensor], tokenizer, unet, path):
    """CLIP's text model, its sizes read off its tensors, and its tokenizer; (None, None) where there are no tensors."""
    if not tensors:
        return None, None
    if tokenizer is None:
        raise ValueError(
            f"tokenizer: {path} holds a text encoder; give the folder of its CLIP tokenizer (tokenizer.json, or "
            "vocab.json and merges.txt)"
        )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    own = {name.removeprefix(TEXT): value.float() for name, value in tensors.items()}
    own.pop("embeddings.position_ids", None)  # counts from 0; a buffer that is made again
    layers = {int(found[1]) for name in own if (found := re.match(r"encoder\.layers\.(\d+)\.", name))}
    try:
        vocabulary, width = own["embeddings.token_embedding.weight"].shape
        positions = len(own["embeddings.position_embedding.weight"])
        inner = len(own["encoder.layers.0.mlp.fc1.weight"])
    except KeyError as error:
        raise ValueError(f"{path}: key {TEXT}{error.args[0]} is missing") from None
    found = CLIPTokenizer.from_pretrained(tokenizer)
    encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=len(layers),
            num_attention_heads=max(1, width // 64),  # CLIP's heads are 64 wide
            max_position_embeddings=positions,
            projection_dim=width,
            hidden_act="quick_gelu",
            bos_token_id=found.bos_token_id,
            eos_token_id=found.eos_token_id,
            pad_token_id=found.pad_token_id,
        )
    )
    # Versions of transformers differ in whether the model's names start with this.
    prefix = "text_model." if any(name.startswith("text_model.") for name in encoder.state_dict()) else ""
    names = {name.removeprefix(prefix) for name in encoder.state_dict()}
    _check_names({TEXT + name: None for name in own}, {TEXT + name for name in names}, set(), path)
    if width != unet.config.cross_attention_dim:
        raise ValueError(f"{path}: its text encoder is {width} wide, context_dim {unet.config.cross_attention_dim}")
    if len(found) != vocabulary or found.model_max_length > positions:
        raise ValueError(
            f"tokenizer: {tokenizer} has {len(found)} tokens and texts of up to {found.model_max_length}, the text "
            f"encoder of {path} {vocabulary} and {positions}"
        )
    encoder.load_state_dict({prefix + name: value for name, value in own.items()})
    return encoder.eval(), found
