"""Map the parameter names of diffusers' modules to the names in a CompVis checkpoint.

A name consists of a block, a layer inside that block, and a parameter. Block and layer are translated separately:

    diffusers                          down_blocks.1.resnets.0   conv1         weight
    CompVis    model.diffusion_model.  input_blocks.4.0          in_layers.2   weight
"""

import re
from collections.abc import Iterator

from diffusers import UNet2DConditionModel

from quest.diffusion.compvis.configuration import attends_by_level, parameters, unet_parameters

DENOISER, AUTOENCODER = "model.diffusion_model.", "first_stage_model."
AVERAGED = "model_ema.diffusion_model"  # the parameter's name follows, without its dots

# Layers inside a block: name in diffusers -> name in CompVis.
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


def denoiser_sources(unet, config, state: dict) -> dict[str, tuple[str, int | None]]:
    """Map each denoiser parameter to (name in the checkpoint, which third of that tensor: 0 q, 1 k, 2 v, None all)."""
    params = parameters(config)
    averaged = params.get("use_ema", any(name.startswith(AVERAGED) for name in state))
    blocks = dict(_denoiser_blocks(unet_parameters(config)))
    names = ATTENTION if not isinstance(unet, UNet2DConditionModel) else {}
    sources = {}
    for name in unet.state_dict():
        source = _renamed(name, blocks, RESNET | names)
        source = AVERAGED + without_dots(source) if averaged else DENOISER + source
        part = re.search(r"\.to_([qkv])\.", name) if names else None
        sources[name] = (source, "qkv".index(part[1]) if part else None)
    return sources


def _denoiser_blocks(params: dict) -> Iterator[tuple[str, str]]:
    """Yield (prefix in diffusers, prefix in CompVis) of each block. CompVis numbers blocks across all levels."""
    yield "time_embedding.linear_1", "time_embed.0"
    yield "time_embedding.linear_2", "time_embed.2"
    yield "conv_in", "input_blocks.0.0"
    attends, layers = attends_by_level(params), params["num_res_blocks"]
    # A block of CompVis has a residual block, then attention if its level has any; resampling ends each level.
    resampling = "" if params.get("resblock_updown", False) else ".conv"
    number = 1
    for level, attention in enumerate(attends):
        for layer in range(layers):
            yield f"down_blocks.{level}.resnets.{layer}", f"input_blocks.{number}.0"
            if attention:
                yield f"down_blocks.{level}.attentions.{layer}", f"input_blocks.{number}.1"
            number += 1
        if level < len(attends) - 1:
            compvis_name = f"input_blocks.{number}.0" + (".op" if resampling else "")
            yield f"down_blocks.{level}.downsamplers.0{resampling}", compvis_name
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
                compvis_name = f"output_blocks.{number}.{1 + attention}{resampling}"
                yield f"up_blocks.{place}.upsamplers.0{resampling}", compvis_name
            number += 1
    yield "conv_norm_out", "out.0"
    yield "conv_out", "out.2"


def autoencoder_sources(vae) -> dict[str, tuple[str, None]]:
    """Map each parameter of the autoencoder to (name in the checkpoint, None), like `denoiser_sources`."""
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
        # CompVis numbers the decoder's levels by resolution, diffusers in the order in which they run.
        compvis_level = levels - 1 - level
        blocks[f"decoder.up_blocks.{level}.upsamplers.0"] = f"decoder.up.{compvis_level}.upsample"
        for layer in range(vae.config.layers_per_block + 1):
            blocks[f"encoder.down_blocks.{level}.resnets.{layer}"] = f"encoder.down.{level}.block.{layer}"
            blocks[f"decoder.up_blocks.{level}.resnets.{layer}"] = f"decoder.up.{compvis_level}.block.{layer}"
    return {name: (AUTOENCODER + _renamed(name, blocks, AUTOENCODER_BLOCK), None) for name in vae.state_dict()}


def _renamed(name: str, blocks: dict[str, str], inside: dict[str, str]) -> str:
    """Translate a diffusers name: its longest prefix in `blocks`, then the layer behind it if `inside` has that."""
    parts = name.split(".")
    for n in range(len(parts), 0, -1):
        block = ".".join(parts[:n])
        if block in blocks:
            layer, _, leaf = ".".join(parts[n:]).rpartition(".")
            return ".".join(filter(None, (blocks[block], inside.get(layer, layer), leaf)))
    return name


def without_dots(name: str) -> str:
    """Convert a denoiser parameter's raw name to the part of its averaged name that follows AVERAGED."""
    return name.removeprefix(DENOISER).replace(".", "")
