"""The networks of the zoo: denoisers, text encoder, noise schedule, pipelines. Other modules train them."""

from dataclasses import dataclass

import torch
from diffusers import (
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    PNDMScheduler,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.models.attention_processor import AttnProcessor
from transformers import CLIPTextConfig, CLIPTextModel

from quest.diffusion.pipelines import LatentDiffusionPipeline, text_pipeline

SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


@dataclass(frozen=True)
class Recipe:
    """Shape of a denoiser, its conditioning, and the length of its training."""

    pictures: str  # "scenes", "emoji" or "photos"
    conditioning: str  # "text", "class" or "none"
    iterations: int  # batches
    batch_size: int
    size: int  # side length of the latents
    latent_channels: int
    widths: tuple[int, ...]  # channels per level; each level after the first halves the resolution; of a DiT only one
    attention: tuple[bool, ...] = ()  # whether each level has attention
    blocks: int = 0  # blocks of a DiT (arXiv:2212.09748); 0 for a U-Net
    context: int = 64  # width of a context token
    average: float = 0.998  # decay of the moving average of the parameters
    half: bool = False  # whether training uses bfloat16


_SCENES = dict(pictures="scenes", batch_size=32, size=8, latent_channels=8, widths=(48, 96), attention=(True, True))
# Three resolutions and attention at two of them, as in the models of latent diffusion (arXiv:2112.10752).
_EMOJI = dict(
    pictures="emoji",
    batch_size=64,
    size=16,
    latent_channels=4,
    widths=(48, 96, 144),
    attention=(False, True, True),
    context=96,
    average=0.999,
    half=True,
)
_PHOTOS = dict(
    pictures="photos",
    conditioning="class",
    batch_size=64,
    size=8,
    latent_channels=8,
    average=0.999,
    half=True,
)
MODELS = {
    "scenes-text": Recipe(conditioning="text", iterations=10500, **_SCENES),
    "scenes-class": Recipe(conditioning="class", iterations=6500, **_SCENES),
    "scenes-uncond": Recipe(conditioning="none", iterations=23500, **_SCENES),
    "emoji-text": Recipe(conditioning="text", iterations=9000, **_EMOJI),
    "emoji-uncond": Recipe(conditioning="none", iterations=8500, **_EMOJI),
    "photos-class": Recipe(
        iterations=21000, widths=(64, 128, 192), attention=(True, True, False), context=96, **_PHOTOS
    ),
    # A transformer whose timestep and class enter by modulation. Each latent is a token.
    "photos-dit": Recipe(iterations=10000, widths=(96,), blocks=5, **_PHOTOS),
}


def recipe_of(name):
    """The recipe of a model. Raises ValueError for a name that is not in MODELS."""
    if name not in MODELS:
        raise ValueError(f"no model {name!r}; there are {', '.join(MODELS)}")
    return MODELS[name]


def build_denoiser(name, classes=None):
    """The untrained denoiser of a model. `classes`: their number, which only a DiT has to know.

    Raises ValueError for a name that is not in MODELS.
    """
    recipe = recipe_of(name)
    denoiser = _build_transformer(recipe, classes) if recipe.blocks else _build_unet(recipe)
    for module in denoiser.modules():
        if hasattr(module, "set_processor"):
            module.set_processor(AttnProcessor())  # at these sizes it trains faster than the default processor
    return denoiser


def _build_transformer(recipe, classes):
    transformer = DiTTransformer2DModel(
        num_attention_heads=recipe.widths[0] // 24,
        attention_head_dim=24,
        in_channels=recipe.latent_channels,
        out_channels=recipe.latent_channels,
        num_layers=recipe.blocks,
        norm_num_groups=8,
        sample_size=recipe.size,
        patch_size=1,
        num_embeds_ada_norm=classes,
    )
    # Blocks start as the identity (arXiv:2212.09748, section 3.2, "adaLN-Zero"), and the output as zeros.
    modulations = [block.norm1.linear for block in transformer.transformer_blocks]
    for layer in (*modulations, transformer.proj_out_1, transformer.proj_out_2):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    # In training mode each block would drop classes on its own; `train_denoiser` drops them for all blocks together.
    return transformer.eval()


def _build_unet(recipe):
    common = {
        "sample_size": recipe.size,
        "in_channels": recipe.latent_channels,
        "out_channels": recipe.latent_channels,
        "block_out_channels": recipe.widths,
        "layers_per_block": 1,
        "norm_num_groups": 8,
    }
    if recipe.conditioning == "none":
        return UNet2DModel(
            **common,
            down_block_types=tuple("AttnDownBlock2D" if there else "DownBlock2D" for there in recipe.attention),
            up_block_types=tuple("AttnUpBlock2D" if there else "UpBlock2D" for there in recipe.attention[::-1]),
            attention_head_dim=32 if recipe.pictures == "photos" else 24,
            resnet_time_scale_shift="scale_shift",
            downsample_type="resnet",
            upsample_type="resnet",
        )
    return UNet2DConditionModel(
        **common,
        down_block_types=tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in recipe.attention),
        up_block_types=tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in recipe.attention[::-1]),
        cross_attention_dim=recipe.context,
        attention_head_dim=4,  # UNet2DConditionModel takes the number of heads under this name
    )


def build_text_encoder(tokenizer, width, max_length):
    """A CLIP text model with two layers of `width` channels, for prompts of up to `max_length` tokens."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=max_length,
            projection_dim=width,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def alphas():
    """Cumulative product of the signal share for every training step, float32 [1000]."""
    return DDIMScheduler(**SCHEDULE).alphas_cumprod


def build_pipeline(denoiser, vae, encoder=None, tokenizer=None):
    """A diffusers pipeline of these modules; `encoder` encodes text if there is a tokenizer, otherwise classes."""
    if tokenizer is not None:
        scheduler = PNDMScheduler(**SCHEDULE, skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False)
        return text_pipeline(vae, encoder, tokenizer, denoiser, scheduler)
    scheduler = DDIMScheduler(
        **SCHEDULE, timestep_spacing="leading", steps_offset=1, clip_sample=False, set_alpha_to_one=False
    )
    if isinstance(denoiser, DiTTransformer2DModel):
        return DiTPipeline(denoiser, vae, scheduler)
    return LatentDiffusionPipeline(unet=denoiser, vae=vae, scheduler=scheduler, class_embedder=encoder)
