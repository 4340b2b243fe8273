"""Build the untrained denoiser and autoencoder that a configuration describes."""

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, UNet2DModel, VQModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_processor import Attention

# `from_pretrained` looks up the base class of `FixedHeadsUNet2DModel` in this module.
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401

from quest.diffusion.compvis.configuration import (
    AUTOENCODER_KEYS,
    attends_by_level,
    parameters,
    refuse_unknown,
    target_of,
    unet_parameters,
)


class FixedHeadsUNet2DModel(UNet2DModel):
    """A `UNet2DModel` with the same number of attention heads at every width, as in LSUN-Churches' LDM-8.

    `UNet2DModel` fixes the size of a head instead, so wider levels have more heads. The parameters are the same.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int,
        in_channels: int,
        out_channels: int,
        block_out_channels: tuple[int, ...],
        down_block_types: tuple[str, ...],
        up_block_types: tuple[str, ...],
        num_attention_heads: int,
        layers_per_block: int = 2,
        norm_num_groups: int = 32,
        attn_norm_num_groups: int | None = None,
        resnet_time_scale_shift: str = "default",
        downsample_type: str = "conv",
        upsample_type: str = "conv",
    ):
        super().__init__(
            sample_size=sample_size,
            in_channels=in_channels,
            out_channels=out_channels,
            block_out_channels=block_out_channels,
            down_block_types=down_block_types,
            up_block_types=up_block_types,
            layers_per_block=layers_per_block,
            norm_num_groups=norm_num_groups,
            attn_norm_num_groups=attn_norm_num_groups,
            resnet_time_scale_shift=resnet_time_scale_shift,
            downsample_type=downsample_type,
            upsample_type=upsample_type,
            attention_head_dim=None,  # one head, which the loop below divides
        )
        for module in self.modules():
            if isinstance(module, Attention):
                if module.inner_dim % num_attention_heads:
                    raise ValueError(f"num_attention_heads: {num_attention_heads} do not divide {module.inner_dim}")
                module.heads = module.sliceable_head_dim = num_attention_heads
                module.scale = (module.inner_dim // num_attention_heads) ** -0.5


def denoiser(config, device="cpu") -> UNet2DModel | UNet2DConditionModel:
    """The untrained denoiser of a configuration; on the device "meta" it has its shapes but takes no memory."""
    params = unet_parameters(config)
    channels = [params["model_channels"] * m for m in params["channel_mult"]]
    attends = attends_by_level(params)
    common = {
        "sample_size": parameters(config)["image_size"],  # CompVis's code ignores the `image_size` of the U-Net
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
            # UNet2DConditionModel takes the number of heads under this name.
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
            "attn_norm_num_groups": 32,  # without it, a scale_shift model has no norm in its middle attention
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
    stage = parameters(config)["first_stage_config"]
    name = "model.params.first_stage_config"
    target, params = target_of(stage, name), stage["params"]
    dd = params["ddconfig"]
    refuse_unknown(dd, AUTOENCODER_KEYS, f"{name}.params.ddconfig")
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
