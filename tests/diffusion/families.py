"""Tiny pipelines with random weights, one of each family that a config may declare."""

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
WIDTH = 32  # of text embeddings


def vae(**config) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        mid_block_add_attention=False,
        **{"scaling_factor": 8.0} | config,
    )


def unet(**config) -> UNet2DConditionModel:
    settings = dict(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=2,
    )
    return UNet2DConditionModel(**settings | config)


def text_encoder(tokenizer, kind=CLIPTextModel):
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=WIDTH,
        **ids,
    )
    return kind(config)


def stable_diffusion(tokenizer, scheduler, kind=StableDiffusionPipeline, **config):
    parts = dict(unet=unet(**config), vae=vae(), text_encoder=text_encoder(tokenizer), tokenizer=tokenizer)
    checks = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    return kind(scheduler=scheduler, **parts, **checks)


def ddpm(_tokenizer):
    blocks = dict(down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"))
    sizes = dict(sample_size=8, layers_per_block=1, block_out_channels=(16, 32), norm_num_groups=8)
    return DDPMPipeline(UNet2DModel(**sizes, **blocks), DDPMScheduler())


def dit(_tokenizer):
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        num_embeds_ada_norm=10,
    )
    return DiTPipeline(transformer, vae(), DDIMScheduler(), id2label={0: "cat", 1: "dog"})


def pixart(_tokenizer):
    letters = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -1.0)]
    tokenizer = T5TokenizerFast(vocab=[*letters, *((chr(i), -2.0) for i in range(97, 123))], extra_ids=0)
    encoder = T5EncoderModel(
        T5Config(vocab_size=len(tokenizer), d_model=WIDTH, d_kv=8, d_ff=WIDTH, num_layers=1, num_heads=2)
    )
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        cross_attention_dim=16,
        caption_channels=WIDTH,
        use_additional_conditions=False,
    )
    return PixArtAlphaPipeline(tokenizer, encoder, vae(), transformer, DPMSolverMultistepScheduler())


def sd3(tokenizer):
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        joint_attention_dim=2 * WIDTH,
        pooled_projection_dim=2 * WIDTH,
        caption_projection_dim=16,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )
    encoders = {
        name: text_encoder(tokenizer, CLIPTextModelWithProjection) for name in ("text_encoder", "text_encoder_2")
    }
    tokenizers = dict(tokenizer=tokenizer, tokenizer_2=tokenizer, text_encoder_3=None, tokenizer_3=None)
    parts = dict(transformer=transformer, vae=vae(shift_factor=0.1), scheduler=FlowMatchEulerDiscreteScheduler())
    return StableDiffusion3Pipeline(**parts, **encoders, **tokenizers)


def sdxl(tokenizer):
    denoiser = unet(
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + WIDTH,
        transformer_layers_per_block=(2, 1),
        cross_attention_dim=2 * WIDTH,
    )
    encoders = dict(
        text_encoder=text_encoder(tokenizer), text_encoder_2=text_encoder(tokenizer, CLIPTextModelWithProjection)
    )
    parts = dict(tokenizer=tokenizer, tokenizer_2=tokenizer, scheduler=EulerDiscreteScheduler(**SCHEDULE))
    return StableDiffusionXLPipeline(unet=denoiser, vae=vae(), **encoders, **parts, add_watermarker=False)


# What a config says of each beside the folder is in test_declared.py.
FAMILIES = {
    "sd1": lambda tokenizer: stable_diffusion(tokenizer, DDIMScheduler(**SCHEDULE)),
    "sd2": lambda tokenizer: stable_diffusion(
        tokenizer,
        DPMSolverMultistepScheduler(prediction_type="v_prediction"),
        use_linear_projection=True,
        attention_head_dim=(2, 4),
        upcast_attention=True,
    ),
    "turbo": lambda tokenizer: stable_diffusion(
        tokenizer, EulerAncestralDiscreteScheduler(**SCHEDULE, timestep_spacing="trailing")
    ),
    "lcm": lambda tokenizer: stable_diffusion(
        tokenizer,
        LCMScheduler(beta_schedule="scaled_linear"),
        LatentConsistencyModelPipeline,
        time_cond_proj_dim=16,
    ),
    "ddpm": ddpm,
    "dit": dit,
    "pixart": pixart,
    "sd3": sd3,
    "sdxl": sdxl,
    "inpainting": lambda tokenizer: stable_diffusion(
        tokenizer, DDIMScheduler(**SCHEDULE), StableDiffusionInpaintPipeline, in_channels=9
    ),
}


def make(name: str, tokenizer):
    """The pipeline of a family. Its weights are drawn wider than untrained ones, whose outputs are almost nothing."""
    torch.manual_seed(0)
    pipe = FAMILIES[name](tokenizer)
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    with torch.no_grad():
        for parameter in denoiser.parameters():
            # Modulations and last layers start as zeros.
            parameter.copy_(parameter + 0.05 * torch.randn_like(parameter))
    pipe.set_progress_bar_config(disable=True)
    return pipe
